"""What a quantized model is made of: per layer its bits, work and error; in all its size and bit operations."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from vitalloy.compression.calibration import Seen, record, some
from vitalloy.compression.simulated import FLOAT, QUANTIZED
from vitalloy.layers.attention import Attend

LOOKED_AT = 32  # images that the table is made from


def sized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Layers that say how many bits they use (`weight_bits`, `activation_bits`), by name."""
    return {n: m for n, m in model.named_modules() if hasattr(m, "weight_bits") and hasattr(m, "activation_bits")}


def table(model: nn.Module, images: Tensor) -> list[dict[str, Any]]:
    """A row for each layer with bits that the images pass through.

    Keys: name, kind, weight_bits, activation_bits, weights (how many), macs (of one image), sqnr_db: the power of the
    layer's output over the power of the error that its own quantizers add to it (None for layers of other kinds).
    """
    layers, images = sized_layers(model), some(images, LOOKED_AT)
    seen = record(model, layers.values(), images, batch_size=LOOKED_AT)  # one pass, so that its biases fit its inputs
    rows = []
    for name, layer in layers.items():
        if layer not in seen:
            continue
        weight = getattr(layer, "weight", None)
        rows.append(
            {
                "name": name,
                "kind": _kind(layer),
                "weight_bits": layer.weight_bits,
                "activation_bits": layer.activation_bits,
                "weights": weight.numel() if isinstance(weight, Tensor) else 0,
                "macs": _macs(layer, seen[layer]) // max(len(images), 1),
                "sqnr_db": _sqnr(layer, seen[layer]) if isinstance(layer, QUANTIZED) else None,
            }
        )
    return rows


def bit_operations(rows: list[dict[str, Any]]) -> int:
    """Sum of multiply-accumulates times the bits of both factors, for one image."""
    return sum(row["macs"] * row["weight_bits"] * row["activation_bits"] for row in rows)


def size_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers if every quantized weight took its bits and every other value four bytes."""
    packed = {id(m.weight): m.weight_bits for m in sized_layers(model).values() if hasattr(m, "weight")}
    values = {id(v): v for v in [*model.parameters(), *model.buffers()]}
    return sum(math.ceil(v.numel() * packed.get(key, FLOAT) / 8) for key, v in values.items())


def _kind(layer: nn.Module) -> str:
    if isinstance(layer, Attend):
        return "attention"
    if isinstance(layer, nn.Conv2d):
        return "depth-wise convolution" if layer.groups == layer.in_channels > 1 else "convolution"
    return "linear" if isinstance(layer, nn.Linear) else type(layer).__name__


def _macs(layer: nn.Module, seen: Seen) -> int:
    """Multiply-accumulates over all recorded images."""
    if isinstance(layer, Attend):
        q, k, v = seen.inputs
        return q.numel() * k.shape[-2] + q[..., 0].numel() * k.shape[-2] * v.shape[-1]
    weight = getattr(layer, "weight", None)
    return seen.output.numel() * weight[0].numel() if isinstance(weight, Tensor) else 0


@torch.no_grad()
def _sqnr(layer: nn.Module, seen: Seen) -> float | None:
    plain = next(kind for kind in (nn.Linear, nn.Conv2d, Attend) if isinstance(layer, kind))
    exact = plain.forward(layer, *seen.inputs, **seen.options)
    noise = (exact - seen.output).square().mean().item()
    return None if noise == 0 else 10 * math.log10(max(exact.square().mean().item(), 1e-30) / noise)

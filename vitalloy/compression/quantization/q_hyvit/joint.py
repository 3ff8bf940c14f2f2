"""Several grids at once: attention, whose factors meet in its output, and bridge blocks, measured where they end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from vitalloy.compression.calibration import Seen
from vitalloy.compression.quantization.q_hyvit.bridges import Block, Flow
from vitalloy.compression.quantization.q_hyvit.choice import (
    HIGHEST,
    LOWEST,
    SCHEMES,
    Chosen,
    Grid,
    best_factor,
    grids,
)
from vitalloy.compression.quantizers import Uniform
from vitalloy.layers.attention import Attend

MAPS = 2**20  # numbers of attention maps that a search looks at
NEAR = (0.8, 1.2, 9)  # factors that a block tries about the scales that its layers found alone,
TUNED = 2  # under the combinations that do best with these
SOCKETS = ("query_quantizer", "key_quantizer", "value_quantizer", "map_quantizer")


def weighted_error(y: Tensor, target: Tensor, gradient: Tensor) -> Tensor:
    """Mean over rows of the sum over channels; maps and tokens alike, as a sum over images."""
    return ((y - target) * gradient).square().sum() / len(y)


def _tune(
    slots: Sequence[Uniform], error: Callable[[], Tensor], factors: Tensor, rounds: int
) -> tuple[list[Tensor], float]:
    """Scale the steps of `slots` by turns, keeping what lowers the error; returns each one's factor and the error."""
    starts = [slot.scale.detach().clone() for slot in slots]
    now = [torch.ones(1, 1, 1).to(factors) for _ in slots]
    least = error().view(1, 1)
    for _ in range(rounds):
        before = least.clone()
        for i, slot in enumerate(slots):

            def errors(batch: Tensor, slot: Uniform = slot, start: Tensor = starts[i]) -> Tensor:
                found = []
                for factor in batch.flatten():
                    slot.scale.data = start * factor
                    found.append(error())
                return torch.stack(found).view(-1, 1, 1)

            now[i], least = best_factor(errors, factors, now[i], least, 1)
            slot.scale.data = starts[i] * now[i].view(())
        if least >= before:
            break
    return now, float(least)


@torch.no_grad()
def choose_attention(
    layer: Attend,
    seen: Seen,
    ranges: Sequence[tuple[Tensor, Tensor]],
    bits: int,
    zero_point: str,
    steps: int,
    rounds: int,
) -> dict[str, Chosen]:
    """The best grids of q, k, v, and of the softmax map where there is a fourth range, for each scheme.

    The layer, a `QuantizedAttend`, is left without any.
    """
    q, k, v = seen.inputs[:3]
    scale = seen.options.get("scale", seen.options.get("arg3"))
    bias = seen.inputs[3] if len(seen.inputs) > 3 else seen.options.get("bias")
    every = max(q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] // MAPS, 1)
    if bias is not None and bias.ndim == 4 and bias.shape[0] == len(q):
        bias = bias[::every]
    q, k, v, target, gradient = (t[::every] for t in (q, k, v, seen.output, seen.gradient))
    factors = torch.linspace(LOWEST, HIGHEST, max(steps, 2)).to(q)

    def error() -> Tensor:
        return weighted_error(layer(q, k, v, scale=scale, bias=bias), target, gradient)

    found = {}
    for scheme in SCHEMES:
        chosen: list[Grid] = []
        for socket, (low, high) in zip(SOCKETS, ranges, strict=False):
            tried = grids(low, high, bits, scheme, zero_point)
            left = []
            for grid in tried:
                setattr(layer, socket, grid.quantizer())
                left.append(error())
            chosen.append(tried[int(torch.stack(left).argmin())])
            setattr(layer, socket, chosen[-1].quantizer())
        slots = [getattr(layer, socket) for socket, _ in zip(SOCKETS, chosen, strict=False)]
        at, least = _tune(slots, error, factors, rounds)
        found[scheme] = Chosen(None, tuple(g.scaled(f.view(())) for g, f in zip(chosen, at, strict=True)), least)
    clear(layer)
    return found


@torch.no_grad()
def choose_block(
    flow: Flow,
    block: Block,
    values: Mapping[fx.Node, Any],
    targets: Mapping[fx.Node, tuple[Tensor, Tensor]],
    found: Mapping[str, Mapping[str, Chosen]],
    rounds: int,
) -> dict[str, dict[str, Chosen]]:
    """The grids of a block's layers for each combination that all of them take, with the error where the block ends.

    Args:
        values: what the block's inputs are; targets: float value and gradient of its outputs.
        found: what each layer chose alone, by name and combination.
    """
    layers = {name: flow.model.get_submodule(name) for name in block.layers if name in found}
    copies = any(getattr(n.target, "_schema", None) and n.target._schema.is_mutable for n in block.nodes)

    def error() -> Tensor:
        now = {n: v.clone() if copies and isinstance(v, Tensor) else v for n, v in values.items()}
        for node in block.nodes:
            now[node] = flow.call(node, now)
        return torch.stack([weighted_error(now[n], *targets[n]) for n in block.outputs]).sum()

    factors = torch.linspace(*NEAR).to(next(flow.model.parameters()))
    starts: dict[str, dict[str, Chosen]] = {}
    for label in next(f for name, f in found.items() if not isinstance(layers[name], Attend)):
        scheme = label.split("/")[-1]
        alone = {name: found[name][scheme if isinstance(m, Attend) else label] for name, m in layers.items()}
        for name, m in layers.items():
            install(m, alone[name])
        left = float(error())
        starts[label] = {name: chosen._replace(error=left) for name, chosen in alone.items()}
    results = dict(starts)
    for label in sorted(starts, key=lambda c: next(iter(starts[c].values())).error)[:TUNED]:
        slots = [slot for name, m in layers.items() for slot in install(m, starts[label][name])]
        at, least = _tune(slots, error, factors, rounds)
        scaled = iter(f.view(()) for f in at)
        results[label] = {}
        for name, chosen in starts[label].items():
            inputs = tuple(g.scaled(next(scaled)) for g in chosen.inputs)
            weight = chosen.weight and chosen.weight.scaled(next(scaled))
            results[label][name] = Chosen(weight, inputs, least)
    for layer in layers.values():
        clear(layer)
    return results


def install(layer: nn.Module, chosen: Chosen) -> list[Uniform]:
    """Put the grids into the sockets of a simulated layer; returns them, those of inputs first."""
    made = [grid.quantizer() for grid in chosen.inputs]
    if isinstance(layer, Attend):
        for socket, quantizer in zip(SOCKETS, made, strict=False):
            setattr(layer, socket, quantizer)
        return made
    shape = (layer.weight.shape[0], *[1] * (layer.weight.ndim - 1))
    layer.input_quantizer, layer.weight_quantizer = made[0], chosen.weight.quantizer(*shape)
    return [made[0], layer.weight_quantizer]


def clear(layer: nn.Module) -> None:
    """Take all grids out of a simulated layer."""
    for socket in (*SOCKETS, "input_quantizer", "weight_quantizer"):
        if hasattr(layer, socket):
            setattr(layer, socket, nn.Identity())

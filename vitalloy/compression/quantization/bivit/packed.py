"""Inference on packed bits: one bit a weight, sums of signs by exclusive or and counting.

`packed(model)` answers as the trained model does in evaluation mode. Weights are kept as bits. A layer that takes signs
packs its input and counts; a layer with a float input unpacks its signs for the call, and saves memory alone. In
attention, q kᵀ and A v are counted, and the map is compared in whole numbers where there is no bias: a softmax is never
made. Everything runs on the CPU in NumPy, on one thread; nothing is compiled. Do not expect speed: a float product is
vectorised better than these counts, and a linear layer of 384 channels on 197 tokens took longer packed than in float32
(one thread of an Intel Xeon with AVX-512). What is gained is the size.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitalloy.compression.quantization.bivit.bits import WORD, dot_signs, dot_zero_one, pack, unpack
from vitalloy.compression.quantization.bivit.layers import (
    SHARE,
    Binary,
    BinaryAttend,
    BinaryConv2d,
    BinaryLinear,
    attention_map,
)
from vitalloy.errors import CheckpointError, CompressionError
from vitalloy.layers import sockets
from vitalloy.layers.attention import Attend

KEY = "bivit"  # of the packed layers in a file's header


class PackedLinear(nn.Module):
    """scale * (sums of signs) + bias on tokens (..., in) -> (..., out).

    Buffers: `words` (out, ceil(in / 64)) int64, `scale` (out,), `bias` (out,).
    """

    weight_bits = 1

    def __init__(self, in_features: int, out_features: int, activation_bits: int) -> None:
        super().__init__()
        self.in_features, self.activation_bits = in_features, activation_bits
        self.register_buffer("words", torch.zeros(out_features, -(-in_features // WORD), dtype=torch.int64))
        self.register_buffer("scale", torch.zeros(out_features))
        self.register_buffer("bias", torch.zeros(out_features))

    @torch.no_grad()
    def take(self, layer: Binary) -> PackedLinear:
        """Pack the weight of a binary layer."""
        self.words = torch.from_numpy(pack(layer.signs().flatten(1)).view(np.int64))
        self.scale, self.bias = layer.channel_scale().flatten().clone(), layer.bias.detach().clone()
        return self

    def spec(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "in_features": self.in_features,
            "out_features": len(self.scale),
            "activation_bits": self.activation_bits,
        }

    def bits(self) -> np.ndarray:
        return self.words.numpy().view(np.uint64)

    def sums(self, x: Tensor) -> Tensor:
        """The whole numbers Σ sign(x) · sign(w), as (..., out) in x's type."""
        return torch.from_numpy(dot_signs(pack(x.detach()), self.bits(), self.in_features)).to(x)

    def forward(self, x: Tensor) -> Tensor:
        if self.activation_bits > 1:
            return F.linear(x, unpack(self.bits(), self.in_features).to(x)) * self.scale + self.bias
        rows = x.reshape(-1, x.shape[-1])
        return self.sums(rows).view(*x.shape[:-1], -1) * self.scale + self.bias


class PackedConv2d(PackedLinear):
    """The same for a 1x1 convolution: maps (B, in, H, W) -> (B, out, H', W')."""

    def __init__(self, in_features: int, out_features: int, activation_bits: int, stride: tuple[int, int]) -> None:
        super().__init__(in_features, out_features, activation_bits)
        self.stride = tuple(stride)

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), "stride": self.stride}

    def forward(self, x: Tensor) -> Tensor:
        scale, bias = self.scale.view(-1, 1, 1), self.bias.view(-1, 1, 1)
        if self.activation_bits > 1:
            kernel = unpack(self.bits(), self.in_features).to(x)[..., None, None]
            return F.conv2d(x, kernel, None, self.stride) * scale + bias
        x = x[:, :, :: self.stride[0], :: self.stride[1]].movedim(1, -1)
        sums = self.sums(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)
        return sums.movedim(-1, 1) * scale + bias


class PackedAttend(Attend):
    """`BinaryAttend` on bits."""

    weight_bits, activation_bits = 1, 1

    def __init__(self, softmax: bool) -> None:
        super().__init__()
        self.softmax = softmax
        self.lowest: dict[int, Tensor] = {}

    def take(self, _attend: BinaryAttend) -> PackedAttend:
        return self

    def spec(self) -> dict[str, Any]:
        return {"softmax": self.softmax}

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, bias: Tensor | None = None
    ) -> Tensor:
        width = q.shape[-1]
        products = torch.from_numpy(dot_signs(pack(q.detach()), pack(k.detach()), width))
        if bias is not None:
            ones = attention_map(products.to(q), width, bias.detach(), self.softmax)
        elif self.softmax:
            ones = products >= self.thresholds(width)[products.amax(-1, keepdim=True).long() + width]
        else:
            ones = products > 0
        return torch.from_numpy(dot_zero_one(pack(ones), pack(v.detach().mT))).to(q)

    def thresholds(self, width: int) -> Tensor:
        """The lowest product that becomes 1, for each largest product of a row from -width to width: (2 width + 1,).

        In real numbers it is largest - floor(ln 4 * sqrt(width)); taken from the very float32 comparison that the
        simulation makes, so that the two never differ by a rounding.
        """
        if width not in self.lowest:
            logits = torch.arange(-width, width + 1, dtype=torch.float32) * width**-0.5
            reached = logits >= logits[:, None] - math.log(1 / SHARE)
            self.lowest[width] = (reached.int().argmax(-1) - width).int()
        return self.lowest[width]


KINDS = {BinaryLinear: PackedLinear, BinaryConv2d: PackedConv2d, BinaryAttend: PackedAttend}
PACKED = {kind.__name__: kind for kind in KINDS.values()}


def packed(model: nn.Module) -> nn.Module:
    """A copy of a binary model that holds and uses bits, on the CPU; it is called as the model is.

    Raises:
        CompressionError: no binary layers, float weights among them, or a sign of zero that a bit cannot hold.
    """
    layers = sockets.find(model, tuple(KINDS))
    if not layers:
        raise CompressionError(f"{type(model).__name__} has no binary layers to pack: quantize it with bivit first.")
    for name, layer in layers.items():
        if layer.weight_bits > 1:
            raise CompressionError(f"{name} has a float weight, which cannot be packed: use weight_bits=1.")
        if layer.sign_of_zero == 0:
            raise CompressionError(f"{name} takes 0 for the sign of 0, which one bit cannot hold: use sign_of_zero=-1.")

    def make(_name: str, layer: nn.Module) -> nn.Module:
        if isinstance(layer, BinaryAttend):
            return PackedAttend(layer.softmax).take(layer)
        size = {"in_features": layer.weight.shape[1], "out_features": len(layer.weight)}
        more = {"stride": layer.stride} if isinstance(layer, BinaryConv2d) else {}
        return KINDS[type(layer)](**size, activation_bits=layer.activation_bits, **more).take(layer)

    small = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    sockets.replace(small, tuple(KINDS), make)
    return small


def packed_bytes(model: nn.Module) -> int:
    """Bytes of a packed model's tensors: words, scales and all that stayed float; a shared tensor once."""
    return sum(t.numel() * t.element_size() for t in _tensors(model).values())


def save_packed(model: nn.Module, path: str | Path) -> Path:
    """Write a packed model as safetensors; the header says which layers are packed and how. Returns the path."""
    layers = {name: [type(m).__name__, m.spec()] for name, m in sockets.find(model, tuple(PACKED.values())).items()}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in _tensors(model).items()}
    safetensors.torch.save_file(state, path, metadata={"format": "pt", KEY: json.dumps(layers)})
    return path


def load_packed(model: nn.Module, path: str | Path) -> nn.Module:
    """Read a packed model into a float model of the same build, in place, with whatever was folded folded again.

    Raises:
        CheckpointError: no packed file, or one of another model.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            layers = json.loads((file.metadata() or {})[KEY])
        state = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: not a packed BiViT model; save_packed writes them.") from error
    try:
        made: dict[nn.Module, nn.Module] = {}
        for name, (kind, spec) in layers.items():
            old = model.get_submodule(name)
            model.set_submodule(name, made.setdefault(old, PACKED[kind](**spec)))
        own = _tensors(model)  # copied one by one: a folded model takes no state dict
        if set(own) != set(state):
            raise KeyError(min(set(own) ^ set(state)))
        with torch.no_grad():
            for name, tensor in own.items():
                if tensor.shape != state[name].shape:
                    raise ValueError(f"{name}: {tuple(state[name].shape)}")
                tensor.copy_(state[name])
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: holds another model than this {type(model).__name__} ({error}); build it as it was quantized."
        ) from error
    return model.eval().requires_grad_(False)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model without second names of the same tensor."""
    kept: dict[tuple[int, tuple[int, ...]], tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        kept.setdefault((tensor.data_ptr() or id(tensor), tuple(tensor.shape)), (name, tensor))
    return dict(kept.values())

"""Layers whose number format can be set at any time: the simulated layers of the library with a format in each socket.

The scale of a tensor is its own largest magnitude, taken anew in every pass (activations: of the batch), as in the
authors' open code. `freeze` makes the scales of integer formats constants, which exported integer layers need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from vitalloy.compression.quantizers import Uniform
from vitalloy.compression.simulated import QuantizedConv2d, QuantizedLinear
from vitalloy.errors import CompressionError, suggest

from .formats import TINY, Format, fake_quantize, pair_name, parse, parse_pair

Layer = QuantizedLinear | QuantizedConv2d
_SIBLINGS = {nn.Linear: QuantizedLinear, nn.Conv2d: QuantizedConv2d}

#: The dimension along which a scale's largest magnitude is taken; None: one scale for the tensor.
WEIGHT_SCALES = {"tensor": None, "channel": 1}
ACTIVATION_SCALES = {"tensor": None, "token": -1}


class FormatQuantizer(nn.Module):
    """Rounds what passes to `number_format`; see `fake_quantize` for `dim` and `factor`."""

    def __init__(self, number_format: str = "float", dim: int | None = None, factor: float = 1.0) -> None:
        super().__init__()
        self.number_format, self.dim, self.factor = parse(number_format), dim, factor

    @property
    def bits(self) -> int:
        return self.number_format.bits

    def forward(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self.number_format, self.dim, self.factor)

    def extra_repr(self) -> str:
        return self.number_format.name


def searchable(
    model: nn.Module,
    exclude: Sequence[str] = (),
    *,
    weight_scale: str = "tensor",
    activation_scale: str = "tensor",
    weight_factor: float = 1.0,
    activation_factor: float = 1.0,
) -> dict[str, Layer]:
    """Give every plain nn.Linear and nn.Conv2d of a model a format, in place ("float" at first); returns them by name.

    Args:
        exclude: names of layers to leave alone; `*` stands for anything ("head", "stages.0.*").
        weight_scale: "tensor", or "channel": the largest magnitude along dimension 1 of the weight. In a linear layer
            that is one scale an output; in a convolution one an output *and kernel position*, as published.
        activation_scale: "tensor", or "token": along the last dimension of the input.
        weight_factor, activation_factor: multiply the largest magnitudes.

    Raises:
        CompressionError: an unknown kind of scale, a pattern that fits no layer, or a model without such layers.
    """
    dims = []
    for kind, table in ((weight_scale, WEIGHT_SCALES), (activation_scale, ACTIVATION_SCALES)):
        if kind not in table:
            raise CompressionError(f"{kind!r} is no kind of scale here: choose {' or '.join(map(repr, table))}.")
        dims.append(table[kind])
    found = {name: layer for name, layer in model.named_modules() if type(layer) in _SIBLINGS}
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in found):
            raise CompressionError(f"exclude={pattern!r} fits no layer of the model.{suggest(pattern, found)}")
    layers = {name: layer for name, layer in found.items() if not any(fnmatchcase(name, p) for p in exclude)}
    if not layers:
        raise CompressionError("The model has no linear layer or convolution to quantize.")
    for layer in layers.values():
        layer.__class__ = _SIBLINGS[type(layer)]  # same parameters and hooks; only the forward pass differs
        layer.weight_quantizer = FormatQuantizer(dim=dims[0], factor=weight_factor)
        layer.input_quantizer = FormatQuantizer(dim=dims[1], factor=activation_factor)
        layer.format = "float"
    return layers


def set_format(layer: Layer, name: str) -> None:
    """Let a layer compute in a format, "INT4", or in one for weights and one for activations, "INT4/INT8"."""
    weight, activation = parse_pair(name)
    layer.weight_quantizer.number_format, layer.input_quantizer.number_format = weight, activation
    layer.format = pair_name(weight, activation)


def set_formats(layers: Mapping[str, Layer], formats: Mapping[str, str]) -> None:
    """Set many; layers that are not named become "float".

    Raises:
        CompressionError: a name that is no layer, or a format that does not exist.
    """
    for name in formats:
        if name not in layers:
            raise CompressionError(
                f"formats names {name!r}, which is no quantizable layer of this model.{suggest(name, layers)} "
                f"It has {len(layers)}, from {next(iter(layers))!r} to {list(layers)[-1]!r}."
            )
    for name, layer in layers.items():
        set_format(layer, formats.get(name, "float"))


@torch.no_grad()
def freeze(model: nn.Module, layers: Iterable[Layer], images: Tensor, batch_size: int = 32) -> None:
    """Put constant scales into layers of integer formats: of the weights as they are, of the activations of `images`.

    Layers with a float format keep their changing scales. `images` are (N, C, H, W).
    """
    top: dict[nn.Module, Tensor] = {}

    def look(quantizer: FormatQuantizer, args: tuple[Tensor, ...], _out: Tensor) -> None:
        now = args[0].abs().amax() * quantizer.factor
        top[quantizer] = torch.maximum(top.get(quantizer, now), now)

    layers = [layer for layer in layers if _is_integer(layer)]
    for layer in layers:
        if layer.input_quantizer.dim is not None:
            raise CompressionError("One scale a token cannot be constant: use activation_scale='tensor'.")
    hooks = [layer.input_quantizer.register_forward_hook(look) for layer in layers]
    try:
        for batch in images.split(batch_size):
            model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    for layer in layers:
        weight, quantizer, seen = layer.weight.abs(), layer.weight_quantizer, layer.input_quantizer
        absmax = weight.amax() if quantizer.dim is None else weight.amax(quantizer.dim, keepdim=True)
        layer.weight_quantizer = _constant(quantizer.number_format, absmax * quantizer.factor)
        if seen in top:  # else the layer never runs
            layer.input_quantizer = _constant(seen.number_format, top[seen])


def _is_integer(layer: Layer) -> bool:
    sockets = (layer.weight_quantizer, layer.input_quantizer)
    return all(s.number_format.name.startswith("INT") for s in sockets)


def _constant(number_format: Format, absmax: Tensor) -> Uniform:
    return Uniform(number_format.bits, absmax.clamp_min(TINY) / number_format.largest, signed=True)


def grouped(layers: Iterable[str], model: nn.Module, per: str | Sequence[str]) -> dict[str, list[str]]:
    """The layers that share a decision, by the name of the decision.

    Args:
        per: "layer"; "model", a single decision; "block": layers inside the innermost element of a list or sequence
            that holds several of them decide together, such as "blocks.3", the rest alone; or a list of patterns with
            `*`, one a decision, of which every layer must fit exactly one.

    Raises:
        CompressionError: an unknown word, or a layer that fits no pattern or several.
    """
    names = list(layers)
    if not isinstance(per, str):
        return _by_patterns(names, per)
    if per not in ("layer", "block", "model"):
        raise CompressionError(f"per={per!r} is unknown: use 'layer', 'block', 'model' or a list of patterns.")
    lists = {n for n, m in model.named_modules() if isinstance(m, (nn.ModuleList, nn.Sequential))}
    key: dict[str, Callable[[str], str]] = {
        "layer": lambda name: name,
        "model": lambda _: "model",
        "block": lambda name: _block(name, names, lists),
    }
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(key[per](name), []).append(name)
    return groups


def _block(name: str, names: list[str], lists: set[str]) -> str:
    above = name
    while "." in above:
        above = above.rpartition(".")[0]
        parent = above.rpartition(".")[0]
        if parent in lists and parent != above and sum(n.startswith(f"{above}.") for n in names) > 1:
            return above
    return name


def _by_patterns(names: list[str], patterns: Sequence[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {pattern: [] for pattern in patterns}
    for name in names:
        fits = [pattern for pattern in patterns if fnmatchcase(name, pattern)]
        if len(fits) != 1:
            raise CompressionError(f"Layer {name!r} fits {fits or 'none'} of the patterns in per: it must fit one.")
        groups[fits[0]].append(name)
    return {pattern: inside for pattern, inside in groups.items() if inside}


def formats_of(layers: Mapping[str, Any]) -> dict[str, str]:
    """The bit map: name -> format, of every layer."""
    return {name: layer.format for name, layer in layers.items()}

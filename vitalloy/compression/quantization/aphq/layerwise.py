"""Layer-wise calibration of any model: every simulated layer gets the grids that a search on samples finds.

The authors search on everything that 128 images bring; here a layer sees up to ROWS rows of it, drawn at random, which
makes the search affordable on a CPU and its time independent of the image size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitalloy.compression.norm_folding import fold, norms_and_layers
from vitalloy.compression.quantization.aphq import search
from vitalloy.compression.quantizers import Uniform
from vitalloy.compression.simulated import QuantizedAttend, QuantizedConv2d, QuantizedLinear

ROWS = 1024  # rows of a layer's input that a search sees
MAPS, QUERIES = 16, 32  # images whose attention it sees, and queries of each
CENTRAL_ZERO = 4  # bits up to which the zero points tried for linear layers are all there are


def calibrate(
    model: nn.Module,
    layers: dict[str, nn.Module],
    images: Tensor,
    weights: int,
    activations: int,
    *,
    rounds: int = 3,
    batch_size: int = 32,
    seed: int = 0,
    progress: Callable[[], None] | None = None,
) -> None:
    """Put calibrated grids into the sockets of the layers, in place; the float function is folded but not changed.

    A layer that no image reaches stays float, and so does the input of a convolution that takes the images themselves.
    Linear layers are searched as published up to 4 bits; above, where the zero points tried lie within 8 codes of the
    middle and a one-sided input would lose half its range, they are searched as convolutions are.

    Args:
        layers: by name, as `simulate` returns them; their quantizers are identities.
        progress: is called after every layer.
    """
    if weights == activations:
        _fold_norms(model, images, activations, batch_size, seed)
    seen = _Samples(model, layers.values(), images, batch_size, seed).taken
    for layer in layers.values():
        if layer in seen and isinstance(layer, QuantizedAttend):
            _calibrate_attend(layer, *seen[layer], activations, rounds)
        elif layer in seen:
            _calibrate_weighted(layer, *seen[layer], weights, activations, rounds)
        if progress:
            progress()


def _fold_norms(model: nn.Module, images: Tensor, bits: int, batch_size: int, seed: int) -> None:
    pairs = norms_and_layers(model, images)
    seen = _Samples(model, [layers[0] for _, layers in pairs], images, batch_size, seed).taken
    for norm, layers in pairs:
        rows = seen[layers[0]][0]  # (1, R, channels * kernel)
        channels = len(norm.weight)
        x = rows[0].unflatten(-1, (channels, -1)).movedim(1, -1).flatten(0, 1)
        grids = search.search_channels(x, bits)
        fold(norm, layers, grids.scale, grids.zero_point)


def _calibrate_weighted(
    layer: QuantizedLinear | QuantizedConv2d, x: Tensor, takes_images: bool, weights: int, activations: int, rounds: int
) -> None:
    groups = len(x)
    weight = layer.weight.detach().reshape(groups, len(layer.weight) // groups, -1)
    of_input = None if takes_images else activations
    if isinstance(layer, QuantizedLinear) and max(weights, activations) <= CENTRAL_ZERO and of_input:
        rows, inputs = search.search_linear(x, weight, weights, activations, rounds)
    else:
        rows, inputs = search.search_ranges(x, weight, weights, of_input)
    shape = (-1, *[1] * (layer.weight.ndim - 1))
    layer.weight_quantizer = Uniform(weights, rows.scale.view(shape), rows.zero_point.view(shape))
    if inputs:
        layer.input_quantizer = Uniform(activations, inputs.scale[0], inputs.zero_point[0])


def _calibrate_attend(
    layer: QuantizedAttend, q: Tensor, k: Tensor, v: Tensor, maps: Tensor, bits: int, rounds: int
) -> None:
    of_logits = search.search_product(q, k, bits, rounds)
    of_output = search.search_product(maps, v.mT, bits, rounds)
    places = ("query_quantizer", "key_quantizer", "map_quantizer", "value_quantizer")
    for place, grids in zip(places, of_logits + of_output, strict=True):
        setattr(layer, place, Uniform(bits, grids.scale[:, None, None], grids.zero_point[:, None, None]))


class _Samples:
    """A pass over the images that keeps some rows of what each layer takes.

    `taken` has (rows (groups, R, K), whether the layer takes the images themselves) for a layer with a weight, and
    (q, k, v, softmax map) with some of the queries for attention.
    """

    def __init__(self, model: nn.Module, layers: Any, images: Tensor, batch_size: int, seed: int) -> None:
        self.count, self.generator = len(images), torch.Generator().manual_seed(seed)
        self.parts: dict[nn.Module, list[tuple[Tensor, ...]]] = {}
        self.of_images: set[nn.Module] = set()
        hooks = [layer.register_forward_pre_hook(self._keep, with_kwargs=True) for layer in layers]
        try:
            with torch.no_grad():
                for self.batch in images.split(batch_size):
                    model(self.batch)
        finally:
            for hook in hooks:
                hook.remove()
        self.taken = {layer: self._joined(layer) for layer in self.parts}

    def _keep(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls = self.parts.setdefault(layer, [])
        if isinstance(layer, QuantizedAttend):
            found = self._attention(*args, **kwargs)
            if calls and [x.shape[1:] for x in found] != [x.shape[1:] for x in calls[0]]:
                return  # another call with another number of tokens
            calls.append(found)
        else:
            if args[0].shape == self.batch.shape and torch.equal(args[0], self.batch):
                self.of_images.add(layer)
            wanted = math.ceil(ROWS * len(self.batch) / self.count)
            patches = isinstance(layer, QuantizedConv2d)
            calls.append((self._patches(layer, args[0], wanted) if patches else self._rows(args[0], wanted)[None],))

    def _joined(self, layer: nn.Module) -> tuple[Any, ...]:
        if isinstance(layer, QuantizedAttend):
            return tuple(map(torch.cat, zip(*self.parts[layer], strict=True)))
        return torch.cat([rows for (rows,) in self.parts[layer]], dim=1), layer in self.of_images

    def _some(self, count: int, wanted: int) -> Tensor:
        """Up to `wanted` of the numbers below `count`, drawn without replacement, in order."""
        return torch.randperm(count, generator=self.generator)[:wanted].sort().values

    def _rows(self, x: Tensor, wanted: int) -> Tensor:
        rows = x.flatten(0, -2)
        return rows[self._some(len(rows), wanted).to(x.device)]

    def _patches(self, conv: nn.Conv2d, x: Tensor, wanted: int) -> Tensor:
        """Patches (groups, P, in / groups * kernel) of a convolution's input, padding included."""
        mode = {"zeros": "constant"}.get(conv.padding_mode, conv.padding_mode)
        x = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
        for dim in (0, 1):
            reach = conv.dilation[dim] * (conv.kernel_size[dim] - 1) + 1
            x = x.unfold(2 + dim, reach, conv.stride[dim])[..., :: conv.dilation[dim]]
        batch, _, high, wide = x.shape[:4]
        at = self._some(batch * high * wide, wanted).to(x.device)
        chosen = x[at // (high * wide), :, at // wide % high, at % wide]  # (P, C, kh, kw)
        return chosen.unflatten(1, (conv.groups, -1)).flatten(2).movedim(1, 0)

    def _attention(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        share = MAPS / self.count  # of the images; of their windows, where those lie in the first axis
        wanted = max(math.ceil(share * len(self.batch)), 1)
        some = self._some(len(q), wanted).to(q.device)
        queries = self._some(q.shape[-2], QUERIES).to(q.device)
        q_, k_, v_ = q[some][..., queries, :], k[some], v[some]
        logits = q_ @ k_.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        if bias is not None:
            bias = bias.expand(*bias.shape[:-2], q.shape[-2], k.shape[-2])[..., queries, :]
            logits = logits + (bias[some] if bias.ndim == q.ndim and len(bias) == len(q) > 1 else bias)
        return q_, k_, v_, logits.softmax(-1)

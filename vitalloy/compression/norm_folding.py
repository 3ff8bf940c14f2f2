"""One step for all channels of what leaves a norm: the norm and the layers behind it absorb the differences.

A layer norm's channels differ in range by an order of magnitude, so one step for all of them wastes most codes. With a
step and zero point (s, z) for each channel, and their means (s', z'), the norm's output x becomes x / r - b with
r = s / s' and b = (z' - z) s', whose grid is (s', z') in every channel. The linear layers behind it take r into their
weights and W b into their biases, so that the model computes the same function.

Scale reparameterization of RepQ-ViT (Li et al., ICCV 2023, arXiv 2212.08254), which APHQ-ViT (Wu et al., CVPR 2025,
arXiv 2504.02508) uses too. They name the pairs of layers of ViT and Swin; here they are found in any model: a layer is
behind a norm if only moves of values lie between, and the pair counts if folding it leaves the model's answer as it is.
Steps and answers are compared in float64. The common zero point is rounded, as in APHQ-ViT.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from vitalloy.compression.wiring import makers

Norm = nn.LayerNorm | nn.GroupNorm
_SAME = 1e-6  # of the logits' spread, in float64; folding moves them by 1e-12


def norms_and_layers(model: nn.Module, images: Tensor) -> list[tuple[Norm, list[nn.Module]]]:
    """The norms with only linear layers, and convolutions without padding or groups, behind them; and those layers.

    Args:
        model: in evaluation mode, its quantizers still identities; not changed.
        images: (N, C, H, W); the first two are looked at.
    """
    probe = copy.deepcopy(model).double()
    images = images[:2].double()
    pairs = _candidates(probe, images)
    own = dict(model.named_modules())
    names = {module: name for name, module in probe.named_modules()}
    kept = _unchanging(probe, images, pairs)
    return [(own[names[norm]], [own[names[layer]] for layer in layers]) for norm, layers in kept]


def _candidates(model: nn.Module, images: Tensor) -> list[tuple[Norm, list[nn.Module]]]:
    """Norms, and the foldable layers that take the output of one of them and of nothing else."""
    behind: dict[nn.Module, list[nn.Module]] = {}
    for layer, (found, *_) in makers(model, images, _has_channels, _takes_channels).items():
        norm = next(iter(found))
        if len(found) == 1 and norm is not None and layer.weight.shape[1] == len(norm.weight):
            behind.setdefault(norm, []).append(layer)
    return list(behind.items())


def _has_channels(module: nn.Module) -> bool:
    return isinstance(module, Norm) and isinstance(module.weight, nn.Parameter) and module.weight.ndim == 1


def _takes_channels(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.padding in ((0, 0), "valid")
    return isinstance(module, nn.Linear)


@torch.no_grad()
def _unchanging(
    model: nn.Module, images: Tensor, pairs: list[tuple[Norm, list[nn.Module]]]
) -> list[tuple[Norm, list[nn.Module]]]:
    """Those of the pairs that can be folded without changing the answer; they are left folded."""
    before = model(images)
    if not pairs or _folds(model, images, pairs, before):
        return pairs
    if len(pairs) == 1:
        return []
    half = len(pairs) // 2
    return _unchanging(model, images, pairs[:half]) + _unchanging(model, images, pairs[half:])


def _folds(model: nn.Module, images: Tensor, pairs: list[tuple[Norm, list[nn.Module]]], before: Tensor) -> bool:
    parts = [part for norm, layers in pairs for part in (norm, *layers)]
    saved = [(part, part.weight.clone(), None if part.bias is None else part.bias.clone()) for part in parts]
    for norm, layers in pairs:
        steps = torch.linspace(0.5, 1.5, len(norm.weight)).to(norm.weight)
        fold(norm, layers, steps, steps * 20)
    if (model(images) - before).abs().max() <= _SAME * before.std():
        return True
    for part, weight, bias in saved:
        part.weight.copy_(weight)
        part.bias = None if bias is None else nn.Parameter(bias)
    return False


@torch.no_grad()
def fold(
    norm: Norm, layers: Iterable[nn.Module], scale: Tensor, zero_point: Tensor, common_zero: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Give all channels of a norm's output one step and zero point, in place.

    A norm or layer without bias gets one. A channel that hardly varies is stretched at most a thousandfold.

    Args:
        norm: with C channels.
        layers: the linear layers and unpadded convolutions that take its output; all of them.
        scale, zero_point: (C,), positive steps and codes of 0.
        common_zero: the common zero point; the rounded mean when None.

    Returns:
        The common step and zero point, scalars.
    """
    steps, zeros = scale.double(), zero_point.double()
    step = steps.mean()
    zero = zeros.mean().round() if common_zero is None else common_zero.double()
    ratio, shift = (steps / step).clamp_min(1e-3), (zero - zeros) * step
    norm.weight.copy_(norm.weight / ratio)
    _set_bias(norm, (0 if norm.bias is None else norm.bias) / ratio - shift)
    for layer in layers:
        weight = layer.weight.double() * ratio.view(1, -1, *[1] * (layer.weight.ndim - 2))
        moved = weight.flatten(2).sum(2) if weight.ndim > 2 else weight
        _set_bias(layer, (0 if layer.bias is None else layer.bias) + moved @ shift)
        layer.weight.copy_(weight)
    return step.to(scale), zero.to(scale)


def _set_bias(module: nn.Module, value: Tensor) -> None:
    if module.bias is None:
        module.bias = nn.Parameter(value.to(module.weight), requires_grad=module.weight.requires_grad)
    else:
        module.bias.copy_(value)

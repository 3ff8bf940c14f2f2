"""Folding for deployment: norms, scales and parallel branches disappear into the linear maps beside them.

Each function returns one layer that computes what its arguments compute one after the other, in evaluation mode.
Sums are made in float64. A part of a backbone that can be folded has a method `fuse()`, which folds it in place and
may be called again; `fuse(model)` calls them all.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

LAYOUT = {4: torch.channels_last, 5: torch.channels_last_3d}
Linear = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


def fuse(model: nn.Module) -> nn.Module:
    """Fold every part of a model that knows how, and every batch norm behind a linear map in a `nn.Sequential`.

    In place; the model is left in evaluation mode. Parameters change names and number: load weights first.
    """
    model.eval()
    for part in [*model.modules()][:0:-1]:  # what is inside comes first
        if isinstance(part, nn.Sequential):
            _fuse_neighbours(part)
        if callable(own := getattr(part, "fuse", None)):
            own()
    for part in model.modules():
        if isinstance(part, nn.Conv2d | nn.Conv3d):  # laid out as the maps are, or every call reorders the weight
            part.to(memory_format=LAYOUT[part.weight.ndim])
    return model


def _fuse_neighbours(parts: nn.Sequential) -> None:
    for i in range(len(parts) - 1):
        if isinstance(parts[i], Linear) and isinstance(parts[i + 1], _BatchNorm):
            parts[i], parts[i + 1] = fold_norm(parts[i], parts[i + 1]), nn.Identity()


def scale_and_shift(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """A batch norm in evaluation mode as x * scale + shift, each (C,) in float64.

    Raises:
        ValueError: the norm keeps no running statistics: it is no fixed map.
    """
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("a batch norm without running statistics cannot be folded")
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.double()


@torch.no_grad()
def fold_norm(layer: Linear, norm: _BatchNorm) -> Linear:
    """norm(layer(x)) as one layer."""
    scale, shift = scale_and_shift(norm)
    return _changed(layer, _rows(layer, scale), shift + scale * _bias(layer))


@torch.no_grad()
def fold_norm_before(norm: _BatchNorm, layer: Linear) -> Linear:
    """layer(norm(x)) as one layer.

    Raises:
        ValueError: the layer pads its input: zeros would be normalized too.
    """
    if not isinstance(layer, nn.Linear) and any(layer.padding):
        raise ValueError("a norm cannot be folded into the padded convolution behind it")
    scale, shift = scale_and_shift(norm)
    groups = getattr(layer, "groups", 1)
    rows, width = layer.weight.shape[0] // groups, layer.weight.shape[1]
    weight = layer.weight.double().reshape(groups, rows, width, -1)
    scale, shift = scale.view(groups, 1, -1, 1), shift.view(groups, 1, -1, 1)
    bias = _bias(layer) + (weight * shift).sum((2, 3)).flatten()
    return _changed(layer, (weight * scale).reshape(layer.weight.shape), bias)


@torch.no_grad()
def fold_scale(layer: Linear, scale: Tensor) -> Linear:
    """scale * layer(x) as one layer; scale has one entry, or one for each output channel in any shape."""
    scale = scale.double().flatten()
    return _changed(layer, _rows(layer, scale), scale * _bias(layer))


def _bias(layer: Linear) -> Tensor:
    if layer.bias is None:
        return layer.weight.new_zeros(len(layer.weight), dtype=torch.float64)
    return layer.bias.double()


def _rows(layer: Linear, scale: Tensor) -> Tensor:
    return layer.weight.double() * scale.view(-1, *[1] * (layer.weight.dim() - 1))


def _changed(layer: Linear, weight: Tensor, bias: Tensor) -> Linear:
    """A copy of the layer with another weight and bias, in its dtype and memory format."""
    new = copy.deepcopy(layer)
    new.weight.copy_(weight)
    new.bias = nn.Parameter(bias.to(new.weight.dtype), requires_grad=new.weight.requires_grad)
    return new

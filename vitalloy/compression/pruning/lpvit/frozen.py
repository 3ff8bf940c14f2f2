"""Pruned weights stay zero: what training a masked model needs, and channels that nothing reads any more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitalloy.compression.pruning.lpvit.cutting import Group, cut, kept_channels, query_scales, removed


class ZerosStay:
    """A hook of a weight: where it is zero its gradient is too, and so is what any common optimizer does to it."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, gradient: Tensor) -> Tensor:
        return gradient * (self.weight.detach() != 0)


def keep_zeros(model: nn.Module, layers: Sequence[str]) -> None:
    """Keep the zeros in the weights of these layers whenever the model is trained, its copies too.

    The layers stay plain ones: gradients are hooked before each pass in training mode, as a copied weight has no hooks.
    """
    model.pruned_layers = list(layers)
    if layers and _hook_weights not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_hook_weights)


def _hook_weights(model: nn.Module, _args: Any) -> None:
    if not (model.training and torch.is_grad_enabled()):
        return
    for name in model.pruned_layers:
        weight = model.get_submodule(name).weight
        hooks = (weight._backward_hooks or {}).values()
        if weight.requires_grad and not any(isinstance(hook, ZerosStay) for hook in hooks):
            weight.register_hook(ZerosStay(weight))


@torch.no_grad()
def empty_channels(model: nn.Module, groups: Sequence[Group]) -> dict[str, dict[str, int]]:
    """Take out, in place, the channels that no weight reads, as many in every head; returns the new channel counts."""
    pairs, scales = [], {}
    for group in groups:
        part = group.parts[0]
        if group.kind not in ("hidden", "values"):
            continue
        used = torch.zeros(part.shape, dtype=torch.bool)
        for member in part.scored:
            weight = model.get_submodule(member.layer).weight
            used |= (weight != 0).transpose(0, 1).flatten(1).any(1).cpu()[member.table]
        count = int((~used).sum(1).min())
        if 0 < count < group.width:
            units = [used.float().argsort(dim=1, stable=True)[:, :count]]
            pairs += removed(group, units)
            scales |= query_scales(group, units)
    kept = kept_channels(model, pairs)
    cut(model, kept, scales)
    return {name: {side: len(index) for side, index in sides.items()} for name, sides in kept.items()}

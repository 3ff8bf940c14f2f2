"""Structural re-parameterisation: several parallel branches while training, one linear map for deployment.

Sums of convolutions, each with its batch norm, are one convolution in evaluation mode. A kernel of several groups is
block-diagonal among all channels, a smaller kernel sits at the centre of a larger one, and an identity is a kernel too.
The merged layer computes what the branches do; a branch of one group already contains what the others can express, so
the branches change how a layer trains and not what it can be.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitalloy.layers.conv_norm import ConvNorm
from vitalloy.layers.fusion import fuse, scale_and_shift
from vitalloy.layers.tokens import to_map, to_tokens

Branch = ConvNorm | nn.BatchNorm2d


def expand_groups(kernel: Tensor, groups: int, target: int = 1) -> Tensor:
    """The kernel of a convolution with fewer groups that computes the same.

    Args:
        kernel: (out, in / groups, ...), of a convolution with `groups` groups.
        target: wanted groups, a divisor of `groups`; 1 makes the kernel dense.

    Returns:
        (out, in / target, ...), zero where an output did not see an input.
    """
    if groups % target:
        raise ValueError(f"{target} groups cannot hold {groups}")
    ratio = groups // target
    blocks = kernel.unflatten(0, (target, ratio, -1))  # (target, ratio, out / groups, in / groups, ...)
    wide = kernel.new_zeros(*blocks.shape[:3], ratio, *blocks.shape[3:])
    at = torch.arange(ratio)
    wide[:, at, :, at] = blocks.transpose(0, 1)  # a block sees the inputs of its own number
    return wide.flatten(3, 4).flatten(0, 2)


@torch.no_grad()
def merge(branches: Sequence[Branch], kernel: int = 1, groups: int = 1) -> tuple[Tensor, Tensor]:
    """The weight and bias of one convolution that is the sum of the branches, in float64.

    Args:
        branches: convolutions with their norms (folded or not) and, for an identity, norms alone. All have stride 1
            and keep the size of the map.
        kernel: side of the merged kernel, at least that of every branch.
        groups: of the merged convolution, a divisor of those of every branch.

    Returns:
        Weight (out, in / groups, kernel, kernel) and bias (out,).
    """
    parts = [_as_kernel(branch) for branch in branches]
    weight = sum(_centred(expand_groups(part, own, groups), kernel) for part, _, own in parts)
    return weight, sum(bias for _, bias, _ in parts)


def _as_kernel(branch: Branch) -> tuple[Tensor, Tensor, int]:
    """A branch as kernel, bias and number of groups."""
    if isinstance(branch, nn.BatchNorm2d):
        scale, shift = scale_and_shift(branch)
        return scale.view(-1, 1, 1, 1), shift, len(scale)
    branch = copy.deepcopy(branch).double()
    branch.fuse()
    return branch.conv.weight, branch.conv.bias, branch.conv.groups


def _centred(weight: Tensor, side: int) -> Tensor:
    margin = (side - weight.shape[-1]) // 2
    return F.pad(weight, [margin] * 4)


class MultiGroupLinear(nn.Module):
    """A 1x1 convolution as the sum of several with different numbers of groups; an `nn.Linear` after `fuse()`.

    Args:
        groups: one branch each, a 1x1 convolution without bias and its norm.
        identity: one more branch, a norm of the input itself, where `in_chans` equals `out_chans`.
    """

    def __init__(self, in_chans: int, out_chans: int, groups: Sequence[int] = (1, 2, 4), identity: bool = True) -> None:
        super().__init__()
        branches: list[Branch] = [ConvNorm(in_chans, out_chans, groups=g) for g in groups]
        if identity and in_chans == out_chans:
            branches.append(nn.BatchNorm2d(in_chans))
        self.branches = nn.ModuleList(branches)
        self.linear: nn.Linear | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_chans, H, W) -> (B, out_chans, H, W)."""
        if self.linear is not None:
            return to_map(self.linear(to_tokens(x)), x.shape[-2:])
        return add_up(self.branches, x)

    def fuse(self) -> None:
        if self.linear is None:
            weight, bias = merge(self.branches)
            like = next(self.parameters())
            self.linear = nn.utils.skip_init(
                nn.Linear, weight.shape[1], weight.shape[0], dtype=like.dtype, device=like.device
            )
            _fill(self.linear, weight.flatten(1), bias)
            self.branches = nn.ModuleList()


class ChannelScale(nn.Conv2d):
    """A depth-wise 1x1 convolution, as the product that it is: on CPUs PyTorch calls a kernel for every channel."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, 1, groups=dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.weight.transpose(0, 1)
        return x if self.bias is None else x + self.bias.view(-1, 1, 1)


class RepDepthwise(nn.Module):
    """Depth-wise convolution as the sum of a large kernel, a 1x1 kernel and the input, each with its norm.

    One depth-wise convolution with bias after `fuse()`.

    Args:
        kernel: side of the large kernel.
        identity: whether the normed input is one of the branches.
    """

    def __init__(self, dim: int, kernel: int = 3, identity: bool = True) -> None:
        super().__init__()
        branches: list[Branch] = [ConvNorm(dim, dim, side, groups=dim) for side in (kernel, 1)]
        branches[1].conv = ChannelScale(dim)
        if identity:
            branches.append(nn.BatchNorm2d(dim))
        self.branches = nn.ModuleList(branches)
        self.conv: nn.Conv2d | None = None
        self.dim, self.kernel = dim, kernel

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> the same shape."""
        return add_up(self.branches, x) if self.conv is None else self.conv(x)

    def fuse(self) -> None:
        if self.conv is None:
            weight, bias = merge(self.branches, self.kernel, self.dim)
            self.conv = copy.deepcopy(self.branches[0].conv)  # in its dtype and memory format
            self.conv.bias = nn.Parameter(torch.empty_like(self.conv.weight[:, 0, 0, 0]))
            _fill(self.conv, weight, bias)
            self.branches = nn.ModuleList()


def add_up(branches: Sequence[nn.Module], x: Tensor) -> Tensor:
    """The sum of what the branches make of one input."""
    if len(branches) == 1:
        return branches[0](x)
    total = branches[0](x) + branches[1](x)
    for branch in branches[2:]:
        total += branch(x)  # a sum that nothing else has seen: no further map
    return total


@torch.no_grad()
def _fill(layer: nn.Linear | nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)


def deployed_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the folded model, from one of the model in its training form.

    Args:
        model: any model in its training form; it stays as it is, and its own weights do not matter.
        state: what `model.state_dict()` returned when it had been trained.

    Returns:
        What loads into such a model once `vitalloy.layers.fusion.fuse` has folded it. (A backbone that was folded by
        its own `fuse()` takes no weights.)
    """
    merged = copy.deepcopy(model)
    merged.load_state_dict(state)
    return fuse(merged).state_dict()

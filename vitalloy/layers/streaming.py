"""Perceptrons on many tokens, a piece at a time: the wide map between the two layers stays in one small buffer.

At inference on a CPU most of such a layer's time goes into fetching fresh memory for a map that is read once. Nothing
may look at that map meanwhile, so this way is open only where every module involved is a plain one without hooks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from vitalloy.layers.activations import QuickGELU
from vitalloy.layers.tokens import to_map, to_tokens

WORTHWHILE = 3 << 18  # elements of the wide map from which pieces were measured to be faster
ROWS = 2048  # tokens in a piece: fewer make the products slower, more leave the cache
GROUP = 1 << 20  # elements of a piece that holds whole images

_PLAIN = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GELU, QuickGELU, nn.ReLU, nn.Identity)


def may_stream(x: Tensor, fc1: nn.Module, *others: nn.Module) -> bool:
    """Whether tokens (..., C) may pass through these modules in pieces, unseen, and gain by it."""
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled("cpu")
        and not nn_module._has_any_global_hook()
        and all(type(m) in _PLAIN and not m._forward_hooks and not m._forward_pre_hooks for m in (fc1, *others))
        and all(getattr(m, "bias", x) is not None for m in (fc1, *others))
        and x.numel() // x.shape[-1] * fc1.out_features > WORTHWHILE
    )


def activate_(act: nn.Module, x: Tensor) -> Tensor:
    """act(x), in place where PyTorch has that."""
    if isinstance(act, nn.GELU):
        return torch.ops.aten.gelu_(x, approximate=act.approximate)
    return x.relu_() if isinstance(act, nn.ReLU) else act(x)


def stream_mlp(x: Tensor, fc1: nn.Linear, act: nn.Module, fc2: nn.Linear) -> Tensor:
    """fc2(act(fc1(x))) for x (..., C)."""
    rows = x.flatten(0, -2)
    out = rows.new_empty(len(rows), fc2.out_features)
    buffer = rows.new_empty(min(ROWS, len(rows)), fc1.out_features)
    quick = isinstance(act, QuickGELU)
    scale = QuickGELU.SCALE if quick else 1.0  # silu(scale * x) / scale: both products cost nothing inside addmm
    for piece, result in zip(rows.split(ROWS), out.split(ROWS), strict=True):
        wide = buffer[: len(piece)]
        torch.addmm(fc1.bias, piece, fc1.weight.t(), beta=scale, alpha=scale, out=wide)
        wide = F.silu(wide, inplace=True) if quick else activate_(act, wide)
        torch.addmm(fc2.bias, wide, fc2.weight.t(), alpha=1 / scale, out=result)
    return out.unflatten(0, x.shape[:-1])


def stream_branch(
    x: Tensor, branch: Tensor, norm: nn.LayerNorm, fc1: nn.Linear, act: nn.Module, fc2: nn.Linear
) -> Tensor:
    """x + fc2(act(fc1(norm(branch)))) for x and branch (..., C); the normalized map is never whole either."""
    rows, kept = branch.flatten(0, -2), x.flatten(0, -2)
    out = torch.empty_like(kept)
    buffer = rows.new_empty(min(ROWS, len(rows)), fc1.out_features)
    for before, piece, result in zip(kept.split(ROWS), rows.split(ROWS), out.split(ROWS), strict=True):
        wide = buffer[: len(piece)]
        piece = F.layer_norm(piece, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        torch.addmm(fc1.bias, piece, fc1.weight.t(), out=wide)
        torch.add(before, fc2.bias, out=result).addmm_(activate_(act, wide), fc2.weight.t())
    return out.unflatten(0, x.shape[:-1])


def stream_conv_mlp(
    x: Tensor,
    grid: tuple[int, int],
    fc1: nn.Linear,
    before: nn.Module,
    conv: nn.Conv2d,
    act: nn.Module,
    fc2: nn.Linear,
) -> Tensor:
    """fc2(act(conv(before(fc1(x))))) for tokens x (B, N, C), the convolution on their grid; whole images at a time."""
    images, count, _ = x.shape
    group = min(images, max(1, GROUP // (count * fc1.out_features)))
    out = x.new_empty(images, count, fc2.out_features)
    buffer = x.new_empty(group, count, fc1.out_features)
    for piece, result in zip(x.split(group), out.split(group), strict=True):
        wide = buffer[: len(piece)]
        torch.addmm(fc1.bias, piece.flatten(0, 1), fc1.weight.t(), out=wide.flatten(0, 1))
        image = to_map(activate_(before, wide), grid)
        mixed = F.conv2d(image, conv.weight, conv.bias, conv.stride, conv.padding, 1, conv.groups)
        mixed = activate_(act, to_tokens(mixed).flatten(0, 1))
        torch.addmm(fc2.bias, mixed, fc2.weight.t(), out=result.flatten(0, 1))
    return out

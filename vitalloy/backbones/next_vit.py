"""Next-ViT: convolution blocks with one block of reduced attention at the end of every group, for fast deployment.

"Next-ViT: Next Generation Vision Transformer for Efficient Deployment in Realistic Industrial Scenarios", Li et al.,
2022, arXiv 2207.05501. Loads the authors' files and those of timm, which has the same models under the same names.
Any input size runs; there is no position table.

Norms stand in front of linear maps and are batch norms, so `fuse()` folds all of them but the final one. Where the
published code surprises, it is followed, because the weights were trained with it:
- keys and values are means over runs of consecutive tokens of the flat sequence, and a tail shorter than a run has no
  key. `pooling="square"` averages squares of the map instead, for training anew.
- The dense form with extra norms passes the normed maps onward. For its last map the published code names a norm that
  it does not make; `extra_norm=True` takes the classifier's.
A map with fewer tokens than one run, which the published code refuses, has one key: the mean of all.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from vitalloy.layers.attention import Attend, fitting_heads, merge_heads, split_heads
from vitalloy.layers.fusion import fold_norm_before
from vitalloy.layers.hybrid_pyramid import (
    HEAD_DIM,
    ConvMixer,
    HybridPyramid,
    average_pool,
    divisible32,
    patch_embed,
    relu,
    split_width,
)
from vitalloy.layers.mlp import Mlp
from vitalloy.layers.spatial_reduction import fuse_keys_values
from vitalloy.layers.tokens import to_map, to_tokens
from vitalloy.registry import Variant, register


class ReducedAttention(nn.Module):
    """Multi-head self-attention with averaged keys and values.

    Args:
        reduction: a key stands for reduction ** 2 tokens; 1 keeps every token and has no norm.
        pooling: "flat" averages runs of the sequence, as published; "square" averages squares of the map.
    """

    def __init__(self, dim: int, reduction: int = 1, pooling: str = "flat") -> None:
        super().__init__()
        if pooling not in ("flat", "square"):
            raise ValueError(f"pooling={pooling!r} is neither 'flat' nor 'square'")
        self.num_heads = fitting_heads(dim, dim // HEAD_DIM)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.attend = Attend()
        self.proj = nn.Linear(dim, dim)
        self.run_length = reduction**2
        self.squares = average_pool(reduction) if reduction > 1 and pooling == "square" else None
        self.norm = nn.BatchNorm1d(dim) if reduction > 1 else nn.Identity()

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """x (B, N, C) on a grid of N cells -> (B, N, C)."""
        q = split_heads(self.q(x), self.num_heads)
        pooled = self.pool(x, grid)
        pooled = self.norm(pooled.flatten(0, 1)).view_as(pooled)
        kv = self.kv(pooled).unflatten(-1, (2, self.num_heads, -1))  # (B, M, 2, heads, d)
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(merge_heads(self.attend(q, k, v)))

    def pool(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """The averaged tokens (B, M, C) that keys and values are made of."""
        if self.squares is not None:
            return to_tokens(self.squares(to_map(x, grid)))
        length = min(self.run_length, x.shape[1])
        if length == 1:
            return x
        runs = x.shape[1] // length
        return x[:, : runs * length].unflatten(1, (runs, length)).mean(2)

    def absorb(self, norm: nn.BatchNorm2d) -> None:
        """Fold the norm in front of the attention into its projections."""
        self.q = fold_norm_before(norm, self.q)
        self.kv = fold_norm_before(norm, self.kv)  # means of normed tokens are normed means

    def fuse(self) -> None:
        if isinstance(self.norm, nn.BatchNorm1d):
            self.kv, self.norm = fold_norm_before(self.norm, self.kv), nn.Identity()


class ConvBlock(nn.Module):
    """Next convolution block: grouped-convolution attention and a perceptron, each with a residual."""

    def __init__(
        self, in_chans: int, out_chans: int, stride: int = 1, drop_path: float = 0.0, mlp_ratio: float = 3.0
    ) -> None:
        super().__init__()
        self.patch_embed = patch_embed(in_chans, out_chans, stride)
        self.mhca = ConvMixer(out_chans)
        self.norm = nn.BatchNorm2d(out_chans)
        self.mlp = Mlp(out_chans, divisible32(mlp_ratio * out_chans), relu)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_chans, H, W) -> (B, out_chans, H', W')."""
        x = self.patch_embed(x)
        x = x + self.drop_path(self.mhca(x))
        return x + self.drop_path(_on_map(self.mlp, self.norm(x)))

    def fuse(self) -> None:
        if isinstance(self.norm, nn.BatchNorm2d):
            self.mlp.fc1, self.norm = fold_norm_before(self.norm, self.mlp.fc1), nn.Identity()


class TransformerBlock(nn.Module):
    """Next transformer block: attention makes most channels, grouped convolution the others from them.

    Stochastic depth drops the attention, the convolution and the perceptron at 0.75, 0.25 and 1 times its rate.
    """

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        stride: int = 1,
        reduction: int = 1,
        drop_path: float = 0.0,
        mlp_ratio: float = 2.0,
        pooling: str = "flat",
    ) -> None:
        super().__init__()
        low, high = split_width(out_chans)
        self.patch_embed = patch_embed(in_chans, low, stride)
        self.norm1 = nn.BatchNorm2d(low)
        self.attn = ReducedAttention(low, reduction, pooling)
        self.projection = patch_embed(low, high)
        self.mhca = ConvMixer(high)
        self.norm2 = nn.BatchNorm2d(out_chans)
        self.mlp = Mlp(out_chans, divisible32(mlp_ratio * out_chans), relu)
        self.drop_attn, self.drop_conv, self.drop_mlp = (
            DropPath(share * drop_path) if drop_path else nn.Identity() for share in (0.75, 0.25, 1.0)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_chans, H, W) -> (B, out_chans, H', W')."""
        x = self.patch_embed(x)
        grid = x.shape[-2:]
        x = x + self.drop_attn(to_map(self.attn(to_tokens(self.norm1(x)), grid), grid))
        y = self.projection(x)
        y = y + self.drop_conv(self.mhca(y))
        z = torch.cat([x, y], dim=1)
        return z + self.drop_mlp(_on_map(self.mlp, self.norm2(z)))

    def fuse(self) -> None:
        if isinstance(self.norm1, nn.BatchNorm2d):
            self.attn.fuse()
            self.attn.absorb(self.norm1)
            self.norm1 = nn.Identity()
            self.mlp.fc1, self.norm2 = fold_norm_before(self.norm2, self.mlp.fc1), nn.Identity()


def _on_map(mlp: Mlp, x: Tensor) -> Tensor:
    """A perceptron on a map: on CPUs a linear layer is at least as fast as a 1x1 convolution."""
    return to_map(mlp(to_tokens(x)), x.shape[-2:])


class NextViT(HybridPyramid):
    """Next-ViT: four stages of strides 4, 8, 16 and 32.

    Args:
        pooling: how keys and values are averaged: "flat" (the published weights) or "square".
        mlp_ratios: widths of the perceptrons in convolution and in transformer blocks.
        **layout: depths, dims, ..., num_classes, drop_path_rate of `HybridPyramid`.
    """

    key_table = (
        (r"^(?:backbone\.)?(.*)\bmhca\.group_conv3x3\.", r"\1mhca.local.conv."),
        (r"^(?:backbone\.)?(.*)\bmhca\.norm\.", r"\1mhca.local.norm."),
        (r"^(?:backbone\.)?(.*)\bmlp\.(?:conv|fc)(\d)\.", r"\1mlp.fc\2."),
        (r"^(?:backbone\.)?(.*)\be_mhsa\.", r"\1attn."),
        (r"^(?:backbone\.)?extra_norm_list\.", "extra_norm."),
        (r"^(?:proj_head\.0|head\.fc)\.", "head."),
        (r"^backbone\.(.+)", r"\1"),
    )

    def __init__(self, *, pooling: str = "flat", mlp_ratios: tuple[float, float] = (3.0, 2.0), **layout: Any) -> None:
        super().__init__(
            partial(ConvBlock, mlp_ratio=mlp_ratios[0]),
            partial(TransformerBlock, mlp_ratio=mlp_ratios[1], pooling=pooling),
            **layout,
        )

    def reshape_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        flat = {}
        starts = [0, *self.stage_ends]
        for name, value in state.items():
            if found := re.match(r"stages\.(\d)\.blocks\.(\d+)(.+)", name):  # timm counts blocks within stages
                stage, block, rest = found.groups()
                name = f"features.{starts[int(stage)] + int(block)}{rest}"
            # the perceptrons are 1x1 convolutions there and linear layers here
            flat[name] = value.flatten(1) if re.search(r"mlp\.fc\d\.weight$", name) else value
        return fuse_keys_values(flat)


_PUBLISHED = {  # depths, top-1 at 224 and 384, and both with the SSLD 6M data
    "small": ((3, 4, 10, 3), 82.5, 83.6, 84.8, 85.8),
    "base": ((3, 4, 20, 3), 83.2, 84.3, 85.1, 86.1),
    "large": ((3, 4, 30, 3), 83.6, 84.7, 85.4, 86.4),
}


def _variant(size: str, side: int) -> Variant:
    depths, *accuracies = _PUBLISHED[size]
    plain, more = accuracies[side == 384 :: 2]
    return Variant(
        {"depths": depths},
        plain,
        (f"nextvit_{size}_in1k_{side}.pth", f"nextvit_{size}_in1k6m_{side}.pth"),
        {"input_size": (3, side, side)},
        note=f"{more} with the in1k6m file, trained with more data",
    )


VARIANTS = {
    "nextvit_nano": Variant(  # ours, for 32-pixel images: strides 2, 4, 8, 16
        {
            "depths": (1, 2, 2, 2),
            "dims": (32, 64, 96, 128),
            "mixing_dims": (128, 128, 160),
            "reductions": (4, 2, 2, 1),
            "stem_dims": (32, 16, 32, 32),
            "stem_strides": (1, 1, 1, 2),
            "init_std": 0.06,
        },
        cfg={"input_size": (3, 32, 32), "crop_pct": 1.0},
    ),
    **{f"nextvit_{size}": _variant(size, 224) for size in _PUBLISHED},
    **{f"nextvit_{size}_384": _variant(size, 384) for size in _PUBLISHED},
}
register(NextViT, VARIANTS, first_conv="stem.0.conv", crop_pct=0.875)

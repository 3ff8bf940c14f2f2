"""Twins: two transformer pyramids that encode positions by a convolution and attend to a sub-sampled map.

"Twins: Revisiting the Design of Spatial Attention in Vision Transformers", Chu et al., NeurIPS 2021,
arXiv 2104.13840. Twins-PCPVT is PVT with convolutional positions; Twins-SVT attends in windows in every first block
and to the sub-sampled map in every second. Loads the authors' classification files and timm's, whose names are the
same.

PolyTwins is the shift-equivariant form (`anchored=True`): "Reviving Shift Equivariance in Vision Transformers",
Ding et al., 2023, arXiv 2306.07470; the parameters and their names are those of Twins. The guarantee and its limits
are described in `layers/polyphase.py`; it needs sides that patches, windows and reductions divide, such as 224 pixels.

Departures: any input size runs. The published classifier needs maps that the window divides; like the authors'
segmentation code and timm we pad the others with zeros behind the last row and column, and padding takes part in
attention. `drop_rate` acts before the classifier only. In a configuration of our own, whose stage does not end with a
reduction by an even number, the anchored form also anchors the next patch embedding: the published ones need not.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from vitalloy.layers.attention import Attend, fitting_heads
from vitalloy.layers.backbone import Backbone, Level, drop_path_rates, init_convolution, init_weights
from vitalloy.layers.mlp import Mlp
from vitalloy.layers.polyphase import PolyphaseAnchor, PositionConv, anchor_input
from vitalloy.layers.spatial_reduction import SpatialReductionAttention
from vitalloy.layers.tokens import to_map, to_tokens
from vitalloy.registry import Variant, register

Pair = tuple[int, int]


class PatchEmbed(nn.Module):
    """Cuts a map into patches, projects and normalises each: (B, C, H, W) -> (B, N, D) and the patch grid."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)
        self.norm = nn.LayerNorm(embed_dim)  # eps 1e-5, where the blocks have 1e-6

    def forward(self, x: Tensor) -> tuple[Tensor, Pair]:
        x = self.proj(x.contiguous(memory_format=torch.channels_last))
        return self.norm(to_tokens(x)), x.shape[-2:]


class LocalAttention(nn.Module):
    """Self-attention in each window of the token map, without positions and without a shift (LSA)."""

    def __init__(self, dim: int, num_heads: int, window: int, qkv_bias: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.window = fitting_heads(dim, num_heads), window
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attend = Attend(dropout)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: Pair) -> Tensor:
        """x (B, N, C) on a grid of N cells -> the same shape."""
        height, width = grid
        below, right = -height % self.window, -width % self.window
        x = x.unflatten(1, (height, width))
        if below or right:
            x = F.pad(x, (0, 0, 0, right, 0, below))
        x = x.unflatten(2, (-1, self.window)).unflatten(1, (-1, self.window))  # (B, rows, w, columns, w, C)
        rows, columns = x.shape[1], x.shape[3]
        x = x.transpose(2, 3).flatten(3, 4).flatten(0, 2)  # (B * windows, w * w, C)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B * windows, heads, w * w, d)
        x = self.attend(q, k, v).unflatten(2, (self.window, self.window)).unflatten(0, (-1, rows, columns))
        x = x.permute(0, 1, 4, 2, 5, 3, 6)  # (B, rows, w, columns, w, heads, d): windows and heads move back at once
        x = x.flatten(5).flatten(3, 4).flatten(1, 2)[:, :height, :width]
        return self.proj(x.flatten(1, 2))


class Block(nn.Module):
    """Pre-norm attention and perceptron, each with a residual.

    Args:
        attn: takes tokens and their grid.
        stride: of the cells that the attention cuts the grid into.
    """

    def __init__(self, dim: int, attn: nn.Module, stride: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.stride = stride
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, grid: Pair) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), grid))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Twins(Backbone):
    """Twins-PCPVT and, with `window_size`, Twins-SVT: four stages of strides 4, 8, 16 and 32.

    Args:
        embed_dims, num_heads, reductions, mlp_ratios, depths: one entry a stage.
        window_size: side of the windows of every first block; without it all blocks attend to the sub-sampled map.
        patch_stride: stride of the first stage; 2 suits small images.
        anchored: the shift-equivariant form, PolyTwins.
        global_pool: "avg", "max", ...
    """

    key_table = ((r"^(?:backbone\.)?(pos_block\.\d+\.proj)\.0\.", r"\1."), (r"^backbone\.(.+)", r"\1"))
    default_out_indices = (0, 1, 2, 3)

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        reductions: Sequence[int] = (8, 4, 2, 1),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        depths: Sequence[int] = (3, 4, 6, 3),
        window_size: int | None = None,
        patch_stride: int = 4,
        qkv_bias: bool = True,
        anchored: bool = False,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.anchored = False
        self.num_features = embed_dims[-1]
        self.feature_info = []
        self.patch_embeds, self.blocks, self.pos_block = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        for i, (dim, heads, reduction) in enumerate(zip(embed_dims, num_heads, reductions, strict=True)):
            blocks = nn.ModuleList()
            for j in range(depths[i]):
                attn: nn.Module
                if window_size is not None and j % 2 == 0:
                    attn, stride = LocalAttention(dim, heads, window_size, qkv_bias, attn_drop_rate), window_size
                else:
                    attn = SpatialReductionAttention(dim, heads, reduction, qkv_bias=qkv_bias, dropout=attn_drop_rate)
                    stride = reduction
                blocks.append(Block(dim, attn, stride, mlp_ratios[i], next(rates)))
            patch, width = (2, embed_dims[i - 1]) if i else (patch_stride, in_chans)
            self.patch_embeds.append(PatchEmbed(patch, width, dim))
            self.blocks.append(blocks)
            self.pos_block.append(PositionConv(dim))
            last = f"blocks.{i}.{depths[i] - 1}"
            self.feature_info.append({"num_chs": dim, "reduction": patch_stride * 2**i, "module": last})
        self.norm = nn.LayerNorm(self.num_features, eps=1e-6)
        self.apply(init_weights)
        self.apply(init_convolution)
        if anchored:
            self.anchor_phases()
        self.build_head(num_classes, global_pool, drop_rate)

    def anchor_phases(self) -> None:
        """Become shift-equivariant, in place; the weights stay."""
        self.anchored = True
        aligned = 1  # shifts can move the map by multiples of this only: the reduction by the last anchored block
        for embed, blocks, positions in zip(self.patch_embeds, self.blocks, self.pos_block, strict=True):
            patch = embed.proj.stride[0]
            if aligned % patch:
                anchor_input(embed, PolyphaseAnchor(patch))
            aligned = 1
            for block in blocks:
                if block.stride > 1:
                    anchor_input(block, PolyphaseAnchor(block.stride))
                    aligned = 1 if isinstance(block.attn, LocalAttention) else block.stride
            positions.make_circular()

    def forward_levels(self, x: Tensor, take: Collection[int], stop: int, norm: bool) -> tuple[Tensor, list[Level]]:
        levels = []
        for i in range(min(stop, len(self.blocks))):
            x, grid = self.patch_embeds[i](x)
            for j, block in enumerate(self.blocks[i]):
                x = self.run(block, x, grid)
                if j == 0:
                    x = self.pos_block[i](x, grid)
            last = i == len(self.feature_info) - 1
            if i in take:
                levels.append(Level(to_map(self.norm(x) if last and norm else x, grid)))
            x = x if last else to_map(x, grid)
        return x, levels

    def forward_final(self, state: Tensor) -> Tensor:
        return self.norm(state) if state.ndim == 3 else to_tokens(state)  # a map: stopped before the last stage

    def prune_levels(self, keep: int, prune_norm: bool) -> None:
        self.patch_embeds, self.blocks = self.patch_embeds[:keep], self.blocks[:keep]
        self.pos_block = self.pos_block[:keep]
        if prune_norm:
            self.norm = nn.Identity()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """How layer-wise learning rates group the parameters."""
        if coarse:
            return {"stem": r"^patch_embeds\.0", "blocks": r"^(?:patch_embeds|blocks|pos_block)\.(\d+)"}
        return {
            "stem": r"^patch_embeds\.0",
            "blocks": [
                (r"^blocks\.(\d+)\.(\d+)", None),
                (r"^(?:patch_embeds|pos_block)\.(\d+)", (0,)),
                (r"^norm", (99999,)),
            ],
        }


def _svt(dim: int, heads: int, *depths: int, **kwargs: object) -> dict[str, Any]:
    return {
        "embed_dims": tuple(dim * 2**i for i in range(4)),
        "num_heads": tuple(heads * 2**i for i in range(4)),
        "mlp_ratios": (4, 4, 4, 4),
        "depths": depths,
        "window_size": 7,
        **kwargs,
    }


VARIANTS = {
    "twins_pcpvt_small": Variant({}, 81.2, ("pcpvt_small.pth",)),
    "twins_pcpvt_base": Variant({"depths": (3, 4, 18, 3)}, 82.7, ("pcpvt_base.pth",)),
    "twins_pcpvt_large": Variant({"depths": (3, 8, 27, 3)}, 83.1, ("pcpvt_large.pth",)),
    "twins_svt_small": Variant(_svt(64, 2, 2, 2, 10, 4), 81.7, ("alt_gvt_small.pth",)),
    "twins_svt_base": Variant(_svt(96, 3, 2, 2, 18, 2), 83.2, ("alt_gvt_base.pth",)),
    "twins_svt_large": Variant(_svt(128, 4, 2, 2, 18, 2), 83.7, ("alt_gvt_large.pth",)),
    "twins_svt_nano": Variant(  # ours, for 32-pixel images: strides 2, 4, 8, 16
        _svt(16, 1, 2, 2, 2, 2, window_size=4, reductions=(4, 2, 2, 1), patch_stride=2),
        cfg={"input_size": (3, 32, 32), "crop_pct": 1.0},
    ),
    "polytwins_svt_small": Variant(_svt(64, 2, 2, 2, 10, 4, anchored=True)),
    "polytwins_svt_base": Variant(_svt(96, 3, 2, 2, 18, 2, anchored=True)),
    "polytwins_svt_large": Variant(_svt(128, 4, 2, 2, 18, 2, anchored=True)),
}
register(Twins, VARIANTS, first_conv="patch_embeds.0.proj", crop_pct=0.875)

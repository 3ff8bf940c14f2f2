"""Swin: attention in windows that shift from block to block, on four levels of shrinking maps.

"Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", Liu et al., ICCV 2021, arXiv 2103.14030.

Loads the authors' files and timm's. The parameter names are timm's: a level starts with its patch merging, where the
authors' level ends with the merging that follows it; the classifier is `head`.

Departures: any input size runs. The window is no longer than the grid and a grid of one window is not shifted, decided
by the map that comes in; the authors and timm decide it by the image size of the constructor. A grid that the window
does not divide is padded behind the shift, as in timm; the authors' detection code pads before it. As published,
padding takes part in attention, and what a shift brings together is held apart by -100, not by minus infinity.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn

from vitalloy.layers.attention import Attend, fitting_heads, merge_heads
from vitalloy.layers.backbone import Backbone, Level, drop_path_rates, init_weights
from vitalloy.layers.mlp import Mlp
from vitalloy.layers.windows import Cut, Pair, Windows, resample_relative
from vitalloy.registry import Variant, register


class PatchEmbed(nn.Module):
    """Cuts an image into patches, projects and normalizes each: (B, C, H, W) -> (B, H / p, W / p, D)."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(pad_to(x, self.proj.stride, (2, 3)))
        return self.norm(x.permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Four neighbours become one token of twice the channels: (B, H, W, C) -> (B, H / 2, W / 2, 2C)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to(x, (2, 2), (1, 2)).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (B, H/2, 2, W/2, 2, C)
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)  # the neighbour below comes before the one to the right
        return self.reduction(self.norm(x))


class WindowAttention(nn.Module):
    """Self-attention in each window, with a learned bias for each relative position.

    Args:
        window: (height, width) that the table of biases is made for.
    """

    def __init__(self, dim: int, num_heads: int, window: Pair, qkv_bias: bool, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.window = fitting_heads(dim, num_heads), window
        rows = (2 * window[0] - 1) * (2 * window[1] - 1)
        self.relative_position_bias_table = nn.Parameter(trunc_normal_(torch.empty(rows, num_heads), std=0.02))
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attend = Attend(dropout)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        """x (B * windows, N, C) -> the same shape."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B * windows, N, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        bias = cut.bias(self.relative_position_bias_table, x.shape[0])  # len(x) would fix the batch of an export
        return self.proj(merge_heads(self.attend(q, k, v, bias=bias)))


class Block(nn.Module):
    """Pre-norm window attention and perceptron, each with a residual."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: Pair,
        mlp_ratio: float,
        qkv_bias: bool,
        attn_drop: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, window, qkv_bias, attn_drop)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        """x (B, H, W, C) -> the same shape."""
        windows = self.attn(cut.split(self.norm1(x)), cut)
        x = x + self.drop_path(cut.join(windows, x))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """One level: patch merging (none on the first), then blocks whose windows are shifted in every second one."""

    def __init__(self, downsample: nn.Module, blocks: list[Block], grid: Pair) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        window = blocks[0].attn.window
        self.windows = nn.ModuleList(Windows(grid, window, shifted) for shifted in (False, True)[: len(blocks)])

    def forward(self, x: Tensor, run: Callable[..., Tensor] = lambda block, *args: block(*args)) -> Tensor:
        """x (B, H, W, C); `run` calls a block."""
        x = self.downsample(x)
        cuts = [windows(x) for windows in self.windows]  # once for all blocks
        for i, block in enumerate(self.blocks):
            x = run(block, x, cuts[i % 2])
        return x


class SwinTransformer(Backbone):
    """Swin.

    Args:
        img_size: the (height, width) or side that windows are made for: a level whose grid is smaller than
            `window_size` has a table of relative positions for that grid. Other inputs run too.
        window_size: side of the windows, or (height, width).
        depths, num_heads: one number a level; channels double from level to level, starting at `embed_dim`.
    """

    key_table = (
        (r"\.(?:relative_position_index|attn_mask)$", None),
        (r"^(?:backbone|encoder)\.(.+)", r"\1"),
        (r"^head\.fc\.", "head."),
    )
    default_out_indices = (0, 1, 2, 3)

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        window_size: int | tuple[int, int] = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        sides = (img_size, img_size) if isinstance(img_size, int) else img_size
        window = (window_size, window_size) if isinstance(window_size, int) else tuple(window_size)
        self.embed_dim, self.num_features = embed_dim, embed_dim * 2 ** (len(depths) - 1)
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        self.layers = nn.ModuleList()
        self.feature_info = []
        for i, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            dim, stride = embed_dim * 2**i, patch_size * 2**i
            grid = tuple(math.ceil(side / stride) for side in sides)
            clamped = tuple(min(w, g) for w, g in zip(window, grid, strict=True))
            blocks = [
                Block(dim, heads, clamped, mlp_ratio, qkv_bias, attn_drop_rate, next(rates)) for _ in range(depth)
            ]
            self.layers.append(Stage(PatchMerging(dim // 2) if i else nn.Identity(), blocks, grid))
            self.feature_info.append({"num_chs": dim, "reduction": stride, "module": f"layers.{i}"})
        self.norm = nn.LayerNorm(self.num_features)
        self.apply(init_weights)
        self.build_head(num_classes, global_pool, drop_rate)

    def forward_levels(self, x: Tensor, take: Collection[int], stop: int, norm: bool) -> tuple[Tensor, list[Level]]:
        x = self.patch_embed(x)
        levels = []
        for i, stage in enumerate(self.layers[:stop]):
            x = stage(x, self.run)
            if i in take:
                last = i == len(self.feature_info) - 1
                levels.append(Level((self.norm(x) if norm and last else x).permute(0, 3, 1, 2)))
        return x, levels

    def forward_final(self, state: Tensor) -> Tensor:
        return self.norm(state).flatten(1, 2)

    def prune_levels(self, keep: int, prune_norm: bool) -> None:
        if prune_norm or keep < len(self.layers):  # the norm is for the channels of the last level
            self.norm = nn.Identity()
        self.layers, self.feature_info = self.layers[:keep], self.feature_info[:keep]
        self.num_features = self.feature_info[-1]["num_chs"]

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """How layer-wise learning rates group the parameters."""
        fine = [(r"^layers\.(\d+)\.downsample", (0,)), (r"^layers\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^patch_embed", "blocks": r"^layers\.(\d+)" if coarse else fine}

    def reshape_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' merging at the end of a level moves to the start of the next; tables get our windows."""
        if any(key.startswith("layers.0.downsample.") for key in state):
            merging = re.compile(r"^layers\.(\d+)\.downsample\.")
            state = {merging.sub(lambda m: f"layers.{int(m[1]) + 1}.downsample.", k): v for k, v in state.items()}
        for name, module in self.named_modules():
            table = state.get(key := f"{name}.relative_position_bias_table")
            if isinstance(module, WindowAttention) and table is not None:
                state[key] = resample_relative(table, module.window)
        return state


def pad_to(x: Tensor, multiple: tuple[int, ...], dims: Pair) -> Tensor:
    """Zeros behind the two dims, up to the next multiple; `x` itself where they fit."""
    extra = [-x.shape[d] % m for d, m in zip(dims, multiple, strict=True)]
    if not any(extra):
        return x
    behind = (0, 0) * (x.ndim - 1 - dims[1])
    return F.pad(x, (*behind, 0, extra[1], 0, extra[0]))


_384 = {"input_size": (3, 384, 384), "crop_pct": 1.0}
_TINY = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}
_SMALL = {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)}
_BASE = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
_LARGE = {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)}
VARIANTS = {
    "swin_nano": Variant(
        {"patch_size": 2, "window_size": 4, "embed_dim": 24, "depths": (2, 2, 2, 1), "num_heads": (1, 2, 4, 8)},
        cfg={"input_size": (3, 32, 32), "crop_pct": 1.0},
    ),
    "swin_tiny_patch4_window7_224": Variant(_TINY, 81.2, ("swin_tiny_patch4_window7_224.pth",)),
    "swin_small_patch4_window7_224": Variant(_SMALL, 83.2, ("swin_small_patch4_window7_224.pth",)),
    "swin_base_patch4_window7_224": Variant(_BASE, 83.5, ("swin_base_patch4_window7_224.pth",)),
    "swin_base_patch4_window12_384": Variant(
        {**_BASE, "window_size": 12}, 84.5, ("swin_base_patch4_window12_384.pth",), cfg=_384
    ),
    # pre-trained on ImageNet-22k
    "swin_large_patch4_window7_224": Variant(_LARGE, 86.3, ("swin_large_patch4_window7_224_22kto1k.pth",)),
    "swin_large_patch4_window12_384": Variant(
        {**_LARGE, "window_size": 12}, 87.3, ("swin_large_patch4_window12_384_22kto1k.pth",), cfg=_384
    ),
}
register(SwinTransformer, VARIANTS)

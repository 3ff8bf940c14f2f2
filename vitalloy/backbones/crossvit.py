"""CrossViT: two transformers, one of small and one of large patches, that ask each other with their class tokens.

"CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image Classification", Chen, Fan, Panda, ICCV 2021,
arXiv 2103.14899. Loads the authors' files and timm's `crossvit_*` files.

The published models bring every image to the two sizes that they are built for, whatever its shape; so do ours, except
for dense features (`features_only=True`) and with `fixed_size=False`, where an image keeps its proportions and position
tables are resized. The published code looks at the height only and fails on some rectangles; ours looks at both sides.

Tokens and maps hold the channels of both branches: the class tokens side by side, and behind them one token for each
small patch, to whose grid the map of the large patches is resized. The two classifiers are one module (`JointHead`), so
that replacing, freezing or resetting "the classifier" means both. A model that pools its patches has no exchange of
class tokens in the last block, since nothing would read it; a published file then loads without that part.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn

from vitalloy.layers.attention import Attend, fitting_heads, merge_heads, split_heads
from vitalloy.layers.backbone import Backbone, Level, init_weights
from vitalloy.layers.patch_embed import PatchEmbed
from vitalloy.layers.positions import resample_positions
from vitalloy.layers.tokens import to_map, to_tokens
from vitalloy.layers.transformer_block import TransformerBlock
from vitalloy.registry import Variant, register

if TYPE_CHECKING:
    from typing_extensions import Self  # typing has it from Python 3.11 on

Pair = tuple[int, int]


class ConvPatchEmbed(PatchEmbed):
    """Patches by three convolutions with ReLUs between, for patches of 12 or 16 pixels."""

    # kernel, stride and padding of the second and third convolution
    LATER = {12: ((3, 3, 0), (3, 1, 1)), 16: ((3, 2, 1), (3, 2, 1))}

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__(patch_size, in_chans, embed_dim)
        if patch_size not in self.LATER:
            raise ValueError(f"patch_size={patch_size}: three convolutions make patches of 12 or 16")
        second, third = self.LATER[patch_size]
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, embed_dim // 4, 7, 4, 3),
            nn.ReLU(inplace=True),
            nn.Conv2d(embed_dim // 4, embed_dim // 2, *second),
            nn.ReLU(inplace=True),
            nn.Conv2d(embed_dim // 2, embed_dim, *third),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Pair]:
        return super().forward(x.contiguous(memory_format=torch.channels_last))


class CrossAttention(nn.Module):
    """The first token asks all tokens, itself included."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads = fitting_heads(dim, num_heads)
        self.wq = nn.Linear(dim, dim, bias=qkv_bias)
        self.wkv = nn.Linear(dim, 2 * dim, bias=qkv_bias)  # the published wk and wv, fused
        self.attend = Attend(dropout)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, C) -> (B, 1, C)."""
        q = split_heads(self.wq(x[:, :1]), self.num_heads)
        k, v = self.wkv(x).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(merge_heads(self.attend(q, k, v)))


class CrossBlock(nn.Module):
    """Pre-norm cross-attention with a residual, and no perceptron: (B, N, C) -> (B, 1, C)."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, attn_drop: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = CrossAttention(dim, num_heads, qkv_bias, attn_drop)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1] + self.drop_path(self.attn(self.norm1(x)))


class MultiScaleBlock(nn.Module):
    """Some transformer blocks in each of two branches; then each branch's class token asks the other's patches.

    Args:
        dims, num_heads, mlp_ratios: one entry a branch.
        depth: blocks in the first branch, in the second, and cross-attention blocks; one stands where that is 0.
        rates: stochastic-depth rate of each block in order; the cross-attention blocks have the last.
        exchange: without it the class tokens stay in their branches.
    """

    def __init__(
        self,
        dims: Sequence[int],
        depth: Sequence[int],
        num_heads: Sequence[int],
        mlp_ratios: Sequence[float],
        qkv_bias: bool,
        attn_drop: float,
        rates: Sequence[float],
        exchange: bool = True,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        self.projs, self.fusion, self.revert_projs = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for b, (dim, heads, ratio) in enumerate(zip(dims, num_heads, mlp_ratios, strict=True)):
            self.blocks.append(
                nn.Sequential(
                    *(
                        TransformerBlock(dim, heads, ratio, qkv_bias, attn_drop, rates[min(i, len(rates) - 1)])
                        for i in range(depth[b])
                    )
                )
            )
            if exchange:
                other = dims[1 - b]
                crossing = (
                    CrossBlock(other, num_heads[1 - b], qkv_bias, attn_drop, rates[-1])
                    for _ in range(max(depth[-1], 1))
                )
                self.projs.append(_project(dim, other))
                self.fusion.append(nn.Sequential(*crossing))
                self.revert_projs.append(_project(other, dim))

    def forward(self, small: Tensor, large: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of both branches (B, 1 + N, D), class token first -> the same shapes."""
        small, large = (blocks(x) for blocks, x in zip(self.blocks, (small, large), strict=True))
        if not self.fusion:
            return small, large
        return self.ask(0, small, large), self.ask(1, large, small)

    def ask(self, b: int, own: Tensor, other: Tensor) -> Tensor:
        """The tokens of branch b, with the class token that has asked the other branch's patches."""
        token = self.fusion[b](torch.cat([self.projs[b](own[:, :1]), other[:, 1:]], 1))
        return torch.cat([self.revert_projs[b](token), own[:, 1:]], 1)


def _project(dim: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(dim, eps=1e-6), nn.GELU(), nn.Linear(dim, out))


class JointHead(nn.Module):
    """The mean of a linear classifier for each branch, whose features stand side by side.

    Args:
        dims: features of each branch.
        out_features: classes.
    """

    def __init__(self, dims: Sequence[int], out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = sum(dims), out_features
        self.weight = nn.Parameter(trunc_normal_(torch.empty(out_features, sum(dims)), std=0.02))
        self.bias = nn.Parameter(torch.zeros(len(dims), out_features))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_features) -> (B, out_features)."""
        return F.linear(x, self.weight, self.bias.sum(0)) / self.bias.shape[0]

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """The same as one plain layer."""
        linear = nn.Linear(self.in_features, self.out_features).to(self.weight)
        linear.weight.copy_(self.weight / self.bias.shape[0])
        linear.bias.copy_(self.bias.mean(0))
        return linear


class CrossViT(Backbone):
    """CrossViT.

    Args:
        img_size: the (height, width) or side that the model is built for. A branch works on the whole number of its
            patches that is nearest to its share of it.
        patch_sizes, embed_dims, num_heads, mlp_ratios: one entry a branch, small patches first.
        image_scales: side of each branch's image, as a share of the input.
        depths: for each multi-scale block the blocks of the first branch, of the second, and cross-attention blocks.
        multi_conv: patches by three convolutions instead of one (the dagger models).
        fixed_size: bring every image to the size that the model is built for, as published; otherwise resize position
            tables to the image.
        global_pool: "token" (the class tokens), or "avg", "max", "gem", "ggem" or "" of the patches of both branches.
    """

    key_table = (
        (r"^(cls_token|pos_embed)_(\d)$", r"\1.\2"),  # timm's names
        (r"^(blocks\.\d+\.fusion\.\d)\.(norm1|attn)\.", r"\1.0.\2."),  # a single cross-attention block has no number
    )
    default_out_indices = 3
    features_arch = {"fixed_size": False}
    num_prefix_tokens = 1

    def __init__(
        self,
        img_size: int | Pair = 240,
        patch_sizes: Sequence[int] = (12, 16),
        image_scales: Sequence[float] = (1.0, 224 / 240),
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dims: Sequence[int] = (192, 384),
        depths: Sequence[Sequence[int]] = ((1, 4, 0), (1, 4, 0), (1, 4, 0)),
        num_heads: Sequence[int] = (6, 6),
        mlp_ratios: Sequence[float] = (4, 4),
        qkv_bias: bool = True,
        multi_conv: bool = False,
        fixed_size: bool = True,
        global_pool: str = "token",
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.patch_sizes, self.image_scales, self.fixed_size = tuple(patch_sizes), tuple(image_scales), fixed_size
        self.embed_dims, self.num_features = tuple(embed_dims), sum(embed_dims)
        self.grids = self.grids_of((img_size, img_size) if isinstance(img_size, int) else img_size)
        embed = ConvPatchEmbed if multi_conv else PatchEmbed
        self.patch_embed = nn.ModuleList(
            embed(patch, in_chans, dim) for patch, dim in zip(patch_sizes, embed_dims, strict=True)
        )
        self.cls_token = nn.ParameterList(trunc_normal_(torch.empty(1, 1, dim), std=0.02) for dim in embed_dims)
        self.pos_embed = nn.ParameterList(
            trunc_normal_(torch.empty(1, 1 + grid[0] * grid[1], dim), std=0.02)
            for grid, dim in zip(self.grids, embed_dims, strict=True)
        )
        pooled = global_pool not in ("token", "")
        self.blocks = nn.ModuleList(
            MultiScaleBlock(
                embed_dims,
                depth,
                num_heads,
                mlp_ratios,
                qkv_bias,
                attn_drop_rate,
                rates,
                exchange=not (pooled and i == len(depths) - 1),
            )
            for i, (depth, rates) in enumerate(zip(depths, _rates(drop_path_rate, depths), strict=True))
        )
        self.norm = nn.ModuleList(nn.LayerNorm(dim, eps=1e-6) for dim in embed_dims)
        self.feature_info = [
            {"num_chs": self.num_features, "reduction": patch_sizes[0], "module": f"blocks.{i}"}
            for i in range(len(depths))
        ]
        self.apply(init_weights)
        self.build_head(num_classes, global_pool, drop_rate)

    def make_classifier(self, num_classes: int) -> nn.Module:
        return JointHead(self.embed_dims, num_classes) if num_classes else nn.Identity()

    def grids_of(self, size: Pair) -> list[Pair]:
        """The patch grid of each branch for images of a size: whole patches, at least one."""
        return [
            tuple(max(1, round(int(side) * scale / patch)) for side in size)
            for patch, scale in zip(self.patch_sizes, self.image_scales, strict=True)
        ]

    def embed(self, x: Tensor, b: int, grid: Pair) -> Tensor:
        """Images -> the tokens (B, 1 + N, D) of branch b on a grid."""
        size = tuple(n * self.patch_sizes[b] for n in grid)
        if tuple(x.shape[-2:]) != size:
            x = F.interpolate(x, size=size, mode="bicubic", align_corners=False)
        x = torch.cat([self.cls_token[b].expand(x.shape[0], -1, -1), self.patch_embed[b](x)[0]], 1)
        return x + resample_positions(self.pos_embed[b], grid, old_grid=self.grids[b], prefix=1)

    def forward_levels(
        self, x: Tensor, take: Collection[int], stop: int, norm: bool
    ) -> tuple[tuple[list[Tensor], list[Pair]], list[Level]]:
        grids = self.grids if self.fixed_size else self.grids_of(x.shape[-2:])
        branches = [self.embed(x, b, grid) for b, grid in enumerate(grids)]
        levels = []
        for i, block in enumerate(self.blocks[:stop]):
            branches = self.run(block, *branches)
            if i in take:
                levels.append(self.join(branches, grids, norm))
        return (branches, grids), levels

    def join(self, branches: Sequence[Tensor], grids: Sequence[Pair], norm: bool) -> Level:
        """The maps and class tokens of both branches side by side, on the grid of the small patches."""
        if norm:
            branches = [normalize(x) for normalize, x in zip(self.norm, branches, strict=True)]
        small, large = (to_map(x[:, 1:], grid) for x, grid in zip(branches, grids, strict=True))
        if large.shape[-2:] != small.shape[-2:]:
            large = F.interpolate(large, size=small.shape[-2:], mode="bilinear", align_corners=False)
        return Level(torch.cat([small, large], 1), torch.cat([x[:, :1] for x in branches], -1))

    def forward_final(self, state: tuple[Sequence[Tensor], Sequence[Pair]]) -> Tensor:
        patches, tokens = self.join(*state, norm=True)
        return torch.cat([tokens, to_tokens(patches)], 1)

    def prune_levels(self, keep: int, prune_norm: bool) -> None:
        self.blocks = self.blocks[:keep]
        if prune_norm:
            self.norm = nn.ModuleList(nn.Identity() for _ in self.norm)

    def fuse(self) -> Self:
        if isinstance(self.head, JointHead):
            self.head = self.head.to_linear()
        return super().fuse()

    def no_weight_decay(self) -> set[str]:
        """The authors list `cls_token` and `pos_embed`, which are not the names of their parameters; these are."""
        return {f"{name}.{b}" for name in ("cls_token", "pos_embed") for b in range(len(self.embed_dims))}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """How layer-wise learning rates group the parameters."""
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def reshape_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Fuse keys with values and the two classifiers, drop an exchange that is not there, resize tables."""
        state = {name: tensor for name, tensor in state.items() if not self.lacks(name)}
        fused = {}
        for name, tensor in state.items():
            if ".attn.wk." in name:
                fused[name.replace(".wk.", ".wkv.")] = torch.cat([tensor, state[name.replace(".wk.", ".wv.")]])
            elif name in ("head.0.weight", "head.0.bias"):
                pair = (tensor, state[name.replace("0", "1")])
                fused[name.replace(".0", "")] = torch.cat(pair, 1) if tensor.ndim == 2 else torch.stack(pair)
            elif ".attn.wv." not in name and not name.startswith("head.1."):
                fused[name] = tensor
        for b, table in enumerate(self.pos_embed):
            name = f"pos_embed.{b}"
            if name in fused and fused[name].shape != table.shape:
                fused[name] = resample_positions(fused[name], self.grids[b], prefix=1)
        return fused

    def lacks(self, name: str) -> bool:
        """Whether an entry belongs to an exchange that this model does without."""
        found = re.match(r"blocks\.(\d+)\.(?:projs|fusion|revert_projs)\.", name)
        return found is not None and int(found[1]) < len(self.blocks) and not self.blocks[int(found[1])].fusion


def _rates(rate: float, depths: Sequence[Sequence[int]]) -> list[list[float]]:
    """The stochastic-depth rates of each multi-scale block: they grow over the second branch and the crossings."""
    total = sum(sum(depth[-2:]) for depth in depths)
    rates = [rate * i / max(total - 1, 1) for i in range(total)]
    split, start = [], 0
    for depth in depths:
        count = max(depth[:-1]) + depth[-1]
        split.append(rates[start : start + count] or rates[-1:] or [0.0])
        start += count
    return split


def _model(dim: int, later: int, heads: int, mlp_ratio: float, **kwargs: object) -> dict[str, Any]:
    return {
        "embed_dims": (dim, 2 * dim),
        "depths": ((1, later, 0),) * 3,
        "num_heads": (heads, heads),
        "mlp_ratios": (mlp_ratio, mlp_ratio),
        **kwargs,
    }


_240 = {"input_size": (3, 240, 240), "crop_pct": 0.875}
_408 = {"input_size": (3, 408, 408), "crop_pct": 1.0, "first_conv": "patch_embed.0.proj.0"}
_DAGGER = {**_240, "first_conv": "patch_embed.0.proj.0"}
_LARGER = {"multi_conv": True, "image_scales": (1.0, 384 / 408)}
# the names say 224 and 384, the models take 240 and 408 pixels
VARIANTS = {
    "crossvit_tiny_224": Variant(_model(96, 4, 3, 4), None, ("crossvit_tiny_224.pth",), _240),
    "crossvit_small_224": Variant(_model(192, 4, 6, 4), None, ("crossvit_small_224.pth",), _240),
    "crossvit_base_224": Variant(_model(384, 4, 12, 4), None, ("crossvit_base_224.pth",), _240),
    "crossvit_9_224": Variant(_model(128, 3, 4, 3), None, ("crossvit_9_224.pth",), _240),
    "crossvit_15_224": Variant(_model(192, 5, 6, 3), None, ("crossvit_15_224.pth",), _240),
    "crossvit_18_224": Variant(_model(224, 6, 7, 3), None, ("crossvit_18_224.pth",), _240),
    "crossvit_9_dagger_224": Variant(
        _model(128, 3, 4, 3, multi_conv=True), None, ("crossvit_9_dagger_224.pth",), _DAGGER
    ),
    "crossvit_15_dagger_224": Variant(
        _model(192, 5, 6, 3, multi_conv=True), None, ("crossvit_15_dagger_224.pth",), _DAGGER
    ),
    "crossvit_18_dagger_224": Variant(
        _model(224, 6, 7, 3, multi_conv=True), None, ("crossvit_18_dagger_224.pth",), _DAGGER
    ),
    "crossvit_15_dagger_384": Variant(_model(192, 5, 6, 3, **_LARGER), None, ("crossvit_15_dagger_384.pth",), _408),
    "crossvit_18_dagger_384": Variant(_model(224, 6, 7, 3, **_LARGER), None, ("crossvit_18_dagger_384.pth",), _408),
    "crossvit_nano": Variant(  # ours, for 32-pixel images: 8x8 patches of 4 pixels, and 5x5 of 6 on 30 pixels
        _model(48, 2, 3, 2, patch_sizes=(4, 6), image_scales=(1.0, 30 / 32), fixed_size=False),
        cfg={"input_size": (3, 32, 32), "crop_pct": 1.0},
    ),
}
register(CrossViT, VARIANTS, first_conv="patch_embed.0.proj")

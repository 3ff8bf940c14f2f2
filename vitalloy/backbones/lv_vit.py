"""LV-ViT, a plain vision transformer behind a convolutional stem, and SiT, which merges its tokens on the way.

- "All Tokens Matter: Token Labeling for Training Better Vision Transformers" (LV-ViT), Jiang et al., NeurIPS 2021,
  arXiv 2104.10858.
- "Self-slimmed Vision Transformer" (SiT), Zong et al., ECCV 2022, arXiv 2111.12624: `slim_after` names the blocks
  behind which the patch tokens become fewer (`layers/slimming.py`). How such a model is made from any trained one, and
  what it learns from, is `compression/tokens/sit`.

Loads the files of SiT, student and teacher. These hold modules for training alone (`rtsm`), which are left out, and the
classifier of single tokens (`aux_head`), which SiT does not use and which is read only with `dense_head=True`. With
`stem="4_2", dense_head=True` the model is the LV-ViT-S of Sparsifiner.

Departures: other image sizes resize the position table, as in `vit`. Feature maps of a slimmed model have the whole
grid: what was merged is put back where it came from. With `dense_head` the answer is the same in training, where the
published model returns the logits of single tokens apart for its loss. The published extra token for a convolutional
teacher, whose code cannot run, is left out.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn

from vitalloy.layers.attention import SelfAttention
from vitalloy.layers.backbone import Backbone, Level, drop_path_rates, init_weights
from vitalloy.layers.fusion import fold_norm, fold_scale
from vitalloy.layers.mlp import Mlp
from vitalloy.layers.positions import resample_positions
from vitalloy.layers.slimming import TokenSlimming, put_back, slim_counts
from vitalloy.layers.tokens import to_map, to_tokens
from vitalloy.registry import Variant, register

# kind -> (channels as shares of the width, or None for 64; kernels; strides; convolutions, and a patch projection?)
_STEMS: dict[str, tuple[tuple[int | None, ...], tuple[int, ...], tuple[int, ...], bool]] = {
    "plain": ((), (), (), True),
    "4c": ((8, 4, 2, 1), (3, 3, 3, 3), (2, 2, 2, 2), False),
    "6c": ((8, 8, 8, 4, 2, 1), (3,) * 6, (2, 1, 1, 2, 2, 2), False),
    "4_2": ((None, None, None), (7, 3, 3), (2, 1, 1), True),
}


class Stem(nn.Module):
    """Images (B, in_chans, H, W) -> a map (B, embed_dim, H / patch_size, W / patch_size).

    Args:
        kind: "4c" or "6c": so many 3x3 convolutions, the last without an activation; "4_2": three convolutions, then
            patches; "plain": patches alone.
        patch_size: the stride of the whole. Below 16 the last of the published strides of 2 become 1.
    """

    def __init__(self, kind: str, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        if kind not in _STEMS:
            raise ValueError(f"stem={kind!r} is not one of {sorted(_STEMS)}")
        shares, kernels, strides, patches = _STEMS[kind]
        self.act = nn.ReLU() if kind == "4_2" else nn.GELU()
        self.depth, self.proj, left = len(shares), None, patch_size
        for i, (share, kernel, stride) in enumerate(zip(shares, kernels, strides, strict=True), start=1):
            stride = stride if left % stride == 0 else 1
            left //= stride
            width = embed_dim // share if share else 64
            setattr(self, f"conv{i}", nn.Conv2d(in_chans, width, kernel, stride, kernel // 2, bias=False))
            setattr(self, f"bn{i}", nn.BatchNorm2d(width))
            in_chans = width
        if patches:
            self.proj = nn.Conv2d(in_chans, embed_dim, left, left)
        elif left > 1:
            raise ValueError(f"stem={kind!r} cannot make patches of {patch_size}: it takes 1, 2, 4, 8 or 16")

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        for i in range(1, self.depth + 1):
            x = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x))
            if i < self.depth or self.proj is not None:
                x = self.act(x)
        return x if self.proj is None else self.proj(x)

    def out_side(self, side: int) -> int:
        """The side of the map for a side of the image."""
        convs = [getattr(self, f"conv{i}") for i in range(1, self.depth + 1)]
        for conv in convs if self.proj is None else [*convs, self.proj]:
            side = (side + 2 * conv.padding[0] - conv.kernel_size[0]) // conv.stride[0] + 1
        return side

    def fuse(self) -> None:
        for i in range(1, self.depth + 1):
            conv, norm = getattr(self, f"conv{i}"), getattr(self, f"bn{i}")
            if isinstance(norm, nn.BatchNorm2d):
                setattr(self, f"conv{i}", fold_norm(conv, norm))
                setattr(self, f"bn{i}", nn.Identity())


class Block(nn.Module):
    """Pre-norm self-attention and perceptron; what each adds is divided by `skip_lam`. (B, N, C) -> the same."""

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, skip_lam: float, attn_drop: float, drop_path: float
    ) -> None:
        super().__init__()
        self.skip_lam = skip_lam
        self.norm1 = nn.LayerNorm(dim)
        self.attn = SelfAttention(dim, num_heads, qkv_bias=False, dropout=attn_drop)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x))) / self.skip_lam
        return x + self.drop_path(self.mlp(self.norm2(x))) / self.skip_lam

    def fuse(self) -> None:
        share = torch.tensor(1 / self.skip_lam, device=self.norm1.weight.device)
        self.attn.proj, self.mlp.fc2 = fold_scale(self.attn.proj, share), fold_scale(self.mlp.fc2, share)
        self.skip_lam = 1.0


class LVViT(Backbone):
    """LV-ViT.

    Args:
        img_size: the (height, width) or side that the position table is made for; other inputs resize it.
        stem: "4c", "6c", "4_2" or "plain", see `Stem`.
        skip_lam: the divisor of what each branch adds.
        dense_head: a second classifier `aux_head` at each patch, whose highest logit over all patches counts half.
        slim_after: blocks, counted from 1, behind which the patch tokens are slimmed; the class token stays.
        keep: the share of the patch tokens that each slimming keeps.
        global_pool: "token" (the class token), or "avg", "max", "gem", "ggem" of the patches.
    """

    key_table = (
        (r"^rtsm\.", None),
        (r"^(tsm\.\d+)\.weight\.(.+)", r"\1.score.\2"),
    )
    default_out_indices = 3
    num_prefix_tokens = 1

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 384,
        depth: int = 16,
        num_heads: int = 6,
        mlp_ratio: float = 3.0,
        stem: str = "4c",
        skip_lam: float = 2.0,
        dense_head: bool = False,
        slim_after: Sequence[int] = (),
        keep: float = 0.5,
        global_pool: str = "token",
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.slim_after, self.dense_head = tuple(slim_after), dense_head
        if list(self.slim_after) != sorted({*self.slim_after} & {*range(1, depth + 1)}):
            raise ValueError(f"slim_after={slim_after} must be rising numbers of blocks from 1 to {depth}")
        if not 0 < keep <= 1:
            raise ValueError(f"keep={keep} is no share above 0 and up to 1")
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.num_features = self.embed_dim = embed_dim
        self.patch_embed = Stem(stem, patch_size, in_chans, embed_dim)
        self.grid = (self.patch_embed.out_side(height), self.patch_embed.out_side(width))
        if min(self.grid) < 1:
            raise ValueError(f"img_size={img_size} is smaller than one patch of {patch_size}")
        count = self.grid[0] * self.grid[1]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + count, embed_dim))
        rates = drop_path_rates(drop_path_rate, depth)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, skip_lam, attn_drop_rate, rate) for rate in rates
        )
        self.tsm = nn.ModuleList(
            TokenSlimming(embed_dim, slots, prefix=1) for slots in slim_counts(count, keep, len(self.slim_after))
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"blocks.{i}"} for i in range(depth)
        ]
        for table in (self.cls_token, self.pos_embed):
            trunc_normal_(table, std=0.02)
        self.apply(init_weights)
        self.build_head(num_classes, global_pool, drop_rate)

    def build_head(self, num_classes: int, global_pool: str, drop_rate: float = 0.0) -> None:
        super().build_head(num_classes, global_pool, drop_rate)
        self.aux_head = self.make_classifier(num_classes) if self.dense_head and num_classes else None

    def forward_levels(self, x: Tensor, take: Collection[int], stop: int, norm: bool) -> tuple[Tensor, list[Level]]:
        x = self.patch_embed(x)
        grid = x.shape[-2:]
        table = resample_positions(self.pos_embed, tuple(grid), old_grid=self.grid, prefix=1)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), to_tokens(x)], dim=1) + table
        levels: list[Level] = []
        origins: Tensor | None = None  # (B, M, N): the patches that the tokens came from, once some were merged
        for i, block in enumerate(self.blocks[:stop]):
            x = self.run(block, x)
            if i + 1 in self.slim_after:
                slim = self.tsm[self.slim_after.index(i + 1)]
                if take:
                    mixing = slim.mixing(x[:, 1:])
                    origins = mixing if origins is None else mixing @ origins
                x = slim(x)
            if i in take:
                tokens = self.norm(x) if norm else x
                patches = tokens[:, 1:] if origins is None else put_back(tokens[:, 1:], origins)
                levels.append(Level(to_map(patches, grid), tokens[:, :1]))
        return x, levels

    def forward_final(self, state: Tensor) -> Tensor:
        return self.norm(state)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        logits = super().forward_head(x, pre_logits)
        if pre_logits or self.aux_head is None or not self.global_pool:
            return logits
        return logits + 0.5 * self.aux_head(x[:, 1:]).amax(1)

    def prune_levels(self, keep: int, prune_norm: bool) -> None:
        self.blocks = self.blocks[:keep]
        self.slim_after = tuple(n for n in self.slim_after if n <= keep)
        self.tsm = self.tsm[: len(self.slim_after)]
        if prune_norm:
            self.norm = nn.Identity()

    def no_weight_decay(self) -> set[str]:
        return {"cls_token", "pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """How layer-wise learning rates group the parameters; slimming modules learn as the last block does."""
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^(?:tsm|norm|aux_head)", (99999,))],
        }

    def reshape_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        table = state.get("pos_embed")
        if table is not None and table.shape != self.pos_embed.shape:
            state["pos_embed"] = resample_positions(table, self.grid, prefix=1)
        return state if self.dense_head else {k: v for k, v in state.items() if not k.startswith("aux_head.")}


class SelfSlimmedViT(LVViT):
    """SiT: LV-ViT whose patch tokens are slimmed behind the blocks `slim_after`."""


_NANO: dict[str, Any] = {"embed_dim": 96, "depth": 6, "num_heads": 3, "patch_size": 4}
_TINY: dict[str, Any] = {"embed_dim": 320, "depth": 14, "num_heads": 5}
_SMALL: dict[str, Any] = {"embed_dim": 384, "depth": 16, "num_heads": 6}
_MEDIUM: dict[str, Any] = {"embed_dim": 512, "depth": 20, "num_heads": 8}
_LARGE: dict[str, Any] = {"embed_dim": 768, "depth": 24, "num_heads": 12, "stem": "6c", "skip_lam": 3.0}
_32 = {"input_size": (3, 32, 32), "crop_pct": 1.0}
_288 = {"input_size": (3, 288, 288)}
_EARLY, _LATE = (1, 2, 3), (10, 14, 17)
VARIANTS = {
    "lvvit_nano": Variant(_NANO, cfg=_32),  # ours, for small images
    "lvvit_tiny": Variant(_TINY, 81.8),
    "lvvit_small": Variant(_SMALL, 83.1),
    "lvvit_medium": Variant(_MEDIUM, 84.0),
    "lvvit_large": Variant(_LARGE, 85.3, cfg=_288),
}
SLIMMED = {
    "sit_nano": Variant({**_NANO, "slim_after": (2, 4)}, cfg=_32),  # ours
    "sit_tiny": Variant({**_TINY, "slim_after": _EARLY}, 80.1),
    "sit_xsmall": Variant({**_SMALL, "slim_after": _EARLY}, 81.2),
    "sit_small": Variant({**_SMALL, "slim_after": (9, 12, 14)}, 83.1),
    "sit_medium": Variant({**_MEDIUM, "slim_after": _LATE}, 84.2),
    "sit_large": Variant({**_LARGE, "slim_after": _LATE}, 85.6, cfg=_288),
}
register(LVViT, VARIANTS, first_conv="patch_embed.conv1", crop_pct=0.875)
register(SelfSlimmedViT, SLIMMED, first_conv="patch_embed.conv1", crop_pct=0.875)

"""UniFormer light: the smallest UniFormers, whose late stages attend among half of the tokens (token slimming).

"UniFormer: Unifying Convolution and Self-attention for Visual Recognition", Li et al., TPAMI 2023, arXiv 2201.09450;
the slimming is that of "Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer", Xu et al., AAAI 2022,
arXiv 2108.01390. Loads the authors' files.

A class token joins in stage 3. How much it attends to each patch, averaged over heads and blocks, is the patch's
score. A slimming block attends among the class token, the patches with the highest scores and one token that stands
for the others; the others get what that one got, so the map stays whole.

In training the model returns two answers, (logits of the averaged map, logits of the class token), and learns from the
mean of both losses; in evaluation the first.

Departures: scores go from block to block as arguments (the published code keeps them in globals, so two models in one
process disturb each other), nothing is sorted (chosen tokens are put back by their index), and the scores shrink with
the map behind stage 3 whatever its last block does. With one or two tokens left only the chosen ones' scores are
renewed, where the published code takes these blocks for whole ones. Where all scores of a sum are zero in half
precision the merged token is zero instead of NaN.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from vitalloy.layers.attention import SelfAttention, merge_heads
from vitalloy.layers.backbone import Level, drop_path_rates, init_weights
from vitalloy.layers.tokens import to_map, to_tokens
from vitalloy.layers.uniformer import Block, ConvEmbed, LocalBlock, PatchEmbed, UniFormerPyramid
from vitalloy.registry import Variant, register

State = tuple[Tensor, Tensor | None]


class ScoringAttention(SelfAttention):
    """Self-attention that also tells how much the first token attends to each, averaged over heads."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, N, C) -> the same shape, and (B, N), in float32 or better."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, N, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        first = q[:, :, :1] * q.shape[-1] ** -0.5 @ k.mT  # (B, heads, 1, N): one row again saves the whole matrix
        scores = first.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).mean((1, 2))
        return self.proj(merge_heads(self.attend(q, k, v))), scores


class SlimmingBlock(Block):
    """Attention and perceptron on the class token, the patches with the highest scores and a merged token.

    Args:
        keep: share of the patches that take part themselves; 1 for all, without a merged token.
        trade_off: weight of this block's scores against those so far.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        attn_drop: float,
        drop_path: float,
        layer_scale: float | None,
        keep: float,
        trade_off: float,
    ) -> None:
        super().__init__(dim, 2, mlp_ratio, drop_path, layer_scale)
        self.keep, self.trade_off = keep, trade_off
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = ScoringAttention(dim, num_heads, qkv_bias, attn_drop)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        scaled = layer_scale is not None and keep < 1
        self.gamma_3 = nn.Parameter(torch.full((dim,), layer_scale)) if scaled else None
        self.apply(init_weights)

    def forward(self, cls: Tensor, x: Tensor, scores: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Class token (B, 1, C), map (B, C, H, W) and scores (B, H * W), None before the first block -> the same."""
        x = self.pos_embed(x)
        grid, tokens = x.shape[2:], to_tokens(x)
        cls = cls.to(tokens.dtype)
        if self.keep == 1 or scores is None:
            cls_and_tokens, fresh, _ = self.relate(torch.cat([cls, tokens], 1))
            fresh = fresh[:, 1:]
            scores = fresh if scores is None else scores + self.trade_off * (fresh - scores)
            return cls_and_tokens[:, :1], to_map(cls_and_tokens[:, 1:], grid), scores

        count = tokens.shape[1]
        chosen = scores.topk(int(count * self.keep), sorted=False).indices  # (B, K)
        first = torch.arange(0, tokens.shape[0] * count, count, device=x.device)
        rows = (chosen + first.unsqueeze(1)).flatten()  # of all images' tokens: moving whole rows is the fastest
        others = scores.scatter(1, chosen, 0.0)
        weights = others / others.sum(1, keepdim=True).clamp(min=torch.finfo(others.dtype).tiny)
        merged = weights.unsqueeze(1).to(tokens.dtype) @ tokens
        picked = tokens.flatten(0, 1).index_select(0, rows).unflatten(0, chosen.shape)
        related, fresh, change = self.relate(torch.cat([cls, picked, merged], 1))

        known = scores.gather(1, chosen)
        scores = scores.scatter(1, chosen, known + self.trade_off * (fresh[:, 1:-1] - known))
        change = change if self.gamma_3 is None else change * self.gamma_3
        tokens = (tokens + change).flatten(0, 1).index_copy(0, rows, related[:, 1:-1].flatten(0, 1))
        return related[:, :1], to_map(tokens.unflatten(0, (-1, count)), grid), scores

    def relate(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, N, C) -> tokens, scores (B, N), and what both branches say of the last token, unscaled."""
        attended, scores = self.attn(self.norm1(x))
        x = self.add(x, attended, self.gamma_1)
        perceived = self.mlp(self.norm2(x))
        return self.add(x, perceived, self.gamma_2), scores, attended[:, -1:] + perceived[:, -1:]


def shrink(scores: Tensor, grid: Sequence[int]) -> Tensor:
    """Scores (B, H * W) of a map of half the sides, of the same sum an image."""
    shrunk = F.avg_pool2d(scores.unflatten(1, tuple(grid)).unsqueeze(1), 2).flatten(1)
    return shrunk * (scores.sum(1, keepdim=True) / shrunk.sum(1, keepdim=True))


class UniFormerLight(UniFormerPyramid):
    """UniFormer light: four stages of strides 4, 8, 16 and 32, a class token in the last two.

    Args:
        depths, embed_dims: blocks and channels, one entry a stage.
        head_dim: channels of a head.
        patch_stride: stride of the first stage; 2 suits small images.
        conv_stem: overlapping patches in the first stage.
        layer_scale: where the scales of all blocks' branches start; None for none.
        keep: share of patches that take part, one list a global stage; all in the first block, then half, by default.
        trade_off: weight of a block's own scores, one list a global stage; 1 in the first block, then 0.5, by default.
        global_pool: of the map: "avg", "max" or "".
    """

    num_prefix_tokens = 1

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        depths: Sequence[int] = (2, 5, 8, 2),
        embed_dims: Sequence[int] = (56, 112, 224, 448),
        head_dim: int = 28,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = True,
        patch_stride: int = 4,
        conv_stem: bool = True,
        layer_scale: float | None = None,
        keep: Sequence[Sequence[float]] | None = None,
        trade_off: Sequence[Sequence[float]] | None = None,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        usual = [[1.0, *[0.5] * (depths[2] - 1)], [0.5] * depths[3]]
        keep, trade_off = keep or usual, trade_off or usual
        if keep[0][0] != 1:
            raise ValueError(f"keep={keep}: the first block must keep all patches, as none has a score yet")
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        for i, dim in enumerate(embed_dims):
            stride, width = (2, embed_dims[i - 1]) if i else (patch_stride, in_chans)
            embed: nn.Module = PatchEmbed(width, dim, (stride, stride), (stride, stride))
            if conv_stem and not i:
                embed = ConvEmbed((width, dim // 2, dim), (2, stride // 2))
            blocks: list[nn.Module] = [
                LocalBlock(dim, 2, mlp_ratio, next(rates), layer_scale)
                if i < 2
                else SlimmingBlock(
                    dim,
                    dim // head_dim,
                    mlp_ratio,
                    qkv_bias,
                    attn_drop_rate,
                    next(rates),
                    layer_scale,
                    keep[i - 2][j],
                    trade_off[i - 2][j],
                )
                for j in range(depths[i])
            ]
            self.add_stage(embed, blocks, nn.Identity(), dim, patch_stride * 2**i)
        self.cls_token: nn.Parameter | None = nn.Parameter(torch.zeros(1, 1, embed_dims[2]))
        self.cls_upsample: nn.Module | None = nn.Linear(embed_dims[2], embed_dims[3])
        self.norm = nn.BatchNorm2d(self.num_features)
        self.norm_cls = nn.LayerNorm(self.num_features, eps=1e-6)
        trunc_normal_(self.cls_token, std=0.02)
        init_weights(self.cls_upsample)
        self.build_head(num_classes, global_pool, drop_rate)

    def build_head(self, num_classes: int, global_pool: str, drop_rate: float = 0.0) -> None:
        super().build_head(num_classes, global_pool, drop_rate)
        self.head_cls = self.make_classifier(num_classes) if num_classes else None

    def forward_levels(self, x: Tensor, take: Collection[int], stop: int, norm: bool) -> tuple[State, list[Level]]:
        cls, scores, levels, final = None, None, [], (x, None)
        for i in range(min(stop, self.num_stages)):
            if i == 3:
                cls, scores = self.cls_upsample(cls), shrink(scores, x.shape[2:])
            x = self.get_submodule(f"patch_embed{i + 1}")(x)
            if i == 2:
                cls = self.cls_token.repeat(x.shape[0], 1, 1)  # no view: PyTorch's counter of operations stops at one
            for block in self.get_submodule(f"block{i + 1}"):
                if cls is None:
                    x = self.run(block, x)
                else:
                    cls, x, scores = self.run(block, cls, x, scores)
            final = (self.norm(x), self.norm_cls(cls)) if i == 3 else (x, cls)
            if i in take:
                levels.append(Level(*final) if norm else Level(x, cls))
        return final, levels

    def forward_final(self, state: State) -> Tensor:
        x, cls = state
        return to_tokens(x) if cls is None else torch.cat([cls, to_tokens(x)], 1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        logits = super().forward_head(x, pre_logits)
        if pre_logits or not self.training or self.head_cls is None:
            return logits
        return logits, self.head_cls(self.head_drop(x[:, 0]))

    def prune_levels(self, keep: int, prune_norm: bool) -> None:
        if prune_norm or keep < self.num_stages:
            self.norm_cls = nn.Identity()
        if keep < 4:
            self.cls_upsample = None
        if keep < 3:
            self.cls_token = None
        super().prune_levels(keep, prune_norm)

    def no_weight_decay(self) -> set[str]:
        return {"cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        groups = super().group_matcher(coarse)
        fine = [(groups["blocks"], None)] if coarse else groups["blocks"]
        cls = [(r"^cls_token", (3, 0)), (r"^cls_upsample", (4, 0)), (r"^norm_cls|^head_cls", (99999,))]
        return {**groups, "blocks": [*cls, *fine]}


def _at(side: int) -> dict[str, Any]:
    return {"input_size": (3, side, side), "crop_pct": 0.875}


_XS = {"depths": (3, 5, 9, 3), "embed_dims": (64, 128, 256, 512), "head_dim": 32}
VARIANTS = {
    "uniformer_light_nano": Variant(  # ours, for 32-pixel images: strides 2, 4, 8, 16
        {"depths": (1, 2, 3, 1), "embed_dims": (24, 48, 96, 128), "head_dim": 32, "patch_stride": 2},
        cfg={"input_size": (3, 32, 32), "crop_pct": 1.0},
    ),
    "uniformer_xxs_128": Variant({}, 76.8, ("uniformer_xxs_128_in1k.pth",), _at(128)),
    "uniformer_xxs_160": Variant({}, 79.1, ("uniformer_xxs_160_in1k.pth",), _at(160)),
    "uniformer_xxs_192": Variant({}, 79.9, ("uniformer_xxs_192_in1k.pth",), _at(192)),
    "uniformer_xxs_224": Variant({}, 80.6, ("uniformer_xxs_224_in1k.pth",), _at(224)),
    "uniformer_xs_192": Variant(_XS, 81.5, ("uniformer_xs_192_in1k.pth",), _at(192)),
    "uniformer_xs_224": Variant(_XS, 82.0, ("uniformer_xs_224_in1k.pth",), _at(224)),
}
register(UniFormerLight, VARIANTS, first_conv="patch_embed1.proj.0")

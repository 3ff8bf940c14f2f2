"""DHVT: a vision transformer that trains from scratch on few images, by three local biases and no position table.

"Bridging the Gap Between Vision Transformers and Convolutional Neural Networks on Small Datasets", Lu et al., NeurIPS
2022, arXiv 2210.05958. The biases: patches are embedded by overlapping convolutions; the perceptron has a depth-wise
convolution and weighs the class token by what the patches hold; in the attention, groups of channels talk to each other
through head tokens. Loads files under the authors' names; they have released none.

Where the authors' code stops, this goes on: a patch grid need not be square. Their switch to a plain ViT and their
distillation token fail in the published file and are left out. Patches of 8 are an inference of ours by the same rule.
The vectors `pos_embed` of the head tokens take weight decay, as in the code; only the class token is spared.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn

from vitalloy.layers.attention import Attend, fitting_heads, merge_heads
from vitalloy.layers.backbone import Backbone, Level, drop_path_rates, init_weights
from vitalloy.layers.conv_norm import ConvNorm
from vitalloy.layers.fusion import fold_norm, fold_scale
from vitalloy.layers.streaming import GROUP, activate_, may_stream
from vitalloy.layers.tokens import to_map, to_tokens
from vitalloy.registry import Variant, register


class Affine(nn.Module):
    """alpha * x + beta, one of each a channel of a map."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, dim, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.beta, x, self.alpha)


class OverlapPatchEmbed(nn.Module):
    """Sequential overlapping patch embedding: 3x3 convolutions of stride 2, as many as it takes, between two affines.

    GELU follows every convolution but the last, and a single one.

    Args:
        patch_size: pixels a token, a power of two.
    """

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        count = patch_size.bit_length() - 1
        if patch_size < 2 or 2**count != patch_size:
            raise ValueError(f"patch_size={patch_size} is not a power of two from 2 on")
        widths = [in_chans, *(embed_dim // 2 ** (count - 1 - i) for i in range(count))]
        self.pre_affine = Affine(in_chans)
        self.proj = nn.Sequential(
            *(
                ConvNorm(widths[i], widths[i + 1], 3, 2, act=nn.GELU if i + 1 < count or count == 1 else nn.Identity)
                for i in range(count)
            )
        )
        self.post_affine: nn.Module = Affine(embed_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Images (B, C, H, W) -> tokens (B, N, D) and their grid."""
        x = self.post_affine(self.proj(self.pre_affine(x.contiguous(memory_format=torch.channels_last))))
        return to_tokens(x), x.shape[-2:]

    @torch.no_grad()
    def fuse(self) -> None:
        """The affine behind goes into the last convolution where nothing is between them.

        The one in front cannot go: the convolution's border is zero, whatever the affine makes of zero.
        """
        last, affine = self.proj[-1], self.post_affine
        if isinstance(affine, Affine) and isinstance(last.act, nn.Identity):
            last.fuse()
            last.conv = fold_scale(last.conv, affine.alpha)
            last.conv.bias += affine.beta.flatten()
            self.post_affine = nn.Identity()


class HeadTokenAttention(nn.Module):
    """Head-interacted self-attention: each head's mean channels make a token that attends with all others.

    The head tokens are made anew at each call, and their outputs are averaged into the class token.

    Args:
        dropout: probability of dropping an attention weight in training.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads = fitting_heads(dim, num_heads)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attend = Attend(dropout)
        self.proj = nn.Linear(dim, dim)
        self.ht_proj = nn.Linear(dim // num_heads, dim)
        self.ht_norm = nn.LayerNorm(dim // num_heads)  # eps 1e-5, where the blocks have 1e-6
        self.act = nn.GELU()
        self.pos_embed = nn.Parameter(torch.zeros(1, num_heads, dim))
        trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 1 + N, C), the class token first -> the same shape."""
        heads = self.num_heads
        qkv = self.qkv(torch.cat([x, self.head_tokens(x)], 1)).unflatten(-1, (3, heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, 1 + N + heads, d)
        x = self.proj(merge_heads(self.attend(q, k, v)))
        return torch.cat([x[:, :1] + x[:, -heads:].mean(1, keepdim=True), x[:, 1:-heads]], 1)

    def head_tokens(self, x: Tensor) -> Tensor:
        """x (B, 1 + N, C) -> (B, heads, C)."""
        means = x.mean(1).unflatten(-1, (self.num_heads, -1))  # (B, heads, d)
        tokens = self.ht_proj(means).unflatten(-1, (self.num_heads, -1))  # (B, heads, heads, d)
        return self.act(self.ht_norm(tokens)).flatten(2) + self.pos_embed


class AggregationFeedForward(nn.Module):
    """Dynamic aggregation feed-forward: a perceptron with a residual depth-wise convolution, for the patches.

    The class token is multiplied by what a small perceptron makes of their mean.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.norm1: nn.Module = nn.BatchNorm2d(hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.norm2: nn.Module = nn.BatchNorm2d(hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.norm3: nn.Module = nn.BatchNorm2d(dim)
        self.act = nn.GELU()
        self.compress = nn.Linear(dim, dim // 4)
        self.excitation = nn.Linear(dim // 4, dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """x (B, 1 + N, C), the class token first -> the same shape."""
        parts = (self.fc1, self.norm1, self.act, self.dwconv, self.norm2, self.fc2, self.norm3)
        pieces = may_stream(x, *parts)
        patches = self.mix_in_pieces(x[:, 1:], grid) if pieces else self.mix(x[:, 1:], grid)
        scale = self.excitation(self.act(self.compress(patches.mean(1, keepdim=True))))
        return torch.cat([x[:, :1] * scale, patches], 1)

    def mix(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """The patches alone, (B, N, C) -> the same shape."""
        wide = self.act(self.norm1(to_map(self.fc1(x), grid)))
        mixed = self.act(self.norm2(self.dwconv(wide)))
        mixed += wide  # in place: no layer keeps the result of a GELU for its gradient
        return to_tokens(self.norm3(to_map(self.fc2(to_tokens(mixed)), grid)))

    def mix_in_pieces(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """The same after `fuse()` without gradients, a few images at a time: the wide map stays in a small buffer."""
        group = min(len(x), max(1, GROUP // (x.shape[1] * self.fc1.out_features)))
        out = x.new_empty(x.shape)
        buffer = x.new_empty(group, x.shape[1], self.fc1.out_features)
        conv = self.dwconv
        for piece, result in zip(x.split(group), out.split(group), strict=True):
            wide = buffer[: len(piece)]
            torch.addmm(self.fc1.bias, piece.flatten(0, 1), self.fc1.weight.t(), out=wide.flatten(0, 1))
            wide = activate_(self.act, wide)
            mixed = F.conv2d(to_map(wide, grid), conv.weight, conv.bias, padding=1, groups=conv.groups)
            wide += activate_(self.act, to_tokens(mixed))
            torch.addmm(self.fc2.bias, wide.flatten(0, 1), self.fc2.weight.t(), out=result.flatten(0, 1))
        return out

    def fuse(self) -> None:
        if isinstance(self.norm1, nn.BatchNorm2d):
            self.fc1, self.norm1 = fold_norm(self.fc1, self.norm1), nn.Identity()
            self.dwconv, self.norm2 = fold_norm(self.dwconv, self.norm2), nn.Identity()
            self.fc2, self.norm3 = fold_norm(self.fc2, self.norm3), nn.Identity()


class Block(nn.Module):
    """Pre-norm attention with head tokens and aggregating feed-forward, each with a residual."""

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, qkv_bias: bool, attn_drop: float, drop_path: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = HeadTokenAttention(dim, num_heads, qkv_bias, attn_drop)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = AggregationFeedForward(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x), grid))


class DynamicHybridViT(Backbone):
    """DHVT: one width, one class token, tokens of `patch_size` pixels.

    Args:
        patch_size: a power of two.
        global_pool: "token" (the class token), or "avg", "max" of the patches.
    """

    num_prefix_tokens = 1
    default_out_indices = 3
    key_table = (
        (r"^patch_embed\.proj\.0\.0\.", "patch_embed.proj.0.conv."),
        (r"^patch_embed\.proj\.0\.1\.", "patch_embed.proj.0.norm."),
        *((rf"^patch_embed\.proj\.{2 * i}\.0\.", f"patch_embed.proj.{i}.conv.") for i in range(1, 4)),
        *((rf"^patch_embed\.proj\.{2 * i}\.1\.", f"patch_embed.proj.{i}.norm.") for i in range(1, 4)),
        (r"\.mlp\.conv1\.", ".mlp.fc1."),
        (r"\.mlp\.conv2\.", ".mlp.dwconv."),
        (r"\.mlp\.conv3\.", ".mlp.fc2."),
        (r"\.mlp\.bn(\d)\.", r".mlp.norm\1."),
    )

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        patch_size: int = 16,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        global_pool: str = "token",
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_features = self.embed_dim = embed_dim
        self.patch_embed = OverlapPatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        rates = drop_path_rates(drop_path_rate, depth)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias, attn_drop_rate, rate) for rate in rates
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"blocks.{i}"} for i in range(depth)
        ]
        trunc_normal_(self.cls_token, std=0.02)
        self.apply(init_weights)
        self.apply(init_feed_forward)
        self.build_head(num_classes, global_pool, drop_rate)

    def forward_levels(self, x: Tensor, take: Collection[int], stop: int, norm: bool) -> tuple[Tensor, list[Level]]:
        x, grid = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1)
        levels = []
        for i, block in enumerate(self.blocks[:stop]):
            x = self.run(block, x, grid)
            if i in take:
                tokens = self.norm(x) if norm else x
                levels.append(Level(to_map(tokens[:, 1:], grid), tokens[:, :1]))
        return x, levels

    def forward_final(self, state: Tensor) -> Tensor:
        return self.norm(state)

    def prune_levels(self, keep: int, prune_norm: bool) -> None:
        self.blocks, self.feature_info = self.blocks[:keep], self.feature_info[:keep]
        if prune_norm:
            self.norm = nn.Identity()

    def no_weight_decay(self) -> set[str]:
        return {"cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """How layer-wise learning rates group the parameters."""
        return {"stem": r"^cls_token|patch_embed", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}

    def reshape_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        linear = (".mlp.fc1.weight", ".mlp.fc2.weight")  # published as 1x1 convolutions
        return {name: value.flatten(1) if name.endswith(linear) else value for name, value in state.items()}


def init_feed_forward(module: nn.Module) -> None:
    """Layers that are 1x1 convolutions in the authors' code start as PyTorch makes those. For `nn.Module.apply`."""
    if isinstance(module, AggregationFeedForward):
        module.fc1.reset_parameters()
        module.fc2.reset_parameters()


def _cifar(patch_size: int, embed_dim: int, num_heads: int) -> Variant:
    cfg = {"input_size": (3, 32, 32), "crop_pct": 1.0, "num_classes": 100}
    return Variant({"patch_size": patch_size, "embed_dim": embed_dim, "num_heads": num_heads}, cfg=cfg)


_SMALL = {"embed_dim": 384, "num_heads": 6}
VARIANTS = {
    "dhvt_tiny_cifar_patch4": _cifar(4, 192, 4),
    "dhvt_small_cifar_patch4": _cifar(4, 384, 8),
    "dhvt_tiny_cifar_patch2": _cifar(2, 192, 4),
    "dhvt_small_cifar_patch2": _cifar(2, 384, 8),
    "dhvt_tiny_domainnet": Variant({"num_heads": 4}, cfg={"num_classes": 345}),
    "dhvt_small_domainnet": Variant(_SMALL, cfg={"num_classes": 345}),
    "dhvt_tiny": Variant({}, 77.6),
    "dhvt_small": Variant(_SMALL, 82.3),
}
register(DynamicHybridViT, VARIANTS, first_conv="patch_embed.proj.0.conv")

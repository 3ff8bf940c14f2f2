"""CAS-ViT: mobile backbones whose attention adds gated queries and keys; no product of tokens, no softmax.

"CAS-ViT: Convolutional Additive Self-attention Vision Transformers for Efficient Mobile Applications", Zhang et al.,
2024, arXiv 2408.03703. Every operation is a convolution or works at one position, so any input size runs at a cost
linear in the pixels. Loads the authors' files (their code calls the model RCViT) for classification and, with
`features_only=True`, for dense prediction.

Where paper and code differ, the code is followed: a depth-wise convolution works on the sum of queries and keys, and
the projection behind the product with the values is depth-wise too. The published sizes count a second classifier that
the released training script never makes: here `distilled=True` makes it. A file with two classifiers loads into a model
with one as their mean, which is what the published model answers in evaluation; a file with one loads into both.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from vitalloy.layers.backbone import Level, drop_path_rates
from vitalloy.layers.conv_norm import ConvNorm
from vitalloy.layers.distilled_head import DistilledHead
from vitalloy.layers.fusion import fold_norm_before
from vitalloy.layers.mlp import Mlp
from vitalloy.layers.tokens import to_map, to_tokens
from vitalloy.registry import Variant, register

# the result of a convolution or norm is seen by nothing but the ReLU behind it: no second map
relu = partial(nn.ReLU, inplace=True)


class LinearPair(nn.Module):
    """Two linear maps without biases side by side, each from its own half of the channels to its own outputs.

    One product with a matrix that is half zeros, because grouped convolutions take longer.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2 * out_features, in_features))
        nn.init.uniform_(self.weight, -(in_features**-0.5), in_features**-0.5)

    def matrix(self) -> Tensor:
        return torch.block_diag(*self.weight.chunk(2))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., 2 * in_features) -> (..., 2 * out_features)."""
        return nn.functional.linear(x, self.matrix())

    @torch.no_grad()
    def fused(self) -> nn.Linear:
        matrix = self.matrix()
        linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False).to(matrix)
        linear.weight.copy_(matrix)
        return linear


class AdditiveAttention(nn.Module):
    """Queries and keys pass a gate for each pixel and one for each channel, are added, convolved, and scale the values.

    Queries and keys have weights of their own but lie side by side, so that each step is one operation for both.
    """

    def __init__(self, dim: int, qkv_bias: bool = False) -> None:
        super().__init__()
        self.qk = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)  # apart, so that the convolutions read dense maps
        self.near = ConvNorm(2 * dim, 2 * dim, 3, groups=2 * dim, bias=True, act=relu)
        self.pixel_gate: nn.Module = LinearPair(dim, 1)
        self.channel_gate: nn.Module = LinearPair(dim, dim)
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.proj = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> the same shape."""
        tokens, grid = to_tokens(x), x.shape[-2:]
        q, k = self.gate(to_map(self.qk(tokens), grid))
        context = self.dwc(to_map(q + k, grid))
        return self.proj(context * to_map(self.v(tokens), grid))

    def gate(self, qk: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys side by side in a map (B, 2 C, H, W) -> each gated, as tokens (B, N, C)."""
        pixels = self.pixel_gate(to_tokens(self.near(qk))).sigmoid()  # (B, N, 2)
        gated = to_tokens(qk).unflatten(-1, (2, -1)) * pixels.unsqueeze(-1)  # (B, N, 2, C)
        channels = self.channel_gate(gated.mean(1).flatten(1)).sigmoid()  # (B, 2 C)
        q, k = (gated * channels.view(-1, 1, 2, gated.shape[-1])).unbind(2)
        return q, k

    def fuse(self) -> None:
        if isinstance(self.pixel_gate, LinearPair):
            self.pixel_gate, self.channel_gate = self.pixel_gate.fused(), self.channel_gate.fused()


class Block(nn.Module):
    """Local perception, additive attention and a perceptron, each with a residual; batch norm before the last two."""

    def __init__(self, dim: int, mlp_ratio: float, qkv_bias: bool = False, drop_path: float = 0.0) -> None:
        super().__init__()
        self.local = nn.Sequential(
            ConvNorm(dim, dim, bias=True),
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim),
            nn.GELU(),
            nn.Conv2d(dim, dim, 1),
        )
        self.norm1: nn.Module = nn.BatchNorm2d(dim)
        self.attn = AdditiveAttention(dim, qkv_bias)
        self.norm2: nn.Module = nn.BatchNorm2d(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> the same shape."""
        x = x + self.local(x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        branch = self.mlp(to_tokens(self.norm2(x)))
        return x + self.drop_path(to_map(branch, x.shape[-2:]))

    def fuse(self) -> None:
        """The norms go into the linear layers behind them."""
        if isinstance(self.norm1, nn.BatchNorm2d):
            self.attn.qk = fold_norm_before(self.norm1, self.attn.qk)
            self.attn.v = fold_norm_before(self.norm1, self.attn.v)
            self.mlp.fc1 = fold_norm_before(self.norm2, self.mlp.fc1)
            self.norm1, self.norm2 = nn.Identity(), nn.Identity()


class Stage(nn.Module):
    """One level: a strided embedding, then blocks."""

    def __init__(self, embed: nn.Module, blocks: list[Block]) -> None:
        super().__init__()
        self.embed = embed
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, run: Callable[..., Tensor] = lambda block, *args: block(*args)) -> Tensor:
        """x (B, C, H, W); `run` calls a block."""
        x = self.embed(x)
        for block in self.blocks:
            x = run(block, x)
        return x


def _key_table() -> list[tuple[str, str]]:
    """The authors' stages, which they count through with the embeddings between them, under ours."""
    parts = {
        r"local_perception\.network\.0\.": "local.0.conv.",
        r"local_perception\.network\.1\.": "local.0.norm.",
        r"local_perception\.network\.2\.": "local.1.",
        r"local_perception\.network\.4\.": "local.3.",
        r"attn\.oper_([qk])\.0\.block\.0\.": r"attn.\2.near.conv.",
        r"attn\.oper_([qk])\.0\.block\.1\.": r"attn.\2.near.norm.",
        r"attn\.oper_([qk])\.0\.block\.3\.": r"attn.\2.pixel_gate.",
        r"attn\.oper_([qk])\.1\.block\.1\.": r"attn.\2.channel_gate.",
        "": "",
    }
    table = [
        (r"^patch_embed\.0\.", "stages.0.embed.0.conv."),
        (r"^patch_embed\.1\.", "stages.0.embed.0.norm."),
        (r"^patch_embed\.3\.", "stages.0.embed.1.conv."),
        (r"^patch_embed\.4\.", "stages.0.embed.1.norm."),
        (r"^norm\.", "norms.3."),
        (r"^dist_head\.", "head_dist."),
    ]
    for i in range(4):
        table.append((rf"^norm{2 * i}\.", f"norms.{i}."))
        table.append((rf"^network\.{2 * i + 1}\.proj\.", f"stages.{i + 1}.embed.conv."))
        table.append((rf"^network\.{2 * i + 1}\.norm\.", f"stages.{i + 1}.embed.norm."))
        for theirs, ours in parts.items():
            table.append((rf"^network\.{2 * i}\.(\d+)\.{theirs}", rf"stages.{i}.blocks.\1.{ours}"))
    return table


# published as 1x1 convolutions
_LINEAR = ("fc1.weight", "fc2.weight", "gate.weight")


class CASViT(DistilledHead):
    """CAS-ViT: four stages of strides 4, 8, 16 and 32.

    Args:
        embed_dims, depths: one entry a stage.
        qkv_bias: biases of the query, key and value projections.
        patch_stride: stride of the first stage, 2 or 4; 2 suits small images.
        output_norms: each map passes a norm of its own on its way out: the published form for dense prediction, which
            `features_only=True` builds.
        distilled: a second classifier. In training after `set_distilled_training(True)` the model returns both
            classifiers' logits; otherwise their mean.
        global_pool: "avg", "max" or "".
    """

    key_table = _key_table()
    features_arch = {"output_norms": True}
    default_out_indices = (0, 1, 2, 3)

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dims: Sequence[int] = (48, 56, 112, 220),
        depths: Sequence[int] = (2, 2, 4, 2),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        patch_stride: int = 4,
        output_norms: bool = False,
        distilled: bool = False,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if patch_stride not in (2, 4):
            raise ValueError(f"patch_stride={patch_stride} is neither 2 nor 4")
        self.distilled, self.output_norms = distilled, output_norms
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        first, half = embed_dims[0], embed_dims[0] // 2
        embed: nn.Module = nn.Sequential(
            ConvNorm(in_chans, half, 3, 2, bias=True, act=relu),
            ConvNorm(half, first, 3, patch_stride // 2, bias=True, act=relu),
        )
        self.stages, self.norms = nn.ModuleList(), nn.ModuleList()
        self.feature_info: list[dict[str, Any]] = []
        for i, (dim, depth) in enumerate(zip(embed_dims, depths, strict=True)):
            if i:
                embed = ConvNorm(embed_dims[i - 1], dim, 3, 2, bias=True)
            self.stages.append(Stage(embed, [Block(dim, mlp_ratio, qkv_bias, next(rates)) for _ in range(depth)]))
            normed = output_norms or i == len(depths) - 1
            self.norms.append(nn.BatchNorm2d(dim) if normed else nn.Identity())
            self.feature_info.append({"num_chs": dim, "reduction": patch_stride * 2**i, "module": f"stages.{i}"})
        self.num_features = embed_dims[-1]
        self.build_head(num_classes, global_pool, drop_rate)  # all else starts as PyTorch makes it, as published

    def forward_levels(self, x: Tensor, take: Collection[int], stop: int, norm: bool) -> tuple[Tensor, list[Level]]:
        x = x.contiguous(memory_format=torch.channels_last)
        levels = []
        for i, stage in enumerate(self.stages[:stop]):
            x = stage(x, self.run)
            if i in take:
                levels.append(Level(self.norms[i](x) if norm or self.output_norms else x))
        return x, levels

    def forward_final(self, state: Tensor) -> Tensor:
        return to_tokens(self.norms[-1](state))

    def prune_levels(self, keep: int, prune_norm: bool) -> None:
        self.stages, self.norms, self.feature_info = self.stages[:keep], self.norms[:keep], self.feature_info[:keep]
        self.num_features = self.feature_info[-1]["num_chs"]
        if prune_norm and not self.output_norms:
            self.norms[-1] = nn.Identity()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """How layer-wise learning rates group the parameters."""
        fine = [(r"^stages\.(\d+)\.embed", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norms", (99999,))]
        return {"stem": r"^stages\.0\.embed", "blocks": r"^(?:stages|norms)\.(\d+)" if coarse else fine}

    def reshape_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        converted: dict[str, Tensor] = {}
        for name, value in state.items():
            if ".attn.q." in name:  # queries and keys side by side
                pair = [value, state[name.replace(".attn.q.", ".attn.k.")]]
                converted[name.replace(".attn.q.", ".attn.")] = torch.cat(pair) if value.ndim else value
            elif ".attn.qkv." in name:
                qk, v = value.flatten(1 if value.ndim > 1 else 0).tensor_split([len(value) // 3 * 2])
                converted[name.replace(".qkv.", ".qk.")], converted[name.replace(".qkv.", ".v.")] = qk, v
            elif ".attn.k." not in name:
                converted[name] = value
        for name in converted:
            if name.endswith(_LINEAR):
                converted[name] = converted[name].flatten(1)
        return self.match_heads(converted)

    def match_heads(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """One classifier from two, or two from one, with the same answers in evaluation mode."""
        for leaf in ("weight", "bias"):
            mine, other = f"head.{leaf}", f"head_dist.{leaf}"
            if self.distilled and mine in state:
                state.setdefault(other, state[mine])
            elif other in state:
                state[mine] = (state[mine] + state.pop(other)) / 2
        return state


def _published(depths: tuple[int, ...], dims: tuple[int, ...], low: float, high: float) -> Variant:
    note = f"two checkpoints of one name are published; the other has {high}"
    return Variant({"depths": depths, "embed_dims": dims}, low, note=note)


VARIANTS = {
    "cas_vit_nano": Variant(  # ours, for 32-pixel images: strides 2, 4, 8, 16
        {"depths": (1, 1, 2, 1), "embed_dims": (16, 24, 48, 96), "patch_stride": 2},
        cfg={"input_size": (3, 32, 32), "crop_pct": 1.0},
    ),
    "cas_vit_xs": _published((2, 2, 4, 2), (48, 56, 112, 220), 78.3, 78.7),
    "cas_vit_s": _published((3, 3, 6, 3), (48, 64, 128, 256), 80.9, 81.1),
    "cas_vit_m": _published((3, 3, 6, 3), (64, 96, 192, 384), 82.8, 83.0),
    "cas_vit_t": _published((3, 3, 6, 3), (96, 128, 256, 512), 83.9, 84.1),
    "cas_vit_l": Variant({"depths": (4, 4, 8, 4), "embed_dims": (96, 128, 256, 512)}),  # of the segmentation code
}
register(CASViT, VARIANTS, first_conv="stages.0.embed.0.conv")

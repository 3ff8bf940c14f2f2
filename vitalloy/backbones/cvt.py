"""CvT: a pyramid of three transformer stages whose tokens, queries, keys and values come from convolutions.

"CvT: Introducing Convolutions to Vision Transformers", Wu et al., ICCV 2021, arXiv 2103.15808. There is no position
table, so any input size runs. Loads the authors' files and the ported ones of the transformers library.

Where paper, code and weights differ, the authors' code and weights are followed:
- the activation is QuickGELU; the paper says GELU, as does the transformers port: `activation="gelu"` is that reading;
- scores are scaled by the full width, C ** -0.5, not by the width of a head;
- a batch of one keeps its batch axis (the published forward drops it).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn

from vitalloy.layers.activations import ACTIVATIONS
from vitalloy.layers.attention import Attend, fitting_heads, merge_heads, split_heads
from vitalloy.layers.backbone import Backbone, Level, drop_path_rates, init_weights
from vitalloy.layers.fusion import fold_norm
from vitalloy.layers.mlp import Mlp
from vitalloy.layers.tokens import to_map, to_tokens
from vitalloy.registry import Variant, register


class ConvEmbed(nn.Module):
    """Overlapping strided convolution and a norm over channels: map -> smaller, wider map."""

    def __init__(self, in_chans: int, dim: int, kernel: int, stride: int, padding: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel, stride, padding)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        return to_map(self.norm(to_tokens(x)), x.shape[-2:])


class ConvProjection(nn.Module):
    """Depth-wise convolution and batch norm in front of a linear projection: map -> tokens."""

    def __init__(self, dim: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride, padding=1, groups=dim, bias=False)
        self.bn = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        return to_tokens(self.bn(self.conv(x)))

    def fuse(self) -> None:
        if isinstance(self.bn, nn.BatchNorm2d):
            self.conv, self.bn = fold_norm(self.conv, self.bn), nn.Identity()


class PoolProjection(nn.AvgPool2d):
    """The authors' parameter-free alternative: average pooling, map -> tokens."""

    def __init__(self, stride: int) -> None:
        super().__init__(3, stride, padding=1, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        return to_tokens(super().forward(x))


class ConvAttention(nn.Module):
    """Self-attention whose q, k, v pass a convolution first; keys and values are usually strided.

    Args:
        projection: "conv" (depth-wise convolution and batch norm), "avg" (keys and values average-pooled) or
            "linear" (none).
        class_token: the first token is no part of the grid and takes no convolution.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        kv_stride: int = 2,
        projection: str = "conv",
        class_token: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads, self.class_token, self.scale = fitting_heads(dim, num_heads), class_token, dim**-0.5
        if projection not in ("conv", "avg", "linear"):
            raise ValueError(f"projection={projection!r} is not one of 'conv', 'avg', 'linear'")
        conv, pool = projection == "conv", projection == "avg"
        self.conv_proj_q = ConvProjection(dim, 1) if conv else None
        self.conv_proj_k, self.conv_proj_v = (
            ConvProjection(dim, kv_stride) if conv else PoolProjection(kv_stride) if pool else None for _ in "kv"
        )
        self.proj_q, self.proj_k, self.proj_v = (nn.Linear(dim, dim, bias=qkv_bias) for _ in "qkv")
        self.attend = Attend()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """x (B, [1 +] H*W, C) with grid (H, W) -> the same shape."""
        first = x[:, :1] if self.class_token else None
        # one copy without the class token, so that the three convolutions read a dense channels-last map
        patches = x[:, 1:].contiguous() if self.class_token else x
        image = to_map(patches, grid)

        def project(conv: nn.Module | None, linear: nn.Linear) -> Tensor:
            tokens = patches if conv is None else conv(image)
            tokens = tokens if first is None else torch.cat([first, tokens], dim=1)
            return split_heads(linear(tokens), self.num_heads)

        q = project(self.conv_proj_q, self.proj_q)
        k = project(self.conv_proj_k, self.proj_k)
        v = project(self.conv_proj_v, self.proj_v)
        return self.proj(merge_heads(self.attend(q, k, v, scale=self.scale)))


class Block(nn.Module):
    """Pre-norm convolutional attention and perceptron, each with a residual."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        kv_stride: int = 2,
        projection: str = "conv",
        class_token: bool = False,
        mlp_ratio: float = 4.0,
        activation: str = "quick_gelu",
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = ConvAttention(dim, num_heads, qkv_bias, kv_stride, projection, class_token)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), ACTIVATIONS[activation])
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), grid))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """Embedding, an optional class token, blocks: map -> (map, class token or None)."""

    def __init__(self, embed: ConvEmbed, blocks: list[Block], class_token: bool, dim: int) -> None:
        super().__init__()
        self.patch_embed = embed
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        self.blocks = nn.ModuleList(blocks)
        if class_token:
            trunc_normal_(self.cls_token, std=0.02)

    def forward(self, x: Tensor, run=lambda block, *args: block(*args)) -> tuple[Tensor, Tensor | None]:
        x = self.patch_embed(x)
        grid = x.shape[-2:]
        x = to_tokens(x)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        for block in self.blocks:
            x = run(block, x, grid)
        if self.cls_token is None:
            return to_map(x, grid), None
        return to_map(x[:, 1:], grid), x[:, :1]


_LAYER = r"^(?:cvt\.)?encoder\.stages\.(\d+)\.layers\.(\d+)\."
_EMBED = r"^(?:cvt\.)?encoder\.stages\.(\d+)\.embedding\.convolution_embeddings\."
_QKV = r"attention\.attention\."
_PORTED_KEYS = (  # from the transformers library's names
    (r"^(?:cvt\.)?encoder\.stages\.(\d+)\.cls_token$", r"stage\1.cls_token"),
    (_EMBED + "projection", r"stage\1.patch_embed.proj"),
    (_EMBED + "normalization", r"stage\1.patch_embed.norm"),
    (_LAYER + "layernorm_before", r"stage\1.blocks.\2.norm1"),
    (_LAYER + "layernorm_after", r"stage\1.blocks.\2.norm2"),
    (
        _LAYER + _QKV + r"convolution_projection_([qkv])\w+\.convolution_projection\.convolution",
        r"stage\1.blocks.\2.attn.conv_proj_\3.conv",
    ),
    (
        _LAYER + _QKV + r"convolution_projection_([qkv])\w+\.convolution_projection\.normalization",
        r"stage\1.blocks.\2.attn.conv_proj_\3.bn",
    ),
    (_LAYER + _QKV + r"projection_([qkv])[a-z]+", r"stage\1.blocks.\2.attn.proj_\3"),
    (_LAYER + r"attention\.output\.dense", r"stage\1.blocks.\2.attn.proj"),
    (_LAYER + r"intermediate\.dense", r"stage\1.blocks.\2.mlp.fc1"),
    (_LAYER + r"output\.dense", r"stage\1.blocks.\2.mlp.fc2"),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)


class CvT(Backbone):
    """Convolutional vision transformer.

    Args:
        embed_dims, num_heads, depths: one value a stage.
        patch_sizes, patch_strides, patch_paddings: the embedding convolution of each stage.
        class_token: put a class token into the last stage; without one the head averages all tokens.
        projection: how q, k, v see the map, see `ConvAttention`.
        qkv_bias, kv_strides: one value, or one a stage.
        activation: "quick_gelu" (the released weights) or "gelu" (the paper).
        drop_path_rate: of the last block of the last stage; earlier stages never drop.
    """

    default_out_indices = (0, 1, 2)
    key_table = _PORTED_KEYS

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dims: Sequence[int] = (64, 192, 384),
        num_heads: Sequence[int] = (1, 3, 6),
        depths: Sequence[int] = (1, 2, 10),
        patch_sizes: Sequence[int] = (7, 3, 3),
        patch_strides: Sequence[int] = (4, 2, 2),
        patch_paddings: Sequence[int] = (2, 1, 1),
        mlp_ratio: float = 4.0,
        class_token: bool = True,
        projection: str = "conv",
        qkv_bias: bool | Sequence[bool] = True,
        kv_strides: int | Sequence[int] = 2,
        activation: str = "quick_gelu",
        global_pool: str | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        count = len(embed_dims)
        biases = [qkv_bias] * count if isinstance(qkv_bias, bool) else qkv_bias
        strides = [kv_strides] * count if isinstance(kv_strides, int) else kv_strides
        self.feature_info = []
        self.num_stages, reduction = count, 1
        for i, dim in enumerate(embed_dims):
            last = i == count - 1
            token = class_token and last
            rates = drop_path_rates(drop_path_rate if last else 0.0, depths[i])
            embed = ConvEmbed(
                embed_dims[i - 1] if i else in_chans, dim, patch_sizes[i], patch_strides[i], patch_paddings[i]
            )
            blocks = [
                Block(dim, num_heads[i], biases[i], strides[i], projection, token, mlp_ratio, activation, rate)
                for rate in rates
            ]
            self.add_module(f"stage{i}", Stage(embed, blocks, token, dim))
            reduction *= patch_strides[i]
            self.feature_info.append({"num_chs": dim, "reduction": reduction, "module": f"stage{i}"})
        self.num_features = embed_dims[-1]
        self.num_prefix_tokens = int(class_token)
        self.norm = nn.LayerNorm(self.num_features)
        self.apply(init_weights)
        self.build_head(num_classes, global_pool or ("token" if class_token else "avg"), drop_rate)

    def forward_levels(
        self, x: Tensor, take: Collection[int], stop: int, norm: bool
    ) -> tuple[tuple[Tensor, Tensor | None], list[Level]]:
        levels, token = [], None
        for i in range(min(stop, self.num_stages)):
            x, token = getattr(self, f"stage{i}")(x, self.run)
            if i in take:
                last = norm and i == len(self.feature_info) - 1
                first = self.norm(token) if last and token is not None else token
                levels.append(Level(to_map(self.norm(to_tokens(x)), x.shape[-2:]) if last else x, first))
        return (x, token), levels

    def forward_final(self, state: tuple[Tensor, Tensor | None]) -> Tensor:
        x, token = state
        x = to_tokens(x)
        return self.norm(x if token is None else torch.cat([token, x], dim=1))

    def prune_levels(self, keep: int, prune_norm: bool) -> None:
        for i in range(keep, self.num_stages):
            delattr(self, f"stage{i}")
        self.num_stages = keep
        if prune_norm:
            self.norm = nn.Identity()

    def no_weight_decay(self) -> set[str]:
        return {f"stage{i}.cls_token" for i in range(self.num_stages)}

    def group_matcher(self, coarse: bool = False) -> dict:
        """How layer-wise learning rates group the parameters."""
        if coarse:
            return {"stem": r"^stage0\.patch_embed", "blocks": [(r"^stage(\d+)", None), (r"^norm", (99999,))]}
        return {
            "stem": r"^stage0\.patch_embed",
            "blocks": [
                (r"^stage(\d+)\.(?:patch_embed|cls_token)", (0,)),
                (r"^stage(\d+)\.blocks\.(\d+)", None),
                (r"^norm", (99999,)),
            ],
        }


_384 = {"input_size": (3, 384, 384), "crop_pct": 1.0}
_22K = "pre-trained on ImageNet-22k"
VARIANTS = {
    "cvt_nano": Variant(
        {
            "embed_dims": (32, 64, 128),
            "num_heads": (1, 2, 4),
            "depths": (1, 1, 2),
            "patch_sizes": (3, 3, 3),
            "patch_strides": (2, 2, 2),
            "patch_paddings": (1, 1, 1),
        },
        cfg={"input_size": (3, 32, 32), "crop_pct": 1.0},
    ),
    "cvt_13": Variant({}, 81.6),
    "cvt_13_384": Variant({}, 83.0, cfg=_384),
    "cvt_21": Variant({"depths": (1, 4, 16)}, 82.5),
    "cvt_21_384": Variant({"depths": (1, 4, 16)}, 84.9, ("CvT-21-384x384-IN-22k.pth",), cfg=_384, note=_22K),
    "cvt_w24_384": Variant(
        {"embed_dims": (192, 768, 1024), "num_heads": (3, 12, 16), "depths": (2, 2, 20)}, 87.7, cfg=_384, note=_22K
    ),
}
register(CvT, VARIANTS, first_conv="stage0.patch_embed.proj", crop_pct=0.875)

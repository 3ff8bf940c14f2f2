"""TransNeXt: tokens see their neighbourhood sharply and the whole image coarsely, in one attention.

"TransNeXt: Robust Foveal Visual Perception for Vision Transformers", Shi, CVPR 2024, arXiv 2311.17132. Loads the
author's classification and dense-prediction files.

Departures: one class for classification and dense prediction, for any input size, rectangles too. What each token sees,
the length of its attention and the coordinates are made for the grid that comes in; those of the build size are kept.
The published classifier runs at its build size only. A pooled grid has at least one cell and, where its size is fixed,
no more cells a side than the map; the published code refuses such sizes. The four feature maps are the normalised
ones, as published.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn

from vitalloy.layers.attention import Attend, fitting_heads, merge_heads
from vitalloy.layers.backbone import drop_path_rates, init_convolution, init_weights
from vitalloy.layers.focal import FocalAttend, Pair, PositionBias, Views
from vitalloy.layers.patch_embed import OverlapPatchEmbed
from vitalloy.layers.pyramid import Pyramid
from vitalloy.layers.streaming import GROUP, activate_, may_stream
from vitalloy.layers.tokens import to_map, to_tokens
from vitalloy.registry import Variant, register


class LengthScale(nn.Module):
    """Unit queries -> queries of attention: a learned embedding is added, and all is scaled by a temperature of each
    head and by the logarithm of the number of keys that the query sees."""

    def __init__(self, num_heads: int, width: int) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.full((num_heads, 1, 1), math.log(math.expm1(1 / 0.24))))
        self.query_embedding = nn.Parameter(trunc_normal_(torch.empty(num_heads, 1, width), std=0.02))

    def forward(self, q: Tensor, count: Tensor) -> Tensor:
        """q (B, N, heads, d), count (N,) -> the shape of q."""
        scale = F.softplus(self.temperature.flatten()) * count.to(self.temperature.dtype).log().unsqueeze(1)
        return (q + self.query_embedding.squeeze(1)) * scale.unsqueeze(-1)


class CosineAttention(nn.Module):
    """Attention of every token to every token by angle, at a scale that grows with their number."""

    def __init__(
        self, dim: int, num_heads: int, views: Views, pretrain: Pair, qkv_bias: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.num_heads = fitting_heads(dim, num_heads)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.scale = LengthScale(num_heads, dim // num_heads)
        self.position_bias = PositionBias(num_heads, views, pretrain)
        self.attend = Attend(dropout)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: Pair) -> Tensor:
        """x (B, N, C) on a grid of N cells -> the same shape."""
        view = self.position_bias.views(grid)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # each (B, N, heads, d)
        q, k = self.scale(F.normalize(q, dim=-1), view.count), F.normalize(k, dim=-1)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        bias = self.position_bias(view).unsqueeze(0)
        return self.proj(merge_heads(self.attend(q, k, v, scale=1.0, bias=bias)))


class AggregatedAttention(nn.Module):
    """Attention to the neighbours and to the pooled map at once, and learned tokens for positions among neighbours."""

    def __init__(
        self, dim: int, num_heads: int, views: Views, pretrain: Pair, qkv_bias: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.num_heads = fitting_heads(dim, num_heads)
        width, near = dim // num_heads, views.window**2
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.scale = LengthScale(num_heads, width)
        self.position_bias = PositionBias(num_heads, views, pretrain)
        self.learnable_tokens = nn.Parameter(trunc_normal_(torch.empty(num_heads, width, near), std=0.02))
        self.learnable_bias = nn.Parameter(torch.zeros(num_heads, 1, near))
        self.sr = nn.Conv2d(dim, dim, 1)
        self.act = nn.GELU()
        self.norm = nn.LayerNorm(dim)  # eps 1e-5
        self.attend = FocalAttend(views.window, dropout)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: Pair) -> Tensor:
        """x (B, N, C) on a grid of N cells -> the same shape."""
        view = self.position_bias.views(grid)
        q = F.normalize(self.q(x).unflatten(-1, (self.num_heads, -1)), dim=-1)
        # how much a query cares for each neighbour, whatever is there
        extra = torch.einsum("bnhd,hdl->bnhl", q, self.learnable_tokens) + self.learnable_bias.squeeze(1)
        k, v = self.keys_values(x)
        pooled_k, pooled_v = self.keys_values(self.pool(x, grid, view.pooled))
        bias, q = self.position_bias(view), self.scale(q, view.count)
        return self.proj(self.attend(q, k, v, pooled_k, pooled_v, bias, extra, view.grid))

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, C) -> unit keys and values, each (B, N, heads, d)."""
        k, v = self.kv(x).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        return F.normalize(k, dim=-1), v

    def pool(self, x: Tensor, grid: Pair, pooled: Pair) -> Tensor:
        """The map (B, N, C) as (B, M, C) average tokens."""
        x = self.act(self.sr(to_map(x, grid)))
        return self.norm(to_tokens(F.adaptive_avg_pool2d(x, pooled)))


class ConvGlu(nn.Module):
    """Gated linear unit whose gate looks at its neighbours: fc2(gelu(3x3 depth-wise convolution(gate)) * value).

    Args:
        hidden: nominal width; two thirds of it are used, which cost what a plain perceptron of that width costs.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        width = 2 * hidden // 3
        self.gate, self.value = nn.Linear(dim, width), nn.Linear(dim, width)  # apart, so that neither is copied
        self.dwconv = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(width, dim)

    def forward(self, x: Tensor, grid: Pair) -> Tensor:
        """x (B, N, C) on a grid of N cells -> the same shape."""
        if may_stream(x, self.gate, self.value, self.dwconv, self.act, self.fc2):
            return self.stream(x, grid)
        gate = self.act(to_tokens(self.dwconv(to_map(self.gate(x), grid))))
        return self.fc2(gate * self.value(x))

    def stream(self, x: Tensor, grid: Pair) -> Tensor:
        """The same in place, some whole images at a time: fresh memory costs more than the products."""
        images, count, _ = x.shape
        width = self.value.out_features
        group = min(images, max(1, GROUP // (count * width)))
        out, buffer = torch.empty_like(x), x.new_empty(group * count, width)
        for piece, result in zip(x.split(group), out.split(group), strict=True):
            rows, wide = piece.flatten(0, 1), buffer[: piece.shape[0] * count]
            torch.addmm(self.gate.bias, rows, self.gate.weight.t(), out=wide)
            gate = to_tokens(self.dwconv(to_map(wide.unflatten(0, (-1, count)), grid))).flatten(0, 1)
            torch.addmm(self.value.bias, rows, self.value.weight.t(), out=wide)
            gate = activate_(self.act, gate).mul_(wide)
            torch.addmm(self.fc2.bias, gate, self.fc2.weight.t(), out=result.flatten(0, 1))
        return out


class Block(nn.Module):
    """Pre-norm attention and convolutional gated unit, each with a residual."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = ConvGlu(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, grid: Pair) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), grid))
        return x + self.drop_path(self.mlp(self.norm2(x), grid))


class TransNeXt(Pyramid):
    """TransNeXt: four stages of strides 4, 8, 16 and 32.

    Args:
        img_size: the (height, width) or side that position biases are kept for; other inputs run too.
        pretrain_size: the size that positions are measured by, that of the first training; `img_size` when not given.
        position_mode: for inputs of another size, "extrapolate" makes the position biases for it, "interpolate"
            resizes those of `img_size`.
        fixed_pool_size: pool the map to this many cells a side in stages that pool, whatever the input ("linear
            inference mode"; 7 for models of 224 pixels), at a cost linear in the number of pixels.
        embed_dims, num_heads, depths, mlp_ratios: one entry a stage.
        reductions: side of the pooled cells in each stage; a stage with 1 has attention to every token instead.
        window: side of the neighbourhood.
        patch_stride: stride of the first stage; 2 suits small images.
        global_pool: "avg", "max", "gem", "ggem" or "".
    """

    key_table = (
        (r"^(block.+\.dwconv\.)dwconv\.", r"\1"),
        (r"\.attn\.(temperature|query_embedding)$", r".attn.scale.\1"),
        (r"\.attn\.cpb_fc", r".attn.position_bias.fc"),
        (r"\.attn\.relative_pos_bias_local$", r".attn.position_bias.local"),
    )

    def __init__(
        self,
        img_size: int | Pair = 224,
        pretrain_size: int | Pair | None = None,
        position_mode: str = "extrapolate",
        fixed_pool_size: int | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dims: Sequence[int] = (48, 96, 192, 384),
        num_heads: Sequence[int] | None = None,
        depths: Sequence[int] = (2, 2, 15, 2),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        reductions: Sequence[int] = (8, 4, 2, 1),
        window: int = 3,
        patch_stride: int = 4,
        qkv_bias: bool = True,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if position_mode not in ("extrapolate", "interpolate"):
            raise ValueError(f"position_mode={position_mode!r} is neither 'extrapolate' nor 'interpolate'")
        heads = num_heads or [dim // 24 for dim in embed_dims]
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        for i, dim in enumerate(embed_dims):
            stride, width = (2, embed_dims[i - 1]) if i else (patch_stride, in_chans)
            total = patch_stride * 2**i
            grid, pretrain = _grid(img_size, total), _grid(pretrain_size or img_size, total)
            focal = reductions[i] > 1
            views = Views(
                grid,
                reductions[i],
                window if focal else 0,
                fixed_pool_size if focal else None,
                position_mode == "interpolate",
            )
            attention = AggregatedAttention if focal else CosineAttention
            blocks = [
                Block(
                    dim,
                    attention(dim, heads[i], views, pretrain, qkv_bias, attn_drop_rate),
                    mlp_ratios[i],
                    next(rates),
                )
                for _ in range(depths[i])
            ]
            self.add_stage(OverlapPatchEmbed(stride, width, dim), blocks, nn.LayerNorm(dim, eps=1e-6), dim, total)
        self.apply(init_weights)
        self.apply(init_convolution)
        self.build_head(num_classes, global_pool, drop_rate)

    def no_weight_decay(self) -> set[str]:
        spared = (
            "temperature",
            "query_embedding",
            "position_bias.local",
            "position_bias.fc1.weight",
            "position_bias.fc2.weight",
        )
        return {name for name, _ in self.named_parameters() if name.endswith(spared)}

    def reshape_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The author's fc1 holds the gate and, behind it, the value."""
        split = {}
        for name, tensor in state.items():
            if ".mlp.fc1." in name:
                for ours, half in zip((".gate.", ".value."), tensor.chunk(2), strict=True):
                    split[name.replace(".fc1.", ours)] = half
            else:
                split[name] = tensor
        return split


def _grid(size: int | Pair, stride: int) -> Pair:
    height, width = (size, size) if isinstance(size, int) else size
    return (-(-height // stride), -(-width // stride))


_TINY = {"embed_dims": (72, 144, 288, 576)}
_SMALL = {**_TINY, "depths": (5, 5, 22, 5)}
_BASE = {"embed_dims": (96, 192, 384, 768), "depths": (5, 5, 23, 5)}
_384 = {"input_size": (3, 384, 384)}
VARIANTS = {
    "transnext_micro": Variant({}, 82.5, ("transnext_micro_224_1k.pth",)),
    "transnext_micro_aaaa": Variant(  # the aggregated attention in all stages
        {"reductions": (16, 8, 4, 2)}, 82.6, ("transnext_micro_AAAA_256_1k.pth",), cfg={"input_size": (3, 256, 256)}
    ),
    "transnext_tiny": Variant(_TINY, 84.0, ("transnext_tiny_224_1k.pth",)),
    "transnext_small": Variant(_SMALL, 84.7, ("transnext_small_224_1k.pth",)),
    "transnext_small_384": Variant(
        {**_SMALL, "pretrain_size": 224}, 86.0, ("transnext_small_384_1k_ft_1k.pth",), cfg=_384
    ),
    "transnext_base": Variant(_BASE, 84.8, ("transnext_base_224_1k.pth",)),
    "transnext_base_384": Variant(
        {**_BASE, "pretrain_size": 224}, 86.2, ("transnext_base_384_1k_ft_1k.pth",), cfg=_384
    ),
    "transnext_nano": Variant(  # ours, for 32-pixel images: strides 2, 4, 8, 16
        {
            "embed_dims": (24, 48, 96, 144),
            "depths": (1, 1, 2, 1),
            "mlp_ratios": (4, 4, 4, 4),
            "reductions": (4, 2, 2, 1),
            "patch_stride": 2,
        },
        cfg={"input_size": (3, 32, 32), "crop_pct": 1.0},
    ),
}
register(TransNeXt, VARIANTS, first_conv="patch_embed1.proj")

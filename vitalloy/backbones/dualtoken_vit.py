"""DualToken-ViT: local tokens from convolutions, global tokens from a small grid that runs through the network.

"DualToken-ViT: Position-aware Efficient Vision Transformer with Dual Token Fusion", Chu et al., SIAM SDM 2024,
arXiv 2309.12424. For light classification and dense prediction. No code and no weights were published. Stem, patch
merging and bi-dimensional attention are those of LightViT (Huang et al., arXiv 2207.05557), whose public code they
are checked against and whose names they take.

What is known of the rest comes from the abstract and extracts of the paper; these readings are ours:
- widths, depths and heads (only the cost and accuracy of the variants are known), and perceptrons twice as wide;
- local tokens are a ConvNeXt block's output; they and the broadcast are added to the block's input
  (`fusion="local"` adds the broadcast to the local tokens, which hold the input already);
- a shrinking step is a pointwise linear map, then 2x2 averaging; where the grid is not reached, adaptive averaging;
- carried and aggregated global tokens are summed with weights `token_weight` and 1 - `token_weight`, 0.5 each;
- the mixing perceptron (`mix=True`) is a linear map over tokens and one over channels, nothing between;
- both attentions norm what they read of the image: with these norms the variants have the parameter counts of the
  reconstruction that we follow, without them (`attn_norm=False`) about 0.1 % less;
- the global tokens start at zero.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from vitalloy.layers.attention import Attend, SelfAttention, fitting_heads, merge_heads, split_heads
from vitalloy.layers.backbone import Backbone, Level, drop_path_rates, init_weights
from vitalloy.layers.fusion import fold_scale
from vitalloy.layers.mlp import Mlp
from vitalloy.layers.tokens import to_map, to_tokens
from vitalloy.registry import Variant, register

Grid = tuple[int, int]


class Stem(nn.Module):
    """Image -> tokens (B, N, C) and their grid: five 3x3 convolutions, three of them depth-wise at half the width."""

    def __init__(self, in_chans: int, dim: int, strides: Sequence[int] = (2, 1, 1, 2, 2)) -> None:
        super().__init__()
        half = dim // 2
        layers: list[nn.Module] = []
        for i, stride in enumerate(strides[:-1]):
            width, groups = (half, half) if i else (in_chans, 1)
            conv = nn.Conv2d(width, half, 3, stride, padding=1, groups=groups, bias=False)
            layers += [conv, nn.BatchNorm2d(half), nn.GELU()]
        self.stem = nn.Sequential(*layers)
        self.proj = nn.Conv2d(half, dim, 3, strides[-1], padding=1)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Grid]:
        x = self.proj(self.stem(x.contiguous(memory_format=torch.channels_last)))
        return self.norm(to_tokens(x)), (x.shape[2], x.shape[3])


class MergePatch(nn.Module):
    """Halves the grid of the image tokens and widens both kinds of tokens."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False)
        self.norm2 = nn.LayerNorm(dim)
        self.proj = nn.Linear(dim, out_dim, bias=False)
        self.res_proj = nn.Linear(dim, out_dim, bias=False)

    def forward(self, tokens: Tensor, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Grid]:
        """Global tokens (B, G, C), image tokens (B, H*W, C) -> (B, G, D), (B, ceil(H/2) * ceil(W/2), D), new grid."""
        x = x.unflatten(1, grid)
        if grid[0] % 2 or grid[1] % 2:
            x = F.pad(x, (0, 0, 0, grid[1] % 2, 0, grid[0] % 2))
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (B, h, 2, w, 2, C)
        grid = (x.shape[1], x.shape[3])
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3, 4).flatten(1, 2)  # (B, h*w, 4, C), column by column
        merged = self.reduction(self.norm(x.flatten(2))) + self.res_proj(x.amax(2))
        return self.proj(self.norm2(tokens)), merged, grid


class ConvEncoder(nn.Module):
    """Local tokens, as a ConvNeXt block makes them: a map (B, C, H, W) -> (B, H*W, C), the input added.

    Args:
        layer_scale: where the scale `gamma` of the branch starts; None for none.
    """

    def __init__(self, dim: int, layer_scale: float | None = None) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.gamma = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))

    def forward(self, x: Tensor) -> Tensor:
        branch = self.mlp(self.norm(to_tokens(self.dwconv(x))))
        x = to_tokens(x)
        return x + branch if self.gamma is None else torch.addcmul(x, branch, self.gamma)

    def fuse(self) -> None:
        if self.gamma is not None:
            self.mlp.fc2, self.gamma = fold_scale(self.mlp.fc2, self.gamma), None


class MixMlp(nn.Module):
    """A linear map over the tokens, then one over the channels: (B, N, C) -> the same shape."""

    def __init__(self, dim: int, tokens: int) -> None:
        super().__init__()
        self.token = nn.Linear(tokens, tokens)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.token(x.mT).mT)


class PositionAwareTokens(nn.Module):
    """Renews the global tokens: what they carry, summed with what attention makes of the shrunken local map.

    Args:
        side: of the square grid of global tokens.
        steps: how often the map is halved; 0 where it has the size of the grid already. The map is averaged to the
            grid after that if it must be.
        weight: of the carried tokens; that of the aggregated ones is 1 - weight.
        mix: the carried tokens pass a `MixMlp` instead of a perceptron.
        attn_norm: norm the shrunken map before the attention.
    """

    def __init__(
        self, dim: int, num_heads: int, side: int, steps: int, weight: float, mix: bool, attn_norm: bool
    ) -> None:
        super().__init__()
        self.side, self.factor = side, 2**steps
        self.weight: float | None = weight  # None when it is folded
        self.down = nn.Sequential(*(nn.Linear(dim, dim) for _ in range(steps)))
        self.norm = nn.LayerNorm(dim) if attn_norm else nn.Identity()
        self.attn = SelfAttention(dim, num_heads)
        self.mlp = MixMlp(dim, side * side) if mix else Mlp(dim, dim)

    def forward(self, tokens: Tensor, local: Tensor, grid: Grid) -> Tensor:
        """Global tokens (B, side * side, C) and local tokens (B, H*W, C) -> new global tokens."""
        small = to_map(local, grid)
        # averages of pointwise linear maps are linear maps of averages: all averaging comes first, in one pass
        if min(grid) >= self.factor > 1:
            small = F.avg_pool2d(small, self.factor)
        if small.shape[-2:] != (self.side, self.side):
            small = F.adaptive_avg_pool2d(small, self.side)
        gathered = self.attn(self.norm(self.down(to_tokens(small))))
        if self.weight is None:
            return self.mlp(tokens) + gathered
        return self.weight * self.mlp(tokens) + (1 - self.weight) * gathered

    @torch.no_grad()
    def fuse(self) -> None:
        if self.weight is None:
            return
        shares = torch.tensor([self.weight, 1 - self.weight], dtype=torch.float64)
        self.mlp.fc2 = fold_scale(self.mlp.fc2, shares[0])
        self.attn.proj = fold_scale(self.attn.proj, shares[1])
        self.weight = None
        while len(self.down) > 1:  # nothing but averages lies between two steps
            *rest, first, second = self.down
            weight, bias = second.weight.double(), second.bias.double()
            joined = copy.deepcopy(second)
            joined.weight.copy_(weight @ first.weight.double())
            joined.bias.copy_(weight @ first.bias.double() + bias)
            self.down = nn.Sequential(*rest, joined)


class Broadcast(nn.Module):
    """Attention from image tokens (B, N, C), normed or not, to global tokens (B, G, C) -> (B, N, C)."""

    def __init__(self, dim: int, num_heads: int, attn_norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim) if attn_norm else nn.Identity()
        self.num_heads = fitting_heads(dim, num_heads)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.attend = Attend()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        q = split_heads(self.q(self.norm(x)), self.num_heads)
        k, v = self.kv(tokens).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(merge_heads(self.attend(q, k, v)))


class BidimAttention(nn.Module):
    """LightViT's two gates, one a channel from the mean token and one a token: (B, N, C) -> the same shape."""

    def __init__(self, dim: int, reduction: int = 4) -> None:
        super().__init__()
        inner = dim // reduction
        self.norm = nn.LayerNorm(dim)
        self.global_reduce = nn.Linear(dim, inner)
        self.local_reduce = nn.Linear(dim, inner)
        self.act = nn.GELU()
        self.channel_select = nn.Linear(inner, dim)
        # the published layer reads [local, global] joined; in two parts the global one need not be repeated
        self.spatial_local = nn.Linear(inner, 1)
        self.spatial_global = nn.Linear(inner, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        whole = self.act(self.global_reduce(normed.mean(1, keepdim=True)))
        each = self.act(self.local_reduce(normed))
        token_gate = (self.spatial_local(each) + self.spatial_global(whole)).sigmoid()  # (B, N, 1)
        return x * self.channel_select(whole).sigmoid() * token_gate


class BidimMlp(Mlp):
    """A perceptron with the two gates behind it."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__(dim, hidden)
        self.attn = BidimAttention(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(super().forward(x))


class Block(nn.Module):
    """Local tokens, new global tokens, their broadcast, the fusion, and one perceptron for both kinds of tokens."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        side: int,
        steps: int,
        token_weight: float,
        mix: bool,
        attn_norm: bool,
        fusion: str,
        mlp_ratio: float,
        layer_scale: float | None,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.fusion = fusion
        self.encoder = ConvEncoder(dim, layer_scale)
        self.tokens = PositionAwareTokens(dim, num_heads, side, steps, token_weight, mix, attn_norm)
        self.broadcast = Broadcast(dim, num_heads, attn_norm)
        self.norm = nn.LayerNorm(dim)
        self.mlp = BidimMlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, tokens: Tensor, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Global tokens (B, G, C) and image tokens (B, H*W, C) -> both anew."""
        local = self.encoder(to_map(x, grid))
        tokens = self.tokens(tokens, local, grid)
        spread = self.broadcast(x, tokens)
        x = x + self.drop_path(local + spread) if self.fusion == "add" else local + self.drop_path(spread)
        both = torch.cat([tokens, x], dim=1)
        both = both + self.drop_path(self.mlp(self.norm(both)))
        return both[:, : tokens.shape[1]], both[:, tokens.shape[1] :]


class Stage(nn.Module):
    """Patch merging (none on the first stage), then blocks; returns the map, the global tokens and the grid."""

    def __init__(self, merge: MergePatch | None, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.merge = merge
        self.blocks = nn.ModuleList(blocks)

    def forward(
        self, tokens: Tensor, x: Tensor, grid: Grid, run: Callable[..., Any] = lambda block, *args: block(*args)
    ) -> tuple[Tensor, Tensor, Grid]:
        if self.merge is not None:
            tokens, x, grid = self.merge(tokens, x, grid)
        for block in self.blocks:
            tokens, x = run(block, tokens, x, grid)
        return to_map(x, grid), tokens, grid


class DualTokenViT(Backbone):
    """DualToken-ViT.

    Args:
        embed_dims, depths, num_heads: one entry a stage.
        stem_strides: of the stem's five convolutions.
        token_side: side of the square grid of global tokens.
        steps: how often each stage halves its map on the way to that grid.
        token_weight: share of the carried tokens in the new ones, 0 (none is carried) to 1 (none is gathered).
        mix: the carried tokens pass a linear map over tokens and one over channels instead of a perceptron.
        stepwise: put a pointwise linear map before each halving; otherwise the map is averaged at once.
        attn_norm: norm the image tokens that each attention reads.
        fusion: "add" (input + local + global tokens) or "local" (local + global tokens).
        layer_scale: where the scales of the convolution encoders start; None for none.
    """

    key_table = ((r"^(?:backbone|encoder)\.(.+)", r"\1"),)
    default_out_indices = (0, 1, 2)

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dims: Sequence[int] = (64, 128, 256),
        depths: Sequence[int] = (2, 6, 6),
        num_heads: Sequence[int] = (2, 4, 8),
        stem_strides: Sequence[int] = (2, 1, 1, 2, 2),
        token_side: int = 7,
        steps: Sequence[int] = (2, 1, 0),
        token_weight: float = 0.5,
        mix: bool = False,
        stepwise: bool = True,
        attn_norm: bool = True,
        fusion: str = "add",
        mlp_ratio: float = 2.0,
        layer_scale: float | None = None,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if fusion not in ("add", "local"):
            raise ValueError(f"fusion={fusion!r} is not 'add' or 'local'")
        self.num_features, self.num_stages = embed_dims[-1], len(embed_dims)
        self.patch_embed = Stem(in_chans, embed_dims[0], stem_strides)
        self.global_token = nn.Parameter(torch.zeros(1, token_side**2, embed_dims[0]))
        reduction = 1
        for stride in stem_strides:
            reduction *= stride
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        self.stages, self.feature_info = nn.ModuleList(), []
        for i, (dim, heads) in enumerate(zip(embed_dims, num_heads, strict=True)):
            halvings = steps[i] if stepwise else 0
            shared = (dim, heads, token_side, halvings, token_weight, mix, attn_norm, fusion, mlp_ratio, layer_scale)
            blocks = [Block(*shared, next(rates)) for _ in range(depths[i])]
            self.stages.append(Stage(MergePatch(embed_dims[i - 1], dim) if i else None, blocks))
            self.feature_info.append({"num_chs": dim, "reduction": reduction * 2**i, "module": f"stages.{i}"})
        self.norm = nn.LayerNorm(self.num_features)
        self.apply(init_weights)
        self.build_head(num_classes, global_pool, drop_rate)

    def forward_levels(self, x: Tensor, take: Collection[int], stop: int, norm: bool) -> tuple[Tensor, list[Level]]:
        x, grid = self.patch_embed(x)
        tokens, levels = self.global_token.repeat(x.shape[0], 1, 1), []
        image = to_map(x, grid)
        for i, stage in enumerate(self.stages[:stop]):
            image, tokens, grid = stage(tokens, x, grid, self.run)
            x = to_tokens(image)
            if i in take:
                last = norm and i == len(self.feature_info) - 1
                levels.append(Level(to_map(self.norm(x), grid) if last else image))
        return to_tokens(image), levels

    def forward_final(self, state: Tensor) -> Tensor:
        return self.norm(state)

    def prune_levels(self, keep: int, prune_norm: bool) -> None:
        self.stages = self.stages[:keep]
        if prune_norm:
            self.norm = nn.Identity()

    def no_weight_decay(self) -> set[str]:
        return {"global_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """How layer-wise learning rates group the parameters."""
        if coarse:
            return {"stem": r"^patch_embed|global_token", "blocks": [(r"^stages\.(\d+)", None), (r"^norm", (99999,))]}
        return {
            "stem": r"^patch_embed|global_token",
            "blocks": [
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^stages\.(\d+)\.merge", (0,)),
                (r"^norm", (99999,)),
            ],
        }

    def reshape_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """LightViT's joined spatial gate in the two parts it has here."""
        split = {}
        for key, value in state.items():
            if not key.endswith(("spatial_select.weight", "spatial_select.bias")):
                split[key] = value
                continue
            name = key.replace("spatial_select", "spatial_local")
            if key.endswith("bias"):
                split[name] = value
            else:
                split[name], split[key.replace("spatial_select", "spatial_global")] = value.chunk(2, dim=1)
        return split


_NANO = {"embed_dims": (32, 64, 128), "depths": (1, 2, 1), "num_heads": (1, 2, 4)}
VARIANTS = {
    "dualtoken_vit_t_mix": Variant({"depths": (2, 2, 3), "mix": True}, 75.4),
    "dualtoken_vit_s_mix": Variant({"mix": True}, 79.4),
    "dualtoken_vit_s": Variant({}),
    "dualtoken_vit_nano": Variant(  # ours, for 32-pixel images: strides 2, 4, 8 and 4x4 global tokens
        {**_NANO, "stem_strides": (1, 1, 1, 2, 1), "token_side": 4, "mix": True},
        cfg={"input_size": (3, 32, 32), "crop_pct": 1.0},
    ),
}
register(DualTokenViT, VARIANTS, first_conv="patch_embed.stem.0")

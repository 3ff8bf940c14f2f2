"""ConViT: a transformer whose attention starts as a convolution and can unlearn it; for training on little data.

"ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases", d'Ascoli et al., ICML 2021,
arXiv 2103.10697. Loads the authors' files and timm's, whose names are the same.

The first blocks mix content attention with a positional attention through a gate learned per head; they see patches
only. The class token joins in front of the last two blocks, which are ordinary.

Departures, both without effect on the result: the mixed attention is not divided by its row sums, which are one, and
the positional attention is never laid out over pairs of patches. Its scores are a row term plus a column term, so its
softmax is the product of one softmax over rows and one over columns. The grid may be any (height, width).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn

from vitalloy.layers.attention import Attend, SelfAttention, fitting_heads, merge_heads, split_heads
from vitalloy.layers.backbone import Backbone, Level, drop_path_rates, init_weights
from vitalloy.layers.mlp import Mlp
from vitalloy.layers.patch_embed import PatchEmbed
from vitalloy.layers.positions import resample_positions
from vitalloy.layers.tokens import to_map
from vitalloy.registry import Variant, register

if TYPE_CHECKING:
    from typing_extensions import Self


class GatedPositionalAttention(nn.Module):
    """Gated positional self-attention (GPSA): (1 - gate) * content attention + gate * positional attention, then v.

    Args:
        dim: channels in and out.
        num_heads: heads, each a contiguous group of channels.
        qkv_bias: biases of the query, key and value projections.
        dropout: probability of dropping a content attention weight in training.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads = fitting_heads(dim, num_heads)
        self.qk = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.attend = Attend(dropout)
        self.pos_proj = nn.Linear(3, num_heads)  # on (dx, dy, dx² + dy²) in patches, key minus query
        self.gating_param = nn.Parameter(torch.ones(num_heads))
        self.proj = nn.Linear(dim, dim)
        self.kept_grid: tuple[int, int] | None = None

    def init_local(self, strength: float = 1.0) -> None:
        """Start as a convolution: head p looks at one offset of a floor(sqrt(heads)) square; values pass unchanged.

        Heads beyond the square keep their random start. `strength` scales how sharply every head looks.
        """
        side = math.isqrt(self.num_heads)
        centre = (side - 1) / 2 if side % 2 == 0 else side // 2
        with torch.no_grad():
            nn.init.eye_(self.v.weight)
            self.gating_param.fill_(1.0)
            for row in range(side):
                for column in range(side):
                    peak = torch.tensor([2 * (column - centre), 2 * (row - centre), -1.0])
                    self.pos_proj.weight[row + side * column] = peak
            self.pos_proj.weight *= strength

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """x (B, N, C), one token a cell of the grid -> (B, N, C)."""
        q, k = self.queries_keys(x)
        v = split_heads(self.v(x), self.num_heads)  # (B, heads, N, d)
        content = self.attend(q, k, v)
        # positional attention on v, first between rows, then between columns: N * (H + W) products instead of N * N
        rows, columns = (factor.to(v.dtype) for factor in self.position_factors(grid))
        near = rows @ v.unflatten(2, grid).flatten(3)  # (heads, H, H) @ (B, heads, H, W * d)
        near = columns.unsqueeze(1) @ near.unflatten(3, (grid[1], -1))  # (heads, 1, W, W) @ (B, heads, H, W, d)
        return self.proj(merge_heads(torch.lerp(content, near.flatten(2, 3).to(content.dtype), self.gate(content))))

    def gate(self, like: Tensor) -> Tensor:
        """Weight of the positional attention, (heads, 1, 1)."""
        return self.gating_param.sigmoid().view(-1, 1, 1).to(like.dtype)

    def queries_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, N, C) -> q, k, each (B, heads, N, d)."""
        qk = self.qk(x).unflatten(-1, (2, self.num_heads, -1))
        return qk.permute(2, 0, 3, 1, 4).unbind(0)

    def position_factors(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Positional attention between rows (heads, H, H) and between columns (heads, W, W)."""
        if self.kept_grid == tuple(grid):
            return self.kept_rows, self.kept_columns
        weight = self.pos_proj.weight
        weight = (
            weight if weight.dtype == torch.float64 else weight.float()
        )  # squares of offsets outgrow half precision
        across, down, square = weight.view(-1, 3, 1, 1).unbind(1)  # each (heads, 1, 1)
        y, x = _offsets(grid[0], weight), _offsets(grid[1], weight)
        # the bias cancels; it is added so that every parameter has a gradient, as distributed training wants
        rows = down * y + square * y.square() + self.pos_proj.bias.to(weight.dtype).view(-1, 1, 1)
        columns = across * x + square * x.square()
        return rows.softmax(-1), columns.softmax(-1)

    def keep_positions(self, grid: tuple[int, int]) -> None:
        """Compute the positional attention of one grid once and for all; for a fused model."""
        with torch.no_grad():
            rows, columns = self.position_factors(grid)
        self.register_buffer("kept_rows", rows, persistent=False)
        self.register_buffer("kept_columns", columns, persistent=False)
        self.kept_grid = tuple(grid)

    def attention_map(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """The mixed attention of every query (row) to every key (column), (B, heads, N, N). For looking at."""
        q, k = self.queries_keys(x)
        content = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        rows, columns = self.position_factors(grid)
        position = rows[:, :, None, :, None] * columns[:, None, :, None, :]  # (heads, H, W, H, W)
        position = position.flatten(3).flatten(1, 2).to(content.dtype)
        return torch.lerp(content, position, self.gate(content))


class Block(nn.Module):
    """Pre-norm attention and perceptron, each with a residual; `local` blocks are gated and need the grid."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        local: bool,
        attn_drop: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.local = local
        attention = GatedPositionalAttention if local else SelfAttention
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attention(dim, num_heads, qkv_bias, attn_drop)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        y = self.norm1(x)
        x = x + self.drop_path(self.attn(y, grid) if self.local else self.attn(y))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ConViT(Backbone):
    """ConViT.

    Args:
        img_size: the (height, width) or side that the position table is made for; other inputs resize it.
        local_depth: how many blocks at the front are gated; the class token joins behind them, so at least one block
            must remain.
        local_init: start the gated blocks as convolutions, of the given `locality_strength`.
        global_pool: "token", "avg" (mean of the normalised patches), ...
    """

    key_table = ((r"\.rel_indices$", None), (r"^(?:backbone|encoder)\.(.+)", r"\1"))
    default_out_indices = 3
    num_prefix_tokens = 1

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        local_depth: int = 10,
        local_init: bool = True,
        locality_strength: float = 1.0,
        global_pool: str = "token",
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= local_depth < depth:
            raise ValueError(f"local_depth={local_depth} leaves no block of {depth} for the class token")
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.grid = (height // patch_size, width // patch_size)
        if not all(self.grid):
            raise ValueError(f"img_size={img_size} is smaller than one patch of {patch_size}")
        self.num_features = self.embed_dim = embed_dim
        self.local_depth = local_depth
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], embed_dim))
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias, i < local_depth, attn_drop_rate, rate)
            for i, rate in enumerate(drop_path_rates(drop_path_rate, depth))
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"blocks.{i}"} for i in range(depth)
        ]
        trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.pos_embed, std=0.02)
        self.apply(init_weights)
        if local_init:
            for block in self.blocks[:local_depth]:
                block.attn.init_local(locality_strength)
        self.build_head(num_classes, global_pool, drop_rate)

    def forward_levels(self, x: Tensor, take: Collection[int], stop: int, norm: bool) -> tuple[Tensor, list[Level]]:
        x, grid = self.patch_embed(x)
        x = x + resample_positions(self.pos_embed, grid, old_grid=self.grid)
        levels = []
        for i, block in enumerate(self.blocks[:stop]):
            if i == self.local_depth:
                x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
            x = self.run(block, x, grid)
            if i in take:
                tokens = self.norm(x) if norm else x
                prefix = 0 if block.local else 1
                levels.append(Level(to_map(tokens[:, prefix:], grid), tokens[:, :prefix] if prefix else None))
        return x, levels

    def forward_final(self, state: Tensor) -> Tensor:
        return self.norm(state)

    def fuse(self) -> Self:
        """Compute the positional attention of the model's own grid once; other grids compute theirs each time."""
        if not self.fused:
            for block in self.blocks:
                if block.local:
                    block.attn.keep_positions(self.grid)
        return super().fuse()

    def prune_levels(self, keep: int, prune_norm: bool) -> None:
        self.blocks = self.blocks[:keep]
        if prune_norm:
            self.norm = nn.Identity()

    def no_weight_decay(self) -> set[str]:
        return {"cls_token", "pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict:
        """How layer-wise learning rates group the parameters."""
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def reshape_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        table = state.get("pos_embed")
        if table is not None and table.shape != self.pos_embed.shape:
            state["pos_embed"] = resample_positions(table, self.grid)
        return state


@torch.no_grad()
def nonlocality(model: ConViT, images: Tensor) -> dict[str, Tensor]:
    """How far each head looks: the paper's measure, in patches, for every block.

    The mean over queries of the attention-weighted distance to the keys, the attention averaged over the images. In
    the blocks behind the class token its row and column are left out; what a patch gives to it counts as distance 0.

    Args:
        images: (B, in_chans, H, W), prepared as for the model.

    Returns:
        block name -> (heads,).
    """
    height, width = model.patch_embed(images)[1]
    found: dict[str, Tensor] = {}

    def watch(name: str, local: bool):
        def look(attention: nn.Module, args: tuple[Tensor, ...]) -> None:
            full = attention.attention_map(*args) if local else _plain_attention_map(attention, *args)
            found[name] = mean_distance(full if local else full[..., 1:, 1:], (height, width))

        return look

    hooks = [b.attn.register_forward_pre_hook(watch(f"blocks.{i}", b.local)) for i, b in enumerate(model.blocks)]
    try:
        model.forward_features(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def mean_distance(attention: Tensor, grid: tuple[int, int]) -> Tensor:
    """Attention-weighted distance in patches of attention maps (B, heads, N, N) on a grid -> (heads,)."""
    height, width = grid
    down, across = _offsets(height, attention), _offsets(width, attention)
    distance = (down.square()[:, None, :, None] + across.square()[None, :, None, :]).sqrt()  # (H, W, H, W)
    distance = distance.flatten(2).flatten(0, 1)
    return (attention.mean(0) * distance).sum((1, 2)) / len(distance)


def _offsets(size: int, like: Tensor) -> Tensor:
    """Place of each key minus place of each query along one side, (size, size)."""
    place = torch.arange(size, device=like.device, dtype=like.dtype)
    return place - place.unsqueeze(1)


def _plain_attention_map(attention: SelfAttention, x: Tensor) -> Tensor:
    q, k, _ = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)


def _width(num_heads: int, head_dim: int = 48) -> dict:
    return {"num_heads": num_heads, "embed_dim": num_heads * head_dim}


VARIANTS = {
    "convit_tiny": Variant(_width(4), 73.1, ("convit_tiny.pth",)),  # the authors' log says 73.116
    "convit_small": Variant(_width(9), checkpoints=("convit_small.pth",)),
    "convit_base": Variant(_width(16), checkpoints=("convit_base.pth",)),
    "convit_tiny_plus": Variant(_width(4, 64)),
    "convit_small_plus": Variant(_width(9, 64)),
    "convit_base_plus": Variant(_width(16, 64)),
    "convit_nano": Variant(  # ours, for 32-pixel images
        {**_width(4, 24), "patch_size": 4, "depth": 6, "local_depth": 5},
        cfg={"input_size": (3, 32, 32), "crop_pct": 1.0},
    ),
}
register(ConViT, VARIANTS)

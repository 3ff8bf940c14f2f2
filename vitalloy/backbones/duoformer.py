"""DuoFormer: a ResNet whose four maps are read region by region, for small sets of medical images.

"DuoFormer: Leveraging Hierarchical Representations by Local and Global Attention Vision Transformer", Tang et al.,
MIDL 2025, arXiv 2506.12982. All tokens that lie in one cell of the last map, from every scale, attend to each other
(scale attention); then one token of every region takes part in attention between the regions (patch attention).

Loads state dicts under the authors' names, and ResNet files of torchvision or timm into the trunk (`strict=False`).
The authors' public files hold whole pickled modules, which safe loading refuses: save their state_dict first.

Where we depart from the authors' code, which does not run as published:
- the two arguments that its transformer does not know are left out, and two scales get a table of 6 tokens;
- what its final norm computes is thrown away, so it is dropped; `head_norm=True` puts it before the classifier;
- the scale token made of channels takes as many channels as the trunk has (published for ResNet-50 and width 768);
- patch blocks, bare attention one after the other, start with weights of std D ** -0.5. With the authors' 0.02
  (`patch_std=0.02`) each of them shrinks what passes, and at the start hardly any of the image reaches the classifier;
- any input: regions are the cells of the last map, other maps are padded with zeros to whole regions;
- the last scale block computes the scale token alone, the only one that is read behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn

from vitalloy.layers.attention import SelfAttention, merge_heads
from vitalloy.layers.backbone import Backbone, Level, drop_path_rates, init_convolution, init_weights
from vitalloy.layers.conv_norm import ConvNorm
from vitalloy.layers.mlp import Mlp
from vitalloy.layers.positions import resample_positions
from vitalloy.layers.tokens import to_map, to_tokens
from vitalloy.registry import Variant, register

STAGES = 4
ReLU = partial(nn.ReLU, inplace=True)  # as torchvision's; saves a fresh map behind each convolution


class BasicBlock(nn.Module):
    """The residual block of the shallow ResNets: two 3x3 convolutions."""

    expansion = 1

    def __init__(self, in_chans: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_chans, width, 3, stride, act=ReLU)
        self.conv2 = ConvNorm(width, width, 3)
        self.downsample = shortcut(in_chans, width, stride)
        self.act = ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv2(self.conv1(x)) + self.downsample(x))


class Bottleneck(nn.Module):
    """The residual block of the deep ResNets: 1x1, 3x3 with the stride, 1x1 to four times the width."""

    expansion = 4

    def __init__(self, in_chans: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_chans, width, act=ReLU)
        self.conv2 = ConvNorm(width, width, 3, stride, act=ReLU)
        self.conv3 = ConvNorm(width, 4 * width)
        self.downsample = shortcut(in_chans, 4 * width, stride)
        self.act = ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv3(self.conv2(self.conv1(x))) + self.downsample(x))


def shortcut(in_chans: int, out_chans: int, stride: int) -> nn.Module:
    return nn.Identity() if stride == 1 and in_chans == out_chans else ConvNorm(in_chans, out_chans, 1, stride)


TRUNKS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, ...]]] = {
    "resnet10": (BasicBlock, (1, 1, 1, 1)),
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}


def region_tokens(x: Tensor, side: int, by_columns: bool = False) -> Tensor:
    """A map (B, C, R * side, S * side) -> (B, R * S, side * side, C): the cells of each region, row by row or not."""
    cells = x.movedim(1, -1).unflatten(2, (-1, side)).unflatten(1, (-1, side))  # (B, R, y, S, x, C)
    cells = cells.permute(0, 1, 3, 4, 2, 5) if by_columns else cells.transpose(2, 3)
    return cells.flatten(3, 4).flatten(1, 2)


class ChannelToken(nn.Module):
    """The scale token of each region made of all channels of the trunk: four maps -> (B, D, h, w) of the last one."""

    def __init__(self, widths: Sequence[int], dim: int) -> None:
        super().__init__()

        def halve(width: int) -> nn.Module:
            return nn.Conv2d(width, width, 3, 2, padding=1)

        pool = nn.MaxPool2d(2, ceil_mode=True)
        self.reduce = nn.ModuleList(
            [
                nn.Sequential(halve(widths[0]), halve(widths[0]), pool),
                nn.Sequential(halve(widths[1]), pool),
                nn.Sequential(pool),
            ]
        )
        self.mix = nn.Sequential(*(ConvNorm(dim if i else sum(widths), dim, 3, bias=True, act=ReLU) for i in range(4)))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        reduced = [reduce(x) for reduce, x in zip(self.reduce, maps[:-1], strict=True)]
        # channels first: for so small a map it costs more to reorder the large kernels than the map
        return self.mix(torch.cat([*reduced, maps[-1]], dim=1).contiguous())


class ScaleAttention(SelfAttention):
    """Self-attention within each region."""

    def forward(self, x: Tensor, read: int | None = None) -> Tensor:
        """x (B, regions, T, C) -> the same shape, or the answers of the first `read` tokens alone."""
        qkv = self.qkv(x.flatten(0, 1)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B * regions, heads, T, d)
        out = merge_heads(self.attend(q[:, :, :read], k, v))
        return self.proj(out).unflatten(0, (-1, x.shape[1]))


class ScaleBlock(nn.Module):
    """Pre-norm attention within regions and perceptron, each with a residual."""

    def __init__(self, dim: int, num_heads: int, attn_drop: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = ScaleAttention(dim, num_heads, dropout=attn_drop)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, read: int | None = None) -> Tensor:
        """x (B, regions, T, C) -> the same shape, or the first `read` tokens of each region alone."""
        x = x[:, :, :read] + self.drop_path(self.attn(self.norm1(x), read))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Transformer(nn.Module):
    """Attention within regions, then between them.

    Args:
        tokens: of a region, the scale token (the first) among them.
        grid: the (rows, columns) of regions that the position table is made for; others resize it.
        depth: number of scale blocks, and of patch blocks: bare attention without norm, residual or perceptron.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        depth: int,
        tokens: int,
        grid: tuple[int, int],
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        patch_std: float | None = None,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.scale_pos = nn.Parameter(torch.zeros(1, 1, tokens, dim))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid[0] * grid[1], dim))
        rates = drop_path_rates(drop_path_rate, depth)
        self.scale_blocks = nn.ModuleList(ScaleBlock(dim, num_heads, attn_drop_rate, rate) for rate in rates)
        self.patch_blocks = nn.ModuleList(SelfAttention(dim, num_heads, dropout=attn_drop_rate) for _ in range(depth))
        trunc_normal_(self.scale_pos, std=0.036)
        trunc_normal_(self.pos_embed, std=0.036)
        nn.init.normal_(self.cls_token, std=0.036)
        self.apply(init_weights)
        for block in self.patch_blocks:
            for linear in (block.qkv, block.proj):
                trunc_normal_(linear.weight, std=dim**-0.5 if patch_std is None else patch_std)

    def forward(
        self, x: Tensor, grid: tuple[int, int], run: Callable[..., Tensor] = lambda block, *args: block(*args)
    ) -> Tensor:
        """x (B, regions, tokens, C) of `grid` regions -> class token and regions (B, 1 + regions, C)."""
        x = x + self.scale_pos
        last = len(self.scale_blocks) - 1
        for i, block in enumerate(self.scale_blocks):
            x = run(block, x, 1) if i == last else run(block, x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x[:, :, 0]], dim=1)
        x = x + resample_positions(self.pos_embed, grid, old_grid=self.grid, prefix=1)
        for block in self.patch_blocks:
            x = run(block, x)
        return x


def _trunk_keys() -> list[tuple[str, str | None]]:
    """torchvision's ResNet names, as they are and as entries of the authors' `resnet_projector`, under ours."""
    table: list[tuple[str, str | None]] = [
        (r"^(?:resnet_projector\.0|conv1)\.", "stem.0.conv."),
        (r"^(?:resnet_projector\.1|bn1)\.", "stem.0.norm."),
        (r"^fc\.", None),
    ]
    for i in range(STAGES):
        block = rf"^(?:resnet_projector\.{4 + i}|layer{1 + i})\.(\d+)\."
        table += [
            (block + r"conv(\d)\.", rf"stages.{i}.\1.conv\2.conv."),
            (block + r"bn(\d)\.", rf"stages.{i}.\1.conv\2.norm."),
            (block + r"downsample\.0\.", rf"stages.{i}.\1.downsample.conv."),
            (block + r"downsample\.1\.", rf"stages.{i}.\1.downsample.norm."),
            (rf"^projection\.proj_heads{i}\.", f"project.{STAGES - 1 - i}."),
        ]
    return table


class DuoFormer(Backbone):
    """DuoFormer. Its levels are the trunk's first three maps and the regions behind the transformer.

    Args:
        img_size: the (height, width) or side that the position table of the regions is made for.
        trunk: one of `TRUNKS`.
        trunk_width: channels of the trunk's first stage, before a bottleneck's expansion.
        small_images: a 3x3 stem without pooling, so that regions are of 16 pixels instead of 32.
        num_scales: how many of the trunk's last maps give tokens, 1 to 4.
        scale_token: "random" (one learned vector for all regions) or "channel" (each region's own, see `ChannelToken`).
        depth: number of scale blocks, and of patch blocks.
        patch_std: of the patch blocks' weights at the start; embed_dim ** -0.5, which keeps the size of what passes,
            when not given.
        head_norm: norm the tokens before the classifier, as the authors' code computes and then ignores.
        global_pool: "token" as published, or "avg", "max", "gem", "ggem" over the regions.
    """

    key_table = (
        *_trunk_keys(),
        (r"^channel_token$", "scale_token"),
        (r"^chann_proj1\.conv1\.", "channel_token.reduce.0.0."),
        (r"^chann_proj1\.conv2\.", "channel_token.reduce.0.1."),
        (r"^chann_proj2\.conv1\.", "channel_token.reduce.1.0."),
        (r"^chann_proj_all\.nConvs\.", "channel_token.mix."),
        (r"^vision_transformer\.pos_embed_for_scale$", "transformer.scale_pos"),
        (r"^vision_transformer\.(?:scaleBlocks|scale_blocks)\.", "transformer.scale_blocks."),
        (r"^vision_transformer\.blocks\.(\d+)\.attn\.", r"transformer.patch_blocks.\1."),
        (r"^vision_transformer\.fc_norm\.", "norm."),
        (r"^vision_transformer\.head\.", "head."),
        (r"^vision_transformer\.", "transformer."),
    )
    default_out_indices = (0, 1, 2, 3)
    num_prefix_tokens = 1

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        trunk: str = "resnet50",
        trunk_width: int = 64,
        small_images: bool = False,
        num_scales: int = 4,
        scale_token: str = "random",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        head_norm: bool = False,
        global_pool: str = "token",
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        patch_std: float | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= num_scales <= STAGES or depth < 1:
            raise ValueError(f"num_scales={num_scales} is not 1 to {STAGES}, or depth={depth} is less than 1")
        if trunk not in TRUNKS:
            raise ValueError(f"trunk={trunk!r} is not one of {list(TRUNKS)}")
        if scale_token not in ("random", "channel"):
            raise ValueError(f"scale_token={scale_token!r} is not 'random' or 'channel'")
        self.num_features = self.embed_dim = embed_dim
        self.num_levels, stride = STAGES, 2 if small_images else 4
        stem = ConvNorm(in_chans, trunk_width, 3 if small_images else 7, 2, act=ReLU)
        self.stem = nn.Sequential(stem) if small_images else nn.Sequential(stem, nn.MaxPool2d(3, 2, padding=1))
        block, depths = TRUNKS[trunk]
        self.stages, widths, width = nn.ModuleList(), [], trunk_width
        for i, count in enumerate(depths):
            inner = trunk_width * 2**i
            blocks = []
            for j in range(count):
                blocks.append(block(width, inner, 2 if i and not j else 1))
                width = inner * block.expansion
            self.stages.append(nn.Sequential(*blocks))
            widths.append(width)
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": widths[i], "reduction": stride * 2**i, "module": f"stages.{i}"} for i in range(STAGES - 1)
        ]
        self.feature_info.append({"num_chs": embed_dim, "reduction": 8 * stride, "module": "transformer"})
        self.project = nn.ModuleList(nn.Conv2d(width, embed_dim, 1) for width in widths[: -num_scales - 1 : -1])
        self.apply(init_convolution)
        for conv in self.project:
            nn.init.kaiming_normal_(conv.weight)
            nn.init.normal_(conv.bias, std=1e-6)
        channels = scale_token == "channel"
        self.channel_token = ChannelToken(widths, embed_dim) if channels else None
        self.scale_token = None if channels else nn.Parameter(0.036 * torch.randn(1, 1, 1, embed_dim))
        sides = (img_size, img_size) if isinstance(img_size, int) else img_size
        tokens = 1 + sum(4**i for i in range(num_scales))
        grid = (-(-sides[0] // (8 * stride)), -(-sides[1] // (8 * stride)))
        self.transformer = Transformer(
            embed_dim, num_heads, depth, tokens, grid, attn_drop_rate, drop_path_rate, patch_std
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6) if head_norm else nn.Identity()
        self.build_head(num_classes, global_pool, drop_rate)

    def gather(self, maps: Sequence[Tensor]) -> Tensor:
        """The trunk's four maps -> (B, regions, tokens, C): the scale token, then the cells from coarse to fine."""
        rows, columns = maps[-1].shape[-2:]
        if self.channel_token is None:
            first = self.scale_token.expand(maps[-1].shape[0], rows * columns, -1, -1)
        else:
            first = to_tokens(self.channel_token(maps)).unsqueeze(2)
        parts = [first]
        for i, project in enumerate(self.project):
            x, side = project(maps[-1 - i]), 2**i
            missing = (rows * side - x.shape[2], columns * side - x.shape[3])
            if any(missing):
                x = F.pad(x, (0, missing[1], 0, missing[0]))
            parts.append(region_tokens(x, side, by_columns=i == 1))  # the authors' order, which the table has learned
        return torch.cat(parts, dim=2)

    def forward_levels(self, x: Tensor, take: Collection[int], stop: int, norm: bool) -> tuple[Tensor, list[Level]]:
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        maps = []
        for stage in self.stages[:stop]:
            x = self.run(stage, x)
            maps.append(x)
        levels = [Level(maps[i]) for i in range(min(len(maps), STAGES - 1)) if i in take]
        if min(stop, self.num_levels) < STAGES:
            return to_tokens(x), levels
        grid = (x.shape[2], x.shape[3])
        x = self.transformer(self.gather(maps), grid, self.run)
        if STAGES - 1 in take:
            tokens = self.norm(x) if norm else x
            levels.append(Level(to_map(tokens[:, 1:], grid), tokens[:, :1]))
        return x, levels

    def forward_final(self, state: Tensor) -> Tensor:
        return self.norm(state)

    def prune_levels(self, keep: int, prune_norm: bool) -> None:
        self.num_levels = min(keep, self.num_levels)
        if self.num_levels < STAGES:
            self.stages = self.stages[: self.num_levels]
            self.transformer = self.project = self.channel_token = self.scale_token = None
        if prune_norm or self.num_levels < STAGES:
            self.norm = nn.Identity()

    def no_weight_decay(self) -> set[str]:
        names = {"scale_token", *(f"transformer.{name}" for name in ("scale_pos", "cls_token", "pos_embed"))}
        return names & {name for name, _ in self.named_parameters()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """How layer-wise learning rates group the parameters."""
        gather = r"^(?:project|scale_token|channel_token)"
        if coarse:
            return {"stem": r"^stem", "blocks": r"^stages\.(\d+)", "gather": gather, "transformer": r"^transformer"}
        return {
            "stem": r"^stem",
            "blocks": r"^stages\.(\d+)\.(\d+)",
            "gather": gather,
            "scale": [(r"^transformer\.scale_blocks\.(\d+)", None), (r"^transformer\.scale_pos", (0,))],
            "patch": [(r"^transformer\.patch_blocks\.(\d+)", None), (r"^transformer\.(?:cls_token|pos_embed)", (0,))],
        }

    def reshape_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        if isinstance(self.norm, nn.Identity):
            state = {k: v for k, v in state.items() if not k.startswith("norm.")}
        name = "transformer.pos_embed"
        if name in state and self.transformer is not None:
            state[name] = resample_positions(state[name], self.transformer.grid, prefix=1)
        return state


def _row(trunk: str, num_scales: int, scale_token: str, **kwargs: object) -> Variant:
    return Variant({"trunk": trunk, "num_scales": num_scales, "scale_token": scale_token, **kwargs})


VARIANTS = {
    "duoformer_r50_s4_channel": _row("resnet50", 4, "channel"),
    "duoformer_r50_s4_channel_d6": _row("resnet50", 4, "channel", depth=6),
    "duoformer_r50_s2_channel": _row("resnet50", 2, "channel"),
    "duoformer_r50_s4_random": _row("resnet50", 4, "random"),
    "duoformer_r50_s2_random": _row("resnet50", 2, "random"),
    "duoformer_r18_s4_random": _row("resnet18", 4, "random"),
    "duoformer_nano": Variant(  # ours, for 32-pixel images: strides 2, 4, 8, 16
        {"trunk": "resnet10", "trunk_width": 16, "small_images": True, "embed_dim": 96, "depth": 2, "num_heads": 3},
        cfg={"input_size": (3, 32, 32), "crop_pct": 1.0},
    ),
}
register(DuoFormer, VARIANTS, first_conv="stem.0.conv")

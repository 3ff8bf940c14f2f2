"""What Next-ViT and FMViT share: stem, patch embedding, and four stages whose last blocks mix in attention.

All norms are batch norms and all activations ReLUs, so that every norm can be folded away for deployment.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from vitalloy.layers.backbone import Backbone, Level, drop_path_rates
from vitalloy.layers.conv_norm import ConvNorm
from vitalloy.layers.tokens import to_tokens

if TYPE_CHECKING:
    pass

HEAD_DIM = 32  # channels of an attention head, and of a group of the grouped convolutions
GROUP = 5  # blocks of the third stage that share one mixing block
# the result of a convolution or norm is seen by nothing but the ReLU behind it: no second map
relu = partial(nn.ReLU, inplace=True)

Local = Callable[[int, int, int, float], nn.Module]
Mixing = Callable[[int, int, int, int, float], nn.Module]


def divisible32(width: float) -> int:
    """The multiple of 32 nearest to `width`, at least 32 and not below 0.9 of it."""
    rounded = max(32, int(width + 16) // 32 * 32)
    return rounded + 32 if rounded < 0.9 * width else rounded


def split_width(width: int) -> tuple[int, int]:
    """Channels of a mixing block that attention makes (about 75 %), and those that convolution adds.

    Raises:
        ValueError: nothing is left for the convolution.
    """
    low = divisible32(int(0.75 * width))
    if low >= width:
        raise ValueError(f"a mixing block of {width} channels leaves none for its convolution; 128 is the least")
    return low, width - low


def average_pool(side: int) -> nn.AvgPool2d:
    """Means of side x side squares; those at the border that are cut off average the cells that they have."""
    return nn.AvgPool2d(side, side, ceil_mode=True, count_include_pad=False)


class PatchEmbed(ConvNorm):
    """Halves the map by 2x2 means when the stride is 2, then a 1x1 convolution and norm to other channels."""

    def __init__(self, in_chans: int, out_chans: int, stride: int = 1) -> None:
        super().__init__(in_chans, out_chans)
        self.pool = average_pool(stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.pool(x))


def patch_embed(in_chans: int, out_chans: int, stride: int = 1) -> nn.Module:
    """A `PatchEmbed`, or nothing where channels and size stay the same."""
    return PatchEmbed(in_chans, out_chans, stride) if stride > 1 or in_chans != out_chans else nn.Identity()


class ConvMixer(nn.Module):
    """A convolution within channels or groups of them, then a 1x1 convolution across all.

    Args:
        local: the first part with its activation; a grouped 3x3 convolution, norm and ReLU (Next-ViT's multi-head
            convolutional attention) when not given.
    """

    def __init__(self, dim: int, local: nn.Module | None = None) -> None:
        super().__init__()
        self.local = local or ConvNorm(dim, dim, 3, groups=dim // HEAD_DIM, act=relu)
        self.projection = nn.Conv2d(dim, dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> the same shape."""
        return self.projection(self.local(x))


def mixes(stage: int, block: int, depth: int) -> bool:
    """Whether a block (counted from 0) is a mixing one: the last of the stages 2 and 4, every fifth of stage 3.

    In a third stage whose depth is no multiple of five the last group is shorter.
    """
    last = block == depth - 1
    return stage > 0 and (last or (stage == 2 and block % GROUP == GROUP - 1))


class HybridPyramid(Backbone):
    """Stem, then one flat list of blocks in four stages: local ones, and mixing ones by the rule of `mixes`.

    Args:
        local: makes a local block from (in_chans, out_chans, stride, drop_path).
        mixing: makes a mixing block from (in_chans, out_chans, stride, reduction, drop_path).
        depths: blocks of each stage.
        dims: channels of the local blocks of each stage.
        mixing_dims: channels of the mixing blocks of stages 2 to 4, and so of their maps.
        reductions: side of the squares that one key stands for in the attention of each stage.
        stem_dims, stem_strides: the four 3x3 convolutions of the stem.
        extra_norm: norm the maps of stages 1 to 3, also on their way onward, and the last one as the classifier
            does: the published form for dense prediction with extra norms.
        init_std: of the weights at the start; narrow models need more than the published 0.02, or little of the
            image reaches the end before the norms have seen data.
    """

    default_out_indices = (0, 1, 2, 3)

    def __init__(
        self,
        local: Local,
        mixing: Mixing,
        in_chans: int = 3,
        num_classes: int = 1000,
        depths: Sequence[int] = (3, 4, 10, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
        mixing_dims: Sequence[int] = (256, 512, 1024),
        reductions: Sequence[int] = (8, 4, 2, 1),
        stem_dims: Sequence[int] = (64, 32, 64, 64),
        stem_strides: Sequence[int] = (2, 1, 1, 2),
        extra_norm: bool = False,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        widths = [in_chans, *stem_dims]
        self.stem = nn.Sequential(
            *(ConvNorm(widths[i], widths[i + 1], 3, stride, act=relu) for i, stride in enumerate(stem_strides))
        )
        width, reduction = widths[-1], 1
        for stride in stem_strides:
            reduction *= stride
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        self.features, self.extra_norm = nn.ModuleList(), nn.ModuleList()
        self.stage_ends: list[int] = []
        self.feature_info: list[dict[str, Any]] = []
        for i, depth in enumerate(depths):
            reduction *= 2 if i else 1
            for j in range(depth):
                stride = 2 if i and j == 0 else 1
                if mixes(i, j, depth):
                    block = mixing(width, mixing_dims[i - 1], stride, reductions[i], next(rates))
                    width = mixing_dims[i - 1]
                else:
                    block = local(width, dims[i], stride, next(rates))
                    width = dims[i]
                self.features.append(block)
            module = f"features.{len(self.features) - 1}"
            if extra_norm:
                module = f"extra_norm.{i}" if i < len(depths) - 1 else "norm"
                if i < len(depths) - 1:
                    self.extra_norm.append(nn.BatchNorm2d(width))
            self.stage_ends.append(len(self.features))
            self.feature_info.append({"num_chs": width, "reduction": reduction, "module": module})
        self.num_features = width
        self.norms_maps = extra_norm
        self.norm = nn.BatchNorm2d(width)
        self.apply(partial(init_truncated, std=init_std))
        self.build_head(num_classes, global_pool, drop_rate)

    def forward_levels(self, x: Tensor, take: Collection[int], stop: int, norm: bool) -> tuple[Tensor, list[Level]]:
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        levels: list[Level] = []
        start = 0
        for i, end in enumerate(self.stage_ends[:stop]):
            for block in self.features[start:end]:
                x = self.run(block, x)
            start = end
            if i < len(self.extra_norm):
                x = self.extra_norm[i](x)
            if i in take:
                last = i == len(self.feature_info) - 1
                levels.append(Level(self.norm(x) if last and (norm or self.norms_maps) else x))
        return x, levels

    def forward_final(self, state: Tensor) -> Tensor:
        return to_tokens(self.norm(state))

    def prune_levels(self, keep: int, prune_norm: bool) -> None:
        shorter = keep < len(self.stage_ends)  # the norm is for the channels of the last level
        if shorter or (prune_norm and not self.norms_maps):
            self.norm = nn.Identity()
        self.stage_ends, self.feature_info = self.stage_ends[:keep], self.feature_info[:keep]
        self.features = self.features[: self.stage_ends[-1]]
        self.extra_norm = self.extra_norm[:keep]
        self.num_features = self.feature_info[-1]["num_chs"]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """How layer-wise learning rates group the parameters."""
        blocks = [(r"^features\.(\d+)", None), (r"^extra_norm\.(\d+)", (99998,)), (r"^norm", (99999,))]
        return {"stem": r"^stem", "blocks": blocks}


def init_truncated(module: nn.Module, std: float) -> None:
    """The authors' start: linear and convolution weights truncated normal, zero biases."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        trunc_normal_(module.weight, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)

"""What the UniFormers share: blocks that relate tokens locally or globally, on maps of images and of clips.

A map is (B, C, H, W), or (B, C, T, H, W) for clips, channels-last in memory, so that linear layers over channels and
convolutions both work on views. The 1x1 convolutions of the authors' local blocks are linear layers here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vitalloy.layers.attention import SelfAttention
from vitalloy.layers.backbone import Level, init_weights
from vitalloy.layers.fusion import LAYOUT, fold_norm_before, fold_scale
from vitalloy.layers.mlp import Mlp
from vitalloy.layers.pyramid import Pyramid
from vitalloy.layers.tokens import to_map, to_tokens

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
BATCH_NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def channels_last(x: Tensor) -> Tensor:
    """A map with its channels last in memory; a copy only where they are not."""
    return x.contiguous(memory_format=LAYOUT[x.ndim])


class PatchEmbed(nn.Module):
    """A convolution to a coarser map, then a norm over channels.

    Args:
        kernel, stride, padding: of the convolution, one number an axis of the map.
    """

    def __init__(
        self, in_chans: int, dim: int, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int] | int = 0
    ) -> None:
        super().__init__()
        self.proj = CONV[len(kernel)](in_chans, dim, tuple(kernel), tuple(stride), padding)
        self.norm = nn.LayerNorm(dim)  # eps 1e-5, where the blocks have 1e-6

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(channels_last(x))
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


class ConvEmbed(nn.Module):
    """Overlapping patches: 3x3 convolutions, a batch norm behind each and GELU between them.

    Args:
        chans: channels before, between and behind the convolutions.
        strides: one a convolution.
    """

    def __init__(self, chans: Sequence[int], strides: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for (before, behind), stride in zip(pairwise(chans), strides, strict=True):
            layers += [nn.Conv2d(before, behind, 3, stride, 1), nn.BatchNorm2d(behind), nn.GELU()]
        self.proj = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(channels_last(x))


class PositionConv(nn.Module):
    """x + a depth-wise convolution of x, of side 3: positions from the zeros around the map."""

    def __init__(self, dim: int, axes: int) -> None:
        super().__init__()
        self.conv = CONV[axes](dim, dim, 3, padding=1, groups=dim)
        self.folded = False

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if self.folded else x + self.conv(x)

    @torch.no_grad()
    def fuse(self) -> None:
        """Add x within the convolution: 1 on the kernel's centre."""
        if not self.folded:
            self.conv.weight[(slice(None), 0, *[1] * (self.conv.weight.ndim - 2))] += 1
            self.folded = True


class Block(nn.Module):
    """What local and global blocks have in common: positions, the perceptron, and how branches join.

    Args:
        axes: 2 for images, 3 for clips.
        layer_scale: where the scales of both branches start; None for none.
    """

    def __init__(
        self,
        dim: int,
        axes: int = 2,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.pos_embed = PositionConv(dim, axes)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        for name in ("gamma_1", "gamma_2"):
            scale = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))
            self.register_parameter(name, scale)

    def add(self, x: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
        """x + scale * branch, channels last."""
        branch = self.drop_path(branch)
        return x + branch if scale is None else torch.addcmul(x, branch, scale)


class LocalBlock(Block):
    """Tokens related by a depth-wise convolution of side 5 between two linear layers, without an activation."""

    def __init__(
        self,
        dim: int,
        axes: int = 2,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__(dim, axes, mlp_ratio, drop_path, layer_scale)
        self.norm1 = BATCH_NORM[axes](dim)
        self.conv1 = nn.Linear(dim, dim)
        self.dwconv = CONV[axes](dim, dim, 5, padding=2, groups=dim)
        self.conv2 = nn.Linear(dim, dim)
        self.norm2 = BATCH_NORM[axes](dim)

    def forward(self, x: Tensor) -> Tensor:
        """A map -> a map."""
        x = self.pos_embed(x)
        branch = self.conv1(self.norm1(x).movedim(1, -1)).movedim(-1, 1)
        branch = self.conv2(self.dwconv(branch).movedim(1, -1))
        x = self.add(x.movedim(1, -1), branch, self.gamma_1)  # (B, H, W, C)
        branch = self.mlp(self.norm2(x.movedim(-1, 1)).movedim(1, -1))
        return self.add(x, branch, self.gamma_2).movedim(-1, 1)

    def fuse(self) -> None:
        if isinstance(self.norm1, _BatchNorm):
            self.conv1, self.norm1 = fold_norm_before(self.norm1, self.conv1), nn.Identity()
            self.mlp.fc1, self.norm2 = fold_norm_before(self.norm2, self.mlp.fc1), nn.Identity()
        if self.gamma_1 is not None:
            self.conv2, self.gamma_1 = fold_scale(self.conv2, self.gamma_1), None
            self.mlp.fc2, self.gamma_2 = fold_scale(self.mlp.fc2, self.gamma_2), None


class GlobalBlock(Block):
    """Tokens related by self-attention among all of them, or among those of each window.

    Args:
        window: side of the windows; None for attention among all tokens.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        axes: int = 2,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        window: int | None = None,
    ) -> None:
        super().__init__(dim, axes, mlp_ratio, drop_path, layer_scale)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SelfAttention(dim, num_heads, qkv_bias, attn_drop)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.window = window
        self.apply(init_weights)

    def forward(self, x: Tensor) -> Tensor:
        """A map -> a map."""
        x = self.pos_embed(x)
        grid = x.shape[2:]
        x = to_tokens(x)
        branch = self.norm1(x)
        branch = self.attn(branch) if self.window is None else in_windows(self.attn, branch, grid, self.window)
        x = self.add(x, branch, self.gamma_1)
        x = self.add(x, self.mlp(self.norm2(x)), self.gamma_2)
        return to_map(x, grid)

    def fuse(self) -> None:
        if self.gamma_1 is not None:
            self.attn.proj, self.gamma_1 = fold_scale(self.attn.proj, self.gamma_1), None
            self.mlp.fc2, self.gamma_2 = fold_scale(self.mlp.fc2, self.gamma_2), None


def in_windows(attend: Callable[[Tensor], Tensor], x: Tensor, grid: Sequence[int], window: int) -> Tensor:
    """Attention in each window of a grid. Zeros behind its last rows and columns fill the last windows and take part.

    Args:
        attend: (B * windows, window * window, C) -> the same shape.
        x: (B, H * W, C).
    """
    height, width = grid
    if (height, width) == (window, window):
        return attend(x)
    x = F.pad(x.unflatten(1, (height, width)), (0, 0, 0, -width % window, 0, -height % window))
    x = x.unflatten(2, (-1, window)).unflatten(1, (-1, window)).transpose(2, 3)  # (B, rows, columns, w, w, C)
    count = x.shape[1:3]
    x = attend(x.flatten(3, 4).flatten(0, 2))
    x = x.unflatten(1, (window, window)).unflatten(0, (-1, *count)).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)[:, :height, :width].flatten(1, 2)


class UniFormerPyramid(Pyramid):
    """Stages on maps: two of local blocks, two of global ones. What is left to add are the stages and `norm`.

    A stage's own norm, if it has one, is for its level alone: the next stage takes the map before it. `norm` is the
    batch norm of the last map, or nothing where the stages have norms.
    """

    norm: nn.Module
    key_table: Sequence[tuple[str, str | None]] = (
        (r"^(?:backbone\.)?blocks(\d)\.(\d+)\.pos_embed\.", r"block\1.\2.pos_embed.conv."),
        (r"^(?:backbone\.)?blocks([12])\.(\d+)\.attn\.", r"block\1.\2.dwconv."),
        (r"^(?:backbone\.)?blocks(\d)\.", r"block\1."),
        (r"^backbone\.(.+)", r"\1"),
    )

    def add_stage(self, embed: nn.Module, blocks: Sequence[nn.Module], norm: nn.Module, dim: int, stride: int) -> None:
        super().add_stage(embed, blocks, norm, dim, stride)
        self.feature_info[-1]["module"] = f"block{self.num_stages}.{len(blocks) - 1}"

    def forward_levels(self, x: Tensor, take: Collection[int], stop: int, norm: bool) -> tuple[Tensor, list[Level]]:
        levels, stop = [], min(stop, self.num_stages)
        for i in range(stop):
            x = self.get_submodule(f"patch_embed{i + 1}")(x)
            for block in self.get_submodule(f"block{i + 1}"):
                x = self.run(block, x)
            if i in take or i == stop - 1:
                level = self.get_submodule(f"norm{i + 1}")(x)
                final = self.norm(level) if i == 3 else level
            if i in take:
                levels.append(Level(final if norm else level))
        return final, levels

    def prune_levels(self, keep: int, prune_norm: bool) -> None:
        if prune_norm or keep < self.num_stages:  # the norm is for the channels of the last level
            self.norm = nn.Identity()
        super().prune_levels(keep, prune_norm)

    def reshape_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """1x1 kernels become the matrices of linear layers; scales lose their axes of length 1."""
        own = dict(self.named_parameters())
        for name, value in state.items():
            if name in own and value.ndim > own[name].ndim and value.numel() == own[name].numel():
                state[name] = value.reshape(own[name].shape)
        return state

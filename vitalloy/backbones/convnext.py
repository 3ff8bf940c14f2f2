"""ConvNeXt: the convolutional network with a transformer's habits, and the baseline that hybrids are held against.

"A ConvNet for the 2020s", Liu et al., CVPR 2022, arXiv 2201.03545.

Loads the authors' files and timm's; the parameter names are timm's but for the final norm and the classifier, which are
`norm` and `head` as in the authors' code. Maps are channels-last in memory from the first convolution on, so that the
norms and linear layers over channels work on views.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm2d, trunc_normal_
from torch import Tensor, nn

from vitalloy.layers.backbone import Backbone, Level, drop_path_rates
from vitalloy.layers.fusion import fold_scale
from vitalloy.layers.mlp import Mlp
from vitalloy.layers.streaming import may_stream, stream_branch
from vitalloy.layers.tokens import to_tokens
from vitalloy.registry import Variant, register


class Block(nn.Module):
    """Depthwise 7x7 convolution, then a perceptron at each position, scaled and added to the input.

    Args:
        layer_scale: where the scale `gamma` of the branch starts; None for none.
    """

    def __init__(self, dim: int, mlp_ratio: float, layer_scale: float | None, drop_path: float) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.gamma = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> the same shape."""
        branch, x = self.conv_dw(x).permute(0, 2, 3, 1), x.permute(0, 2, 3, 1)
        mlp = self.mlp
        seen = self.training or mlp._forward_hooks or mlp._forward_pre_hooks
        if self.gamma is None and not seen and may_stream(branch, mlp.fc1, mlp.act, mlp.fc2, self.norm):
            return stream_branch(x, branch, self.norm, mlp.fc1, mlp.act, mlp.fc2).permute(0, 3, 1, 2)
        branch = self.drop_path(mlp(self.norm(branch)))
        # scale and add in one pass over the map
        x = x + branch if self.gamma is None else torch.addcmul(x, branch, self.gamma)
        return x.permute(0, 3, 1, 2)

    def fuse(self) -> None:
        if self.gamma is not None:
            self.mlp.fc2, self.gamma = fold_scale(self.mlp.fc2, self.gamma), None


class Stage(nn.Module):
    """One level: norm and 2x2 convolution of stride 2 (none on the first), then blocks."""

    def __init__(self, downsample: nn.Module, blocks: list[Block]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, run: Callable[..., Tensor] = lambda block, *args: block(*args)) -> Tensor:
        """x (B, C, H, W); `run` calls a block."""
        x = self.downsample(x)
        for block in self.blocks:
            x = run(block, x)
        return x


class ConvNeXt(Backbone):
    """ConvNeXt.

    Args:
        depths, dims: number of blocks and channels, one a level.
        layer_scale: where the scales of the residual branches start; None for none.
    """

    key_table = (
        (r"^(?:backbone|encoder)\.(.+)", r"\1"),
        (r"^downsample_layers\.0\.", "stem."),
        (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
        (r"^stages\.(\d+)\.(\d+)\.dwconv\.", r"stages.\1.blocks.\2.conv_dw."),
        (r"^stages\.(\d+)\.(\d+)\.pwconv(\d)\.", r"stages.\1.blocks.\2.mlp.fc\3."),
        (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
        (r"^head\.norm\.", "norm."),
        (r"^head\.fc\.", "head."),
    )
    default_out_indices = (0, 1, 2, 3)

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        patch_size: int = 4,
        depths: tuple[int, ...] = (3, 3, 9, 3),
        dims: tuple[int, ...] = (96, 192, 384, 768),
        mlp_ratio: float = 4.0,
        layer_scale: float | None = 1e-6,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_features = dims[-1]
        self.stem = nn.Sequential(nn.Conv2d(in_chans, dims[0], patch_size, patch_size), LayerNorm2d(dims[0], eps=1e-6))
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        self.stages = nn.ModuleList()
        self.feature_info = []
        for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            down = nn.Identity()
            if i:
                down = nn.Sequential(LayerNorm2d(dims[i - 1], eps=1e-6), nn.Conv2d(dims[i - 1], dim, 2, 2))
            blocks = [Block(dim, mlp_ratio, layer_scale, next(rates)) for _ in range(depth)]
            self.stages.append(Stage(down, blocks))
            self.feature_info.append({"num_chs": dim, "reduction": patch_size * 2**i, "module": f"stages.{i}"})
        self.norm = nn.LayerNorm(self.num_features, eps=1e-6)  # of the pooled features
        self.apply(init_weights)
        self.build_head(num_classes, global_pool, drop_rate)

    def forward_levels(self, x: Tensor, take: Collection[int], stop: int, norm: bool) -> tuple[Tensor, list[Level]]:
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        levels = []
        for i, stage in enumerate(self.stages[:stop]):
            x = stage(x, self.run)
            if i in take:
                levels.append(Level(x))
        return x, levels

    def forward_final(self, state: Tensor) -> Tensor:
        return to_tokens(state)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(self.norm(self.pool(x)))
        return x if pre_logits else self.head(x)

    def prune_levels(self, keep: int, prune_norm: bool) -> None:
        if prune_norm or keep < len(self.stages):  # the norm is for the channels of the last level
            self.norm = nn.Identity()
        self.stages, self.feature_info = self.stages[:keep], self.feature_info[:keep]
        self.num_features = self.feature_info[-1]["num_chs"]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """How layer-wise learning rates group the parameters."""
        fine = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else fine}


def init_weights(module: nn.Module) -> None:
    """The authors' start: convolution and linear weights truncated normal 0.02, zero biases."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


_1K = "convnext_{}_1k_224_ema.pth"
VARIANTS = {
    "convnext_tiny": Variant({"depths": (3, 3, 9, 3), "dims": (96, 192, 384, 768)}, 82.1, (_1K.format("tiny"),)),
    "convnext_small": Variant({"depths": (3, 3, 27, 3), "dims": (96, 192, 384, 768)}, 83.1, (_1K.format("small"),)),
    "convnext_base": Variant({"depths": (3, 3, 27, 3), "dims": (128, 256, 512, 1024)}, 83.8, (_1K.format("base"),)),
    "convnext_large": Variant({"depths": (3, 3, 27, 3), "dims": (192, 384, 768, 1536)}, 84.3, (_1K.format("large"),)),
}
register(ConvNeXt, VARIANTS, first_conv="stem.0", crop_pct=0.875)

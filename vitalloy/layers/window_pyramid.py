"""Backbones of levels that halve the map and attend in windows, shifted in every second block: Swin and its kin."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor, nn

from vitalloy.layers.backbone import Backbone, Level, drop_path_rates, init_weights
from vitalloy.layers.window_attention import NormPatchEmbed, PatchMerging, WindowAttention
from vitalloy.layers.windows import Pair, Windows, resample_relative


class Stage(nn.Module):
    """One level: patch merging (none on the first), then blocks whose windows are shifted in every second one."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], grid: Pair) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        window = blocks[0].attn.window
        self.windows = nn.ModuleList(Windows(grid, window, shifted) for shifted in (False, True)[: len(blocks)])

    def forward(self, x: Tensor, run: Callable[..., Tensor] = lambda block, *args: block(*args)) -> Tensor:
        """x (B, H, W, C); `run` calls a block."""
        x = self.downsample(x)
        cuts = [windows(x) for windows in self.windows]  # once for all blocks
        for i, block in enumerate(self.blocks):
            x = run(block, x, cuts[i % 2])
        return x


class WindowPyramid(Backbone):
    """A backbone of `Stage`s; what is left to write is its block.

    Args:
        make_block: (dim, heads, window, drop path rate) -> a module that takes (map (B, H, W, C), cut), returns such a
            map and has its `WindowAttention` as `attn`.
        img_size: the (height, width) or side that windows are made for: a level whose grid is smaller than
            `window_size` has a table of relative positions for that grid. Other inputs run too.
        window_size: side of the windows, or (height, width).
        depths, num_heads: one number a level; channels double from level to level, starting at `embed_dim`.
    """

    def __init__(
        self,
        make_block: Callable[[int, int, Pair, float], nn.Module],
        img_size: int | tuple[int, int],
        patch_size: int,
        in_chans: int,
        num_classes: int,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        window_size: int | tuple[int, int],
        global_pool: str,
        drop_rate: float,
        drop_path_rate: float,
    ) -> None:
        super().__init__()
        sides = (img_size, img_size) if isinstance(img_size, int) else img_size
        window = (window_size, window_size) if isinstance(window_size, int) else tuple(window_size)
        self.embed_dim, self.num_features = embed_dim, embed_dim * 2 ** (len(depths) - 1)
        self.patch_embed = NormPatchEmbed(patch_size, in_chans, embed_dim)
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        self.layers = nn.ModuleList()
        self.feature_info = []
        for i, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            dim, stride = embed_dim * 2**i, patch_size * 2**i
            grid = tuple(math.ceil(side / stride) for side in sides)
            clamped = tuple(min(w, g) for w, g in zip(window, grid, strict=True))
            blocks = [make_block(dim, heads, clamped, next(rates)) for _ in range(depth)]
            self.layers.append(Stage(PatchMerging(dim // 2) if i else nn.Identity(), blocks, grid))
            self.feature_info.append({"num_chs": dim, "reduction": stride, "module": f"layers.{i}"})
        self.norm = nn.LayerNorm(self.num_features)
        self.apply(init_weights)
        self.build_head(num_classes, global_pool, drop_rate)

    def forward_levels(self, x: Tensor, take: Collection[int], stop: int, norm: bool) -> tuple[Tensor, list[Level]]:
        x = self.patch_embed(x)
        levels = []
        for i, stage in enumerate(self.layers[:stop]):
            x = stage(x, self.run)
            if i in take:
                last = i == len(self.feature_info) - 1
                levels.append(Level((self.norm(x) if norm and last else x).permute(0, 3, 1, 2)))
        return x, levels

    def forward_final(self, state: Tensor) -> Tensor:
        return self.norm(state).flatten(1, 2)

    def prune_levels(self, keep: int, prune_norm: bool) -> None:
        if prune_norm or keep < len(self.layers):  # the norm is for the channels of the last level
            self.norm = nn.Identity()
        self.layers, self.feature_info = self.layers[:keep], self.feature_info[:keep]
        self.num_features = self.feature_info[-1]["num_chs"]

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """How layer-wise learning rates group the parameters."""
        fine = [(r"^layers\.(\d+)\.downsample", (0,)), (r"^layers\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^patch_embed", "blocks": r"^layers\.(\d+)" if coarse else fine}

    def reshape_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' merging at the end of a level moves to the start of the next; tables get our windows."""
        if any(key.startswith("layers.0.downsample.") for key in state):
            merging = re.compile(r"^layers\.(\d+)\.downsample\.")
            state = {merging.sub(lambda m: f"layers.{int(m[1]) + 1}.downsample.", k): v for k, v in state.items()}
        for name, module in self.named_modules():
            table = state.get(key := f"{name}.relative_position_bias_table")
            if isinstance(module, WindowAttention) and table is not None:
                state[key] = resample_relative(table, module.window)
        return state

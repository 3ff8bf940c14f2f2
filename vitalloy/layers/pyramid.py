"""Backbones of stages that halve the map: patch_embed1, block1, norm1, patch_embed2, ... as most authors name them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn

from vitalloy.layers.backbone import Backbone, Level
from vitalloy.layers.tokens import to_map, to_tokens


class Pyramid(Backbone):
    """A backbone that is built with `add_stage` alone; what is left to write is its parts.

    A stage's embedding returns (tokens, grid) and its blocks take (tokens, grid) and return tokens; its norm takes
    tokens. A stage whose embedding returns a map has blocks and a norm on maps. Its output is the normalised map.
    """

    default_out_indices = (0, 1, 2, 3)

    def __init__(self) -> None:
        super().__init__()
        self.feature_info: list[dict[str, Any]] = []
        self.num_stages = 0

    def add_stage(self, embed: nn.Module, blocks: Sequence[nn.Module], norm: nn.Module, dim: int, stride: int) -> None:
        """Append a stage of `dim` channels at `stride` pixels a token."""
        self.num_stages += 1
        i = self.num_stages
        self.register_module(f"patch_embed{i}", embed)
        self.register_module(f"block{i}", nn.ModuleList(blocks))
        self.register_module(f"norm{i}", norm)
        self.feature_info.append({"num_chs": dim, "reduction": stride, "module": f"norm{i}"})
        self.num_features = dim

    def forward_stage(self, i: int, x: Tensor) -> Tensor:
        """The map before stage i (counted from 1) -> the map behind it."""
        embedded = self.get_submodule(f"patch_embed{i}")(x)
        blocks, norm = self.get_submodule(f"block{i}"), self.get_submodule(f"norm{i}")
        if isinstance(embedded, Tensor):
            for block in blocks:
                embedded = self.run(block, embedded)
            return norm(embedded)
        x, grid = embedded
        for block in blocks:
            x = self.run(block, x, grid)
        return to_map(norm(x), grid)

    def forward_levels(self, x: Tensor, take: Collection[int], stop: int, norm: bool) -> tuple[Tensor, list[Level]]:
        levels = []
        for i in range(min(stop, self.num_stages)):
            x = self.forward_stage(i + 1, x)
            if i in take:
                levels.append(Level(x))
        return x, levels

    def forward_final(self, state: Tensor) -> Tensor:
        return to_tokens(state)

    def prune_levels(self, keep: int, prune_norm: bool) -> None:
        for i in range(keep, self.num_stages):
            for part in ("patch_embed", "block", "norm"):
                delattr(self, f"{part}{i + 1}")
        self.num_stages = min(keep, self.num_stages)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """How layer-wise learning rates group the parameters."""
        if coarse:
            return {"stem": r"^patch_embed1", "blocks": r"^(?:patch_embed|block|norm)(\d)"}
        return {
            "stem": r"^patch_embed1",
            "blocks": [
                (r"^block(\d)\.(\d+)", None),
                (r"^patch_embed(\d)", (0,)),
                (r"^norm(\d)", (99999,)),
            ],
        }

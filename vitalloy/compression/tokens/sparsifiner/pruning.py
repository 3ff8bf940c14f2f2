"""Token pruning beside the sparse attention: patch tokens that the class token hardly looks at are dropped.

As published a dead token stays in its place and is set to zero, behind each block and as query, key and value. Here it
leaves the sequence, which is what saves the time, and the answers are the same: all that a dead token does to the rest
is to take a share of the class token's softmax, as a key of zeros, and that share is taken here too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# A plain object, not a module: what one block leaves for the next within a pass.


class TokenState:
    """Which patch tokens are alive at this place of the pass; class tokens always are.

    Attributes:
        prefix: class tokens in front.
        patches: patch tokens of a whole sequence.
        drop: dead tokens leave the sequence; otherwise they become zeros.
        alive: (B, prefix + a), the places of the tokens that are left; None before the first was dropped.
        dead: (B, prefix + n) bool, where tokens become zeros instead.
        scores: (B, a), how much the class token looked at each patch in the last attention.
        reconstructing: nothing is pruned (the first training phase).
    """

    def __init__(self, prefix: int, patches: int, drop: bool = True) -> None:
        self.prefix, self.patches, self.drop, self.reconstructing = prefix, patches, drop, False
        self.begin()

    def begin(self) -> None:
        """A new pass: all are alive."""
        self.alive: Tensor | None = None
        self.dead: Tensor | None = None
        self.scores: Tensor | None = None
        self.count: int | None = None

    @property
    def dropped(self) -> int:
        """Tokens that left the sequence so far."""
        return 0 if self.alive is None else self.patches - self.count


class PruneTokens(nn.Module):
    """Behind a block: chooses `count` patch tokens to live on (None: chooses none) and lets go of the rest."""

    def __init__(self, state: TokenState, count: int | None) -> None:
        super().__init__()
        self.state, self.count = state, count

    def forward(self, x: Tensor) -> Tensor:
        """x (B, prefix + a, C) -> (B, prefix + count, C), or the same shape with zeros."""
        state = self.state
        if state.reconstructing:
            return x
        if self.count is not None:
            x = self._choose(x)
        return x if state.dead is None else x.masked_fill(state.dead[..., None], 0)

    def _choose(self, x: Tensor) -> Tensor:
        state, front = self.state, self.state.prefix
        scores, state.scores, state.count = state.scores, None, self.count
        if state.dead is not None:
            scores = scores.masked_fill(state.dead[:, front:], -torch.inf)
        order = torch.arange(scores.shape[1], device=x.device, dtype=scores.dtype)
        best = (scores - order * torch.finfo(scores.dtype).tiny).topk(self.count, dim=1).indices
        if not state.drop:
            dead = torch.ones_like(scores, dtype=torch.bool).scatter(1, best, False)
            state.dead = torch.nn.functional.pad(dead, (front, 0), value=False)
            return x
        best = best.sort(dim=1).values + front
        prefix = torch.arange(front, device=x.device).expand(x.shape[0], -1)
        kept = torch.cat([prefix, best], dim=1)
        state.alive = kept if state.alive is None else state.alive.gather(1, kept)
        return x.gather(1, kept[..., None].expand(-1, -1, x.shape[2]))


def prune(block: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """Forward hook of a block that has a `prune_tokens`."""
    return block.prune_tokens(output)


def begin(block: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook of the blocks before which no token was dropped."""
    block.prune_tokens.state.begin()

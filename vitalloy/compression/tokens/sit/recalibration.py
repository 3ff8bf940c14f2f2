"""Feature recalibration distillation: what a slimmed model knows is spread over all places again and compared there.

The reverse modules are for training alone. Published: one behind each block from the first slimming on, three terms of
the loss, the learning rate of the reverse modules five times the others'.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitalloy.compression.trunk import Point, hooked
from vitalloy.layers.backbone import init_weights
from vitalloy.layers.mlp import Mlp


class ReverseSlimming(nn.Module):
    """M mixtures back to N tokens, to be compared with the full model's: (B, M, C) -> (B, N, C).

    Args:
        dim: channels.
        slots, places: M and N.
        ratio: the width of both perceptrons, over places and over channels, in places and channels.
    """

    def __init__(self, dim: int, slots: int, places: int, ratio: int = 4) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.mlp1 = Perceptron(slots, places * ratio, places)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp2 = Mlp(dim, dim * ratio)
        self.apply(init_weights)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mlp1(self.norm1(x).mT).mT  # mixes places; no residual, for there are other places now
        return x + self.mlp2(self.norm2(x))


class Perceptron(nn.Module):
    """Linear, GELU, linear, to another width: (..., dim) -> (..., out)."""

    def __init__(self, dim: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Recalibration(nn.ModuleList):
    """A reverse module for each tap of a slimmed model; where nothing was slimmed yet, the tokens as they are.

    Args:
        slimmed, full: patch tokens (B, M, C) and (B, N, C) at each tap of the slimmed and of the full model.
    """

    def __init__(self, slimmed: Sequence[Tensor], full: Sequence[Tensor]) -> None:
        pairs = zip(slimmed, full, strict=True)
        super().__init__(
            nn.Identity() if few.shape == many.shape else ReverseSlimming(many.shape[-1], few.shape[1], many.shape[1])
            for few, many in pairs
        )

    def forward(self, slimmed: Sequence[Tensor]) -> list[Tensor]:
        """Patch tokens at each tap -> as many at each as the full model has there."""
        return [reverse(tokens) for reverse, tokens in zip(self, slimmed, strict=True)]


@contextmanager
def tapped(model: nn.Module, taps: Sequence[Point]) -> Iterator[list[Tensor]]:
    """Keeps patch tokens (B, N, C): a list that each pass inside the block fills anew, in the order of the taps."""
    seen: dict[str, Tensor] = {}
    found: list[Tensor] = []

    def keep(tap: Point, output: object) -> None:
        seen[tap.name] = tap.read(output).patches
        if tap is taps[-1]:
            found[:] = [seen[t.name] for t in taps]

    with hooked(model, {tap.name: lambda out, tap=tap: keep(tap, out) for tap in taps}):
        yield found


def token_distance(recovered: Sequence[Tensor], full: Sequence[Tensor], relative: bool = False) -> Tensor:
    """The mean over taps of the mean square distance.

    Args:
        relative: each distance as a share of the variance of the full model's tokens, so that a backbone whose tokens
            are large does not drown the other terms; False as published.
    """
    terms = []
    for mine, theirs in zip(recovered, full, strict=True):
        distance = F.mse_loss(mine, theirs)
        terms.append(distance / theirs.var().clamp_min(1e-12) if relative else distance)
    return torch.stack(terms).mean()


def logit_distance(logits: Tensor, full: Tensor, temperature: float = 1.0) -> Tensor:
    """temperature² KL(full model || slimmed model), the mean over images."""
    mine, theirs = (logits / temperature).log_softmax(-1), (full / temperature).log_softmax(-1)
    return temperature**2 * F.kl_div(mine, theirs, reduction="batchmean", log_target=True)

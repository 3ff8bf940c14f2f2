"""The sparse attention socket: the predictor chooses the pairs, one of the kernels computes them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitalloy.compression.tokens.sparsifiner.kernels import allowed, flex, gathered, masked
from vitalloy.compression.tokens.sparsifiner.predictor import MaskPredictor
from vitalloy.compression.tokens.sparsifiner.pruning import TokenState
from vitalloy.layers.attention import Attend
from vitalloy.layers.sockets import find

KERNELS = ("dense", "gather", "flex")


@dataclass
class Maps:
    """What one attention layer looked like, for losses and pictures; n queries without class tokens, N with them.

    Attributes:
        coefficients: (B, heads, n, r), those that count.
        approximate: (B, heads, n, M), the predicted attention.
        mask: (B, heads, N, M), 1 where a pair was kept; without gradient.
        masked: (B, heads, N, M), the attention between kept pairs.
        unmasked: (B, heads, N, M), the full attention.
        alive: (B, M), which tokens those of the maps are, where others were dropped before.
    """

    coefficients: Tensor
    approximate: Tensor
    mask: Tensor
    masked: Tensor
    unmasked: Tensor
    alive: Tensor | None = None


class SparseAttend(Attend):
    """Attention between the pairs of tokens that a predictor keeps.

    Args:
        predictor: for as many keys as the layer has.
        keep: share of the keys that a query keeps, above 0 and up to 1; ceil(keep * m) of them.
        score_threshold: keep the pairs predicted above it instead; needs the "dense" or the "flex" kernel.
        prefix: class tokens in front of the queries; they attend to all keys.
        group: neighbouring queries that share their keys; 1 as published.
        kernel: "dense", "gather" or "flex".
    """

    def __init__(
        self,
        predictor: MaskPredictor,
        *,
        keep: float = 0.25,
        score_threshold: float | None = None,
        prefix: int = 0,
        group: int = 1,
        kernel: str = "dense",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dropout)
        self.predictor = predictor
        self.keep, self.score_threshold, self.prefix = keep, score_threshold, prefix
        self.group, self.kernel = group, kernel
        self.reconstructing = False  # the first training phase: full attention, the raw prediction
        self.tokens: TokenState | None = None
        self.watched: list[Maps] | None = None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, bias: Tensor | None = None
    ) -> Tensor:
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        alive = dead = None
        if self.tokens is not None and not self.reconstructing:
            alive, dead = self.tokens.alive, self.tokens.dead
            if dead is not None:
                q, k, v = (x.masked_fill(dead[:, None, :, None], 0) for x in (q, k, v))
        if self.reconstructing:
            out = super().forward(q, k, v, scale, bias)
        else:
            out = self._sparse(q, k, v, scale, bias, alive, dead)
        if self.watched is not None:
            self.watched.append(self._maps(q, k, scale, bias, alive, dead))
        return out

    def choose(self, q: Tensor, k: Tensor, alive: Tensor | None = None, dead: Tensor | None = None) -> Tensor:
        """The keys (B, heads, groups, b) that each group of queries keeps; q without class tokens."""
        return _largest(self._scores(q, k, alive, dead), self.budget(k, dead))

    def budget(self, k: Tensor, dead: Tensor | None = None) -> int:
        """Keys that a query keeps: never more than there are tokens alive, class tokens not counted."""
        kept = math.ceil(self.keep * self.predictor.keys)
        if self.tokens is None or self.reconstructing:
            return min(kept, k.shape[2])
        return min(kept, self.tokens.count or k.shape[2])

    def _sparse(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        bias: Tensor | None,
        alive: Tensor | None,
        dead: Tensor | None,
    ) -> Tensor:
        first, rest = (None, bias) if bias is None else (bias[..., : self.prefix, :], bias[..., self.prefix :, :])
        patches = q[:, :, self.prefix :]
        if self.kernel == "gather" and dead is None and not (self.training and self.dropout):
            out = gathered(patches, k, v, self.choose(patches, k, alive), self.group, scale, rest)
        else:
            attention = flex if self.kernel == "flex" else masked
            out = attention(patches, k, v, self._mask(patches, k, alive, dead), scale, rest)
        if not self.prefix:
            return out
        return torch.cat([self._class_tokens(q[:, :, : self.prefix], k, v, scale, first), out], dim=2)

    def _class_tokens(self, q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None) -> Tensor:
        """Full attention of the class tokens; tells the token state how much each patch was looked at."""
        if self.tokens is None or self.reconstructing:
            return super().forward(q, k, v, scale, bias)
        logits = q * scale @ k.mT
        logits = logits if bias is None else logits + bias
        if self.tokens.dropped:  # as published, a dead token counts as a key of zeros
            nothing = math.log(self.tokens.dropped)
            logits = F.pad(logits, (0, 1), value=nothing)
        weights = logits.softmax(-1)[..., : k.shape[2]]
        self.tokens.scores = weights[:, :, 0, self.prefix :].detach().mean(1)
        return weights @ v

    @torch.no_grad()
    def _scores(self, q: Tensor, k: Tensor, alive: Tensor | None, dead: Tensor | None) -> Tensor:
        """Predicted attention (B, heads, groups, M); a group is predicted from the mean of its queries."""
        if self.group > 1:
            count = q.shape[2]
            short = -count % self.group
            sums = F.pad(q, (0, 0, 0, short)).unflatten(2, (-1, self.group)).sum(3)
            sizes = torch.full((sums.shape[2], 1), self.group, dtype=q.dtype, device=q.device)
            sizes[-1] -= short
            q = sums / sizes
        mixture = self._mixture(q, k, alive, dead)
        few = mixture if self.reconstructing else self.predictor.few(mixture)
        scores = few @ self._basis(alive)
        return scores if dead is None else scores.masked_fill(dead[:, None, None], -torch.inf)

    def _mixture(self, q: Tensor, k: Tensor, alive: Tensor | None, dead: Tensor | None) -> Tensor:
        mixture = self.predictor.mixture(q, k, alive, dead)
        if dead is not None:  # published: the predictor's queries of dead tokens are zeros, so all maps weigh the same
            rows = dead[:, None, self.prefix :, None]
            mixture = mixture.masked_fill(rows, 0) + rows.to(mixture) / mixture.shape[-1]
        return mixture

    def _basis(self, alive: Tensor | None) -> Tensor:
        return self.predictor.maps.mT if self.reconstructing else self.predictor.basis(alive)

    def _mask(self, q: Tensor, k: Tensor, alive: Tensor | None, dead: Tensor | None) -> Tensor:
        """(B, heads, n, M) bool."""
        if self.score_threshold is None:
            mask = allowed(self.choose(q, k, alive, dead), k.shape[2], self.group, q.shape[2])
        else:
            mask = self._scores(q, k, alive, dead) > self.score_threshold
            mask = mask if self.group == 1 else mask.repeat_interleave(self.group, 2)[:, :, : q.shape[2]]
        return mask if dead is None else mask & ~dead[:, None, self.prefix :, None]

    def _maps(
        self,
        q: Tensor,
        k: Tensor,
        scale: float,
        bias: Tensor | None,
        alive: Tensor | None,
        dead: Tensor | None,
    ) -> Maps:
        patches = q[:, :, self.prefix :]
        mixture = self._mixture(patches, k, alive, dead)
        coefficients = mixture if self.reconstructing else self.predictor.few(mixture)
        logits = q * scale @ k.mT
        logits = logits if bias is None else logits + bias
        mask = F.pad(self._mask(patches, k, alive, dead), (0, 0, self.prefix, 0), value=True)
        unmasked = kept = logits.softmax(-1)
        if not self.reconstructing:
            kept = logits.masked_fill(~mask, -torch.inf).softmax(-1).masked_fill(~mask.any(-1, keepdim=True), 0)
        return Maps(coefficients, coefficients @ self._basis(alive), mask.to(q), kept, unmasked, alive)


def _largest(scores: Tensor, count: int) -> Tensor:
    """Places (..., count) of the largest scores; of equal zeros, which thresholds make many of, the first are taken."""
    order = torch.arange(scores.shape[-1], device=scores.device, dtype=scores.dtype)
    return (scores - order * torch.finfo(scores.dtype).tiny).topk(count, dim=-1, sorted=False).indices


@contextmanager
def watched(model: nn.Module) -> Iterator[dict[str, list[Maps]]]:
    """Inside the block every sparse attention writes down its maps; yields them by the layers' names."""
    layers = find(model, SparseAttend)
    try:
        for layer in layers.values():
            layer.watched = []
        yield {name: layer.watched for name, layer in layers.items()}
    finally:
        for layer in layers.values():
            layer.watched = None


@contextmanager
def reconstructing(model: nn.Module) -> Iterator[None]:
    """Inside the block attention is full and the predictors' maps are raw, as in the first phase of training."""
    layers = find(model, SparseAttend).values()
    states = {layer.tokens for layer in layers if layer.tokens is not None}
    try:
        for part in (*layers, *states):
            part.reconstructing = True
        yield
    finally:
        for part in (*layers, *states):
            part.reconstructing = False

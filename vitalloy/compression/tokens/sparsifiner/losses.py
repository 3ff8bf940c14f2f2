"""What a model with sparse attention learns from. Each term is published with its weight; three are off by default.

Some terms are sums over a batch, so that the weights hold for batches of one size (168 images in the published runs).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vitalloy.errors import CompressionError

DISTANCES = ("mse", "kl")


@dataclass(frozen=True)
class Weights:
    """How much each term counts. As published in the second phase; the first has reconstruction=0.01 alone."""

    classes: float = 1.0
    answers: float = 0.5
    tokens: float = 0.5
    reconstruction: float = 0.0
    own_attention: float = 0.0
    least: float = 0.0
    ratio: float = 0.0


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Against labels (B,) or soft labels (B, classes)."""
    return F.cross_entropy(logits, target)


def answer_distance(logits: Tensor, taught: Tensor) -> Tensor:
    """The KL divergence from a teacher's answer, summed over the classes, mean of the batch."""
    return F.kl_div(logits.log_softmax(-1), taught.log_softmax(-1), reduction="batchmean", log_target=True)


def token_distance(tokens: Tensor, taught: Tensor, distance: str = "mse", alive: Tensor | None = None) -> Tensor:
    """Between the last patch tokens (B, n, C) and a teacher's.

    Args:
        distance: "mse", the mean, or "kl", of the softmax over the channels, mean of the tokens.
        alive: (B, n) bool, the tokens that count.
    """
    _known(distance)
    tokens, taught = (x.flatten(0, 1) if alive is None else x[alive] for x in (tokens, taught))
    return F.mse_loss(tokens, taught) if distance == "mse" else answer_distance(tokens, taught)


def reconstruction(approximate: Sequence[Tensor], attention: Sequence[Tensor], distance: str = "mse") -> Tensor:
    """Between predicted attention (B, heads, n, M) and the true (B, heads, N, M), mean of the layers.

    The queries that the predictor leaves out, class tokens, stand in front. "mse" is the squared error summed over
    everything; "kl" takes the softmax of the prediction, and is summed over all but the batch.
    """
    _known(distance)
    terms = []
    for guess, true in zip(approximate, attention, strict=True):
        true = true[:, :, true.shape[2] - guess.shape[2] :]
        if distance == "mse":
            terms.append(F.mse_loss(guess, true, reduction="sum"))
        else:
            terms.append(F.kl_div(guess.log_softmax(-1), true, reduction="batchmean"))
    return torch.stack(terms).mean()


def least_entries(masks: Sequence[Tensor], part: int = 4) -> Tensor:
    """The mean size of each row's smallest entries, all but M // part of them, mean of the layers.

    The first row, the class token's, is left out.
    """
    ends = [mask.shape[-1] - mask.shape[-1] // part for mask in masks]
    rows = zip(masks, ends, strict=True)
    return torch.stack([mask[:, :, 1:].sort(-1).values[..., :end].abs().mean() for mask, end in rows]).mean()


def kept_ratio(masks: Sequence[Tensor], ratio: float = 0.25) -> Tensor:
    """The squared distance of each row's mean from the wanted ratio, mean of all rows and layers."""
    return torch.stack([(m.mean(-1) - ratio).square().mean() for m in masks]).mean()


def _known(distance: str) -> None:
    if distance not in DISTANCES:
        raise CompressionError(f"the distance is {' or '.join(map(repr, DISTANCES))}; it got {distance!r}.")

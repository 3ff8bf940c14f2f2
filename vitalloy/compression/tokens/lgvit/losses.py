"""The losses of both training stages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vitalloy.compression.tokens.lgvit.heads import subsampled
from vitalloy.compression.trunk import Tokens

ALPHA, BETA, GAMMA, TEMPERATURE = 0.3, 0.01, 0.01, 2.0


def weighted_loss(final: Tensor, exits: Sequence[Tensor], labels: Tensor, layers: Sequence[int], depth: int) -> Tensor:
    """Stage 1, odd steps: the mean cross-entropy of all exits and the end, each weighted by its layer.

    Args:
        final, exits: logits (B, classes).
        labels: classes (B,), or probabilities (B, classes).
        layers: the layer, counted from 1, after which each exit is.
        depth: the number of layers, the weight of the end.
    """
    total = depth * F.cross_entropy(final, labels)
    for layer, logits in zip(layers, exits, strict=True):
        total = total + layer * F.cross_entropy(logits, labels)
    return total / (sum(layers) + depth)


def prediction_loss(
    exits: Sequence[Tensor], labels: Tensor, teacher: Tensor, alpha: float = ALPHA, temperature: float = TEMPERATURE
) -> Tensor:
    """Cross-entropy of every exit, and its divergence from the teacher: the mean of all B * classes terms."""
    wanted = (teacher / temperature).softmax(-1)
    entropy = sum(F.cross_entropy(logits, labels) for logits in exits)
    distance = sum(F.kl_div((logits / temperature).log_softmax(-1), wanted, reduction="sum") for logits in exits)
    return (1 - alpha) * entropy + alpha * temperature**2 * distance / wanted.numel()


def channel_divergence(features: Tensor, teacher: Tensor) -> Tensor:
    """KL divergence of the softmax over channels from the teacher's, summed over tokens, mean over images."""
    return F.kl_div(features.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")


def gram(features: Tensor) -> Tensor:
    """(B, N, C) -> (B, C, C): products of channels, summed over tokens."""
    return features.mT @ features


def heterogeneous_losses(
    local: Sequence[Tensor], attentive: Sequence[Tensor], last: Tokens, steps: Sequence[int]
) -> list[Tensor]:
    """What heads learn from the last layer: its first and last of both kinds. Pairs of unlike shape are left out.

    Args:
        local: features (B, N, C) of the convolutional heads, shallow to deep.
        attentive: features (B, N', C) of the attention heads.
        last: the tokens of the last layer.
        steps: the step by which each attention head subsamples the grid.

    Returns:
        A term each, in this order: first and last convolutional head, last and first attention head.
    """
    pairs = [(local[i], last.patches) for i in _ends(local)]
    pairs += [(attentive[i], subsampled(last.patches, last.grid, steps[i])) for i in _ends(attentive)[::-1]]
    return [channel_divergence(mine, other) for mine, other in pairs if mine.shape == other.shape]


def homogeneous_losses(local: Sequence[Tensor], attentive: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """What shallow heads learn from the deepest of their kind: its features, or its Gram matrix.

    The deepest is not a constant in this, as published. Pairs of unlike shape are left out.

    Returns:
        Sums over the convolutional heads and over the attention heads.
    """
    zero = (local or attentive)[0].new_zeros(()) if local or attentive else torch.zeros(())
    by_feature = [F.mse_loss(f, local[-1]) for f in local[:-1] if f.shape == local[-1].shape]
    like = [f for f in attentive if f.shape[-1] == attentive[-1].shape[-1]]
    by_gram = [F.mse_loss(gram(f), gram(like[-1])) for f in like[:-1]]
    return sum(by_feature, zero), sum(by_gram, zero)


def _ends(items: Sequence[Tensor]) -> list[int]:
    return sorted({0, len(items) - 1}) if items else []

"""Learning from labels: cross entropy with label smoothing, for class numbers and for soft (mixed) targets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Outputs = Tensor | tuple[Tensor, Tensor]  # logits, or the pair (class token, distillation token) while training


def full_precision(logits: Tensor) -> Tensor:
    """At least float32: a softmax over half-precision logits loses the small probabilities."""
    return logits if logits.dtype == torch.float64 else logits.float()


def soft_targets(labels: Tensor, num_classes: int, smoothing: float = 0.0) -> Tensor:
    """Class numbers (B,) as probabilities (B, classes): `smoothing` of the mass is spread over all classes."""
    hard = F.one_hot(labels, num_classes).float()
    return hard * (1.0 - smoothing) + smoothing / num_classes


def soft_target_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy against probabilities `target` (B, classes), mean over the batch."""
    return -(target * logits.log_softmax(dim=-1)).sum(dim=-1).mean()


class SupervisedLoss(nn.Module):
    """Cross entropy against class numbers (smoothed here) or probabilities (taken as they are).

    A model that returns a pair of logits in training is asked for the right answer twice: the mean of both losses.
    """

    def __init__(self, smoothing: float = 0.1):
        super().__init__()
        self.smoothing = smoothing

    def forward(self, outputs: Outputs, target: Tensor) -> Tensor:
        if isinstance(outputs, tuple | list):
            return torch.stack([self(o, target) for o in outputs]).mean()
        logits = full_precision(outputs)
        if target.is_floating_point():
            return soft_target_cross_entropy(logits, target.to(logits.dtype))
        return F.cross_entropy(logits, target, label_smoothing=self.smoothing)

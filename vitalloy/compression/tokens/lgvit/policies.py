"""When an image leaves: rules that read the logits of one exit after another, each image for itself.

- "confidence": the largest probability is above the threshold;
- "entropy": the entropy of the probabilities (natural logarithm) is below it;
- "patience": the answer was the same at as many exits in a row as the threshold says;
- "patient_and_confident": the entropy was below the threshold at two exits in a row.

Logits that are not finite never let an image leave.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitalloy.errors import CompressionError, suggest

DEFAULTS = {"confidence": 0.865, "entropy": 0.6, "patience": 7, "patient_and_confident": 0.5}
TWICE = 2  # exits in a row that "patient_and_confident" asks for
NEVER = {"confidence": 2.0, "entropy": -1.0, "patience": 10**6, "patient_and_confident": -1.0}
ALWAYS = {"confidence": -1.0, "entropy": 100.0, "patience": 1, "patient_and_confident": 100.0}


def confidence(logits: Tensor) -> Tensor:
    """The largest probability: (..., classes) -> (...)."""
    return logits.softmax(-1).amax(-1)


def entropy(logits: Tensor) -> Tensor:
    """-sum p ln p: (..., classes) -> (...)."""
    return torch.special.entr(logits.softmax(-1)).sum(-1)


@dataclass(frozen=True)
class Policy:
    """A rule with a threshold for each exit.

    Raises:
        CompressionError: an unknown rule.
    """

    name: str = "confidence"
    thresholds: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.name not in DEFAULTS:
            raise CompressionError(
                f"there is no exit policy {self.name!r}: use {', '.join(DEFAULTS)}.{suggest(self.name, DEFAULTS)}"
            )

    def reading(self, logits: Tensor) -> Tensor:
        """What the rule reads off logits (..., classes): a score, or the answer counted from 1, 0 for none."""
        if self.name == "patience":
            return torch.where(logits.isfinite().all(-1), logits.argmax(-1) + 1, 0)
        return confidence(logits) if self.name == "confidence" else entropy(logits)

    def asks(self, exit: int) -> bool:
        """Whether anybody could leave at an exit, or be remembered there: its head is left out otherwise."""
        threshold = self.thresholds[exit]
        return threshold < 1 if self.name == "confidence" else threshold > 0 if self.name == "entropy" else True

    def start(self, count: int, device: torch.device | str = "cpu") -> Tensor:
        """What is remembered of `count` images before the first exit, (count, 2): last answer, exits in a row."""
        return torch.zeros(count, 2, dtype=torch.long, device=device)

    def leaving(self, exit: int, reading: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Which images leave at an exit, (B,), given their readings there; and what to remember of all of them."""
        threshold = self.thresholds[exit]
        if self.name == "confidence":
            return reading > threshold, memory  # a NaN is above nothing
        if self.name == "entropy":
            return reading < threshold, memory
        if self.name == "patience":
            row = torch.where(reading == memory[:, 0], memory[:, 1] + 1, 1)
            return (reading > 0) & (row >= threshold), torch.stack([reading, row], 1)
        row = torch.where(reading < threshold, memory[:, 1] + 1, 0)
        return row >= TWICE, torch.stack([memory[:, 0], row], 1)

    def depths(self, readings: Sequence[Tensor] | Tensor) -> Tensor:
        """The exits at which images leave, (B,), given their readings at each exit; the end is one more."""
        end, count = len(self.thresholds), readings[0].shape[0]
        depths = torch.full((count,), end, device=readings[0].device)
        memory = self.start(count, depths.device)
        for exit in range(end):
            gone, memory = self.leaving(exit, readings[exit], memory)
            depths = torch.where(gone & (depths == end), exit, depths)
        return depths


def totals(done: Sequence[float], heads: Sequence[float], policy: Policy) -> tuple[float, ...]:
    """What it costs to leave at each exit and at the end, with the heads that are asked on the way.

    Args:
        done: what the model itself costs up to each exit, and to the end.
        heads: what each head costs.
    """
    spent, sums = 0.0, []
    for exit, head in enumerate(heads):
        spent += head if policy.asks(exit) else 0.0
        sums.append(done[exit] + spent)
    return (*sums, done[-1] + spent)


def policy_of(name: str, threshold: float | Sequence[float] | None, exits: int) -> Policy:
    """A policy for so many exits: one threshold for all of them, one each, or the published one.

    Raises:
        CompressionError: an unknown rule, or another number of thresholds than exits.
    """
    policy = Policy(name)
    values = DEFAULTS[name] if threshold is None else threshold
    values = (values,) * exits if isinstance(values, int | float) else tuple(values)
    if len(values) != exits or any(value != value for value in values):
        raise CompressionError(f"{len(values)} thresholds {values} for {exits} exits: give one number, or one an exit.")
    return Policy(policy.name, tuple(float(value) for value in values))

"""Learning from a teacher's answers, as DeiT does it.

"Training data-efficient image transformers & distillation through attention" (Touvron, Cord, Douze, Massa,
Sablayrolles, Jégou, ICML 2021, arXiv 2012.12877). A student with a distillation token answers twice in training: the
class token learns from the labels, the distillation token from the teacher. A student with one answer learns both
from it, so any backbone can be taught.

The published code divides the soft term by the number of elements (batch x classes), not by the batch, which makes it
weaker than the paper's formula by the number of classes. We follow the code; `per_sample=True` is the paper's reading.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from vitalloy.errors import RecipeError
from vitalloy.training.objectives.supervised import Outputs, SupervisedLoss, full_precision

ALPHA = {"hard": 0.5, "soft": 0.1}  # the published weight of the teacher


def hard_distillation(logits: Tensor, teacher: Tensor) -> Tensor:
    """Cross entropy against the class that the teacher would choose; both (B, classes)."""
    return F.cross_entropy(logits, teacher.argmax(dim=-1))


def soft_distillation(logits: Tensor, teacher: Tensor, tau: float = 3.0, per_sample: bool = False) -> Tensor:
    """Divergence from the teacher's softened answer at temperature `tau`, over batch x classes (or over the batch)."""
    total = F.kl_div(
        (logits / tau).log_softmax(dim=-1), (teacher / tau).log_softmax(dim=-1), reduction="sum", log_target=True
    )
    return total * tau**2 / (len(logits) if per_sample else logits.numel())


class DistillationLoss(nn.Module):
    """(1 - alpha) of the label loss plus alpha of the teacher's.

    kind: "hard" (the teacher's choice) or "soft" (its probabilities); alpha: None is the published 0.5 or 0.1;
    tau: temperature of the soft kind; smoothing: label smoothing of the label loss.
    """

    def __init__(
        self,
        kind: Literal["hard", "soft"] = "hard",
        alpha: float | None = None,
        tau: float = 3.0,
        smoothing: float = 0.1,
        per_sample: bool = False,
    ):
        super().__init__()
        if kind not in ALPHA:
            raise RecipeError(f"Distillation is 'hard' or 'soft', not {kind!r}.")
        self.kind, self.tau, self.per_sample = kind, tau, per_sample
        self.alpha = ALPHA[kind] if alpha is None else alpha
        self.base = SupervisedLoss(smoothing)

    def forward(self, outputs: Outputs, target: Tensor, teacher: Tensor) -> Tensor:
        """The loss of `outputs`, logits (B, classes) or the pair (class logits, distillation logits).

        target: class numbers (B,) or probabilities (B, classes); teacher: the teacher's logits (B, classes).
        """
        answer, taught = outputs if isinstance(outputs, tuple | list) else (outputs, outputs)
        if teacher.shape != taught.shape:
            raise RecipeError(
                f"The teacher answers {teacher.shape[-1]} classes and the student {taught.shape[-1]}: "
                "take a teacher trained on the same classes."
            )
        taught, teacher = full_precision(taught), full_precision(teacher)
        if self.kind == "hard":
            lesson = hard_distillation(taught, teacher)
        else:
            lesson = soft_distillation(taught, teacher, self.tau, self.per_sample)
        return (1.0 - self.alpha) * self.base(answer, target) + self.alpha * lesson

"""Two classifiers, one for the labels and one for a teacher's answers, as DeiT and its followers train them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vitalloy.layers.backbone import Backbone

if TYPE_CHECKING:
    from typing_extensions import Self  # typing has it from Python 3.11 on


class DistilledHead(Backbone):
    """A backbone with a second classifier `head_dist`; set `distilled` before `build_head`.

    In training after `set_distilled_training(True)` the model returns (class logits, distillation logits); otherwise
    their mean.
    """

    distilled = True
    distilled_training = False
    shared_features = True  # both classifiers read the same features

    def build_head(self, num_classes: int, global_pool: str, drop_rate: float = 0.0) -> None:
        super().build_head(num_classes, global_pool, drop_rate)
        self.head_dist = self.make_classifier(num_classes) if self.distilled else None

    def set_distilled_training(self, enable: bool = True) -> None:
        """Return both heads' logits in training, for a distillation loss."""
        self.distilled_training = enable

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.answer(x, x)

    def answer(self, x: Tensor, taught: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The logits for the features that the class head and the distillation head read."""
        if self.head_dist is None:
            return self.head(x)
        by_class, by_teacher = self.head(x), self.head_dist(taught)
        if self.distilled_training and self.training:
            return by_class, by_teacher
        return (by_class + by_teacher) / 2

    def fuse(self) -> Self:
        if self.shared_features and isinstance(self.head, nn.Linear) and isinstance(self.head_dist, nn.Linear):
            with torch.no_grad():  # the mean of two linear maps of the same features is one
                for mine, other in zip(self.head.parameters(), self.head_dist.parameters(), strict=True):
                    mine.copy_((mine.double() + other.double()) / 2)
            self.head_dist = None
        return super().fuse()

"""Learning-rate schedules that published trainings used and that PyTorch and timm have no equal of."""

from __future__ import annotations

import math
from collections.abc import Callable


def warmup_cosine(total: int, warmup: int, floor: float = 0.0, cold_start: bool = True) -> Callable[[int], float]:
    """Step -> share of the peak learning rate, for `torch.optim.lr_scheduler.LambdaLR`: CoSwin's schedule.

    Args:
        total: steps in all.
        warmup: steps in which the rate rises in a line from the floor to the peak, part of the total.
        floor: the lowest rate as a share of the peak; the cosine ends there.
        cold_start: the first step has the floor's rate even without warm-up, as published. With warm-up it always has.
    """

    def factor(step: int) -> float:
        if step == 0 and cold_start:
            return floor
        if step < warmup:
            return floor + (1 - floor) * step / warmup
        part = min(1.0, (step - warmup) / max(1, total - warmup))
        return floor + (1 - floor) * (1 + math.cos(math.pi * part)) / 2

    return factor

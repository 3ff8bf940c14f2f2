"""What breaks a model: common corruptions of its input, and shifts, with models that shifts cannot break."""

from vitalloy.robustness.corruptions import CORRUPTIONS, DEFAULT_NAMES, Corrupt, evaluate_corruptions
from vitalloy.robustness.shift_equivariance import (
    PERTURBATIONS,
    Consistency,
    logit_variance,
    make_shift_equivariant,
    shift,
    shift_consistency,
    unprotected,
    worst_shift_top1,
)

__all__ = [
    "CORRUPTIONS",
    "DEFAULT_NAMES",
    "PERTURBATIONS",
    "Consistency",
    "Corrupt",
    "evaluate_corruptions",
    "logit_variance",
    "make_shift_equivariant",
    "shift",
    "shift_consistency",
    "unprotected",
    "worst_shift_top1",
]

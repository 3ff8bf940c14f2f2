"""What breaks a model: common corruptions of its input."""

from vitalloy.robustness.corruptions import CORRUPTIONS, DEFAULT_NAMES, Corrupt, evaluate_corruptions

__all__ = ["CORRUPTIONS", "DEFAULT_NAMES", "Corrupt", "evaluate_corruptions"]

"""Less work per image: tokens merged, attention links or blocks of weights left out, early exits. One face for all.

What comes out is an ordinary module: it is called, trained, exported and quantized like the model it was made from, and
other methods can be put on top. It carries the steps that made it, so that a bundle needs no code beyond this library:
the plain model, the steps' settings and the weights give it back.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from vitalloy.compression.calibration import copied, images_for
from vitalloy.compression.methods import METHODS, check_options
from vitalloy.errors import CompressionError

CARRIED = ("build_args", "default_cfg", "pretrained_cfg", "about", "classes", "num_classes")


def reduce(model: nn.Module, calibration: Any, method: str, **options: Any) -> nn.Module:
    """A copy of a classifier that computes less for an image.

    Args:
        model: any backbone of `vitalloy.list_models()` or of timm with a classifier, or what `reduce` returned before;
            not changed.
        calibration: images as the model takes them: a tensor (N, C, H, W), or batches of them.
        method: "sit", "sparsifiner", "lgvit" or "lpvit".
        **options: the method's own. `train`, batches (images, labels) iterated once an epoch, is what it learns from;
            without it the calibration images and the full model's answers to them.

    Returns:
        A module in evaluation mode; `steps` says what was done to the model it was created as.

    Raises:
        CompressionError: an unknown method or option, a budget out of reach, or a model that the method cannot take.
    """
    check_options(method, options)
    if METHODS[method].quantizes:
        raise CompressionError(f"{method} gives values fewer bits; it leaves no work out.")
    if getattr(model, "fused", False):
        raise CompressionError("a fused model cannot learn: compress the model it was made from.")
    own = copied(model)
    made = METHODS[method].function(own, images_for(own, calibration), **options).eval()
    return _carry(model, made, [*steps_of(model), {"method": method, "settings": made.settings}])


def rebuild(model: nn.Module, steps: Iterable[Mapping[str, Any]]) -> nn.Module:
    """The structure that `steps` made of a plain model of the same architecture, for weights to be loaded into."""
    done: list[Mapping[str, Any]] = []
    for step in steps:
        method = METHODS.get(step["method"])
        if method is None or method.quantizes:
            raise CompressionError(f"there is no method {step['method']!r} that could be repeated on a model.")
        module = importlib.import_module(f"vitalloy.compression.{method.module}")
        model = _carry(model, module.rebuild(model, **step["settings"]), [*done, step])
        done.append(step)
    return model


def steps_of(model: nn.Module) -> list[dict[str, Any]]:
    """What was done to a model so far: methods and settings, first to last; those of the last as they are now."""
    steps = list(getattr(model, "steps", ()))
    if steps:
        steps[-1] = {**steps[-1], "settings": model.settings}
    return steps


def _carry(old: nn.Module, new: nn.Module, steps: list[Mapping[str, Any]]) -> nn.Module:
    for name in CARRIED:
        if hasattr(old, name) and not hasattr(new, name):
            setattr(new, name, getattr(old, name))
    new.steps = tuple(steps)
    return new

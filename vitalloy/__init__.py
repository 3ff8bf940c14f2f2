"""Vitalloy: hybrid convolution-transformer vision, from a folder of images to a verified, explained model.

The names below are imported when they are first used, so that `import vitalloy` and the command line start at once.
"""

from __future__ import annotations

import importlib
from typing import Any

from vitalloy import _torchvision

_torchvision.prepare()

__version__ = "0.1.0"

_HOME = {
    "create_model": "registry",
    "list_models": "registry",
    "load_checkpoint": "checkpoints",
    "load": "checkpoints",
    "save": "checkpoints",
    "publish": "checkpoints",
    "load_data": "data",
    "Recipe": "training.recipe",
    "compress": "runs",
    "compress_run": "runs",
    "calibrate_exits": "runs",
    "explain": "explanation",
    "fit": "runs",
    "evaluate": "runs",
    "predict": "runs",
    "transform_of": "runs",
    "export": "runs",
    "systems": "catalog",
    "VitalloyError": "errors",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'vitalloy' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"vitalloy.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

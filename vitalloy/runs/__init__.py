"""The run folder and the pipelines that fill and use it: what `vitalloy.fit` and the command call.

Imported when first used: predicting needs nothing of what training does.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "FORMATS": "apply",
    "Prediction": "apply",
    "evaluate": "apply",
    "export": "apply",
    "predict": "apply",
    "Compressed": "compressing",
    "CompressionReport": "compressing",
    "compress": "compressing",
    "compress_run": "compressing_run",
    "options_from": "compressing_run",
    "calibrate_exits": "exits",
    "Run": "fitting",
    "fit": "fitting",
    "resume": "fitting",
    "Reporter": "folder",
    "RunFolder": "folder",
    "transform_of": "stages",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'vitalloy.runs' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"vitalloy.runs.{_HOME[name]}"), name)
    globals()[name] = value
    return value

"""Lets torchvision import beside a PyTorch build that its compiled operators were not made for.

The default torchvision wheel for Linux is compiled against CUDA builds of PyTorch. Beside a CPU build its library does
not load, and `import torchvision` (hence `import timm`) then fails while it describes two operators that were never
declared. Declaring them is enough: all that Vitalloy uses (transforms, data sets) is plain Python. Where the library
loads, nothing is changed.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from typing import Any

_UNDECLARED = ("nms", "qnms")
_kept: list[Any] = []  # the declarations end with the object that made them


class _BeforeTorchvision(MetaPathFinder):
    """Runs once, just before torchvision is imported; finds nothing itself."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            _declare_missing()


def _declare_missing() -> None:
    import torch

    if _loads():
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    _kept.append(library)
    for name in _UNDECLARED:
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _loads() -> bool:
    import torch

    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return True  # not installed: importing it will say so
    found = importlib.machinery.PathFinder.find_spec("_C", list(spec.submodule_search_locations))
    if found is None or found.origin is None:
        return False
    try:
        torch.ops.load_library(found.origin)
    except OSError:
        return False
    return True


def prepare() -> None:
    """Watch for the import of torchvision; nothing is imported before that."""
    if "torchvision" not in sys.modules:
        sys.meta_path.insert(0, _BeforeTorchvision())

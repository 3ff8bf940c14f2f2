"""Lets torchvision import beside a PyTorch build that its compiled operators were not made for.

The default torchvision wheel for Linux is compiled against CUDA builds of PyTorch. Beside a CPU build its library does
not load, and `import torchvision` (hence `import timm`) then fails while it describes two operators that were never
declared. Declaring them is enough: all that Vitalloy uses (transforms, data sets) is plain Python. Where the library
loads, nothing is changed. Import this module before timm or torchvision.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util

import torch

_UNDECLARED = ("nms", "qnms")


def _loads() -> bool:
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


if not _loads():
    _library = torch.library.Library("torchvision", "FRAGMENT")  # kept alive: its end would undo the declarations
    for name in _UNDECLARED:
        if not hasattr(torch.ops.torchvision, name):
            _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

"""Checkpoints of whole dense models in mmdetection's and mmsegmentation's form, part by part under our names."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn


def convert_parts(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give each child of `model` the entries that begin with its name, to convert as it knows how.

    A child says how by `convert_state`, or by a `key_table` of (pattern, replacement) pairs. Entries of no child pass
    through, so that a report of what is left over names them.
    """
    converted: dict[str, Tensor] = {}
    for name, child in model.named_children():
        part = {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
        if hasattr(child, "convert_state"):
            part = child.convert_state(part)
        for pattern, replacement in getattr(child, "key_table", ()):
            part = {re.sub(pattern, replacement, k): v for k, v in part.items()}
        converted |= {f"{name}.{k}": v for k, v in part.items()}
    children = tuple(f"{name}." for name, _ in model.named_children())
    return converted | {k: v for k, v in state.items() if not k.startswith(children)}

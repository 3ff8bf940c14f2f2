"""The outputs of norms on a grid, for models that are quantized throughout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitalloy.compression.calibration import Seen
from vitalloy.compression.quantization.q_hyvit.choice import (
    ELEMENTS,
    HIGHEST,
    LOWEST,
    SCHEMES,
    Chosen,
    best_factor,
    grids,
)

VALUES = 2**16  # of an output that the search looks at


@torch.no_grad()
def choose_output(seen: Seen, bits: int, zero_point: str, steps: int) -> dict[str, Chosen]:
    """The best grid of an output for each scheme."""
    every = max(seen.output.numel() // VALUES, 1)
    y, importance = (t.flatten()[::every] for t in (seen.output, seen.gradient.square()))
    factors = torch.linspace(LOWEST, HIGHEST, max(steps, 2)).to(y)
    found = {}
    for scheme in SCHEMES:
        for grid in grids(seen.output.min(), seen.output.max(), bits, scheme, zero_point):

            def errors(batch: Tensor, grid=grid) -> Tensor:
                left = (grid.scaled(batch.view(-1, 1))(y) - y).square_() * importance
                return left.sum(1).view(-1, 1, 1) * every / len(seen.output)

            start = torch.ones(1, 1, 1).to(y)
            factor, least = best_factor(errors, factors, start, errors(start)[0], max(len(y), ELEMENTS // 64))
            if scheme not in found or float(least) < found[scheme].error:
                found[scheme] = Chosen(None, (grid.scaled(factor.view(())),), float(least))
    return found


def quantize_output(norm: nn.Module, chosen: Chosen) -> None:
    """Let a norm answer on a grid, its submodule `output_quantizer`."""
    if not hasattr(norm, "output_quantizer"):
        norm.register_forward_hook(_on_grid)
    norm.output_quantizer = chosen.inputs[0].quantizer()


def _on_grid(norm: nn.Module, args: Any, output: Tensor) -> Tensor:
    return norm.output_quantizer(output)

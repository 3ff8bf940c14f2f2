"""How many links a budget allows, and which kernel is faster in each layer on this machine."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from vitalloy.compression.calibration import record
from vitalloy.compression.scale_search import attention_of
from vitalloy.compression.tokens.sparsifiner.convert import rebuild
from vitalloy.compression.tokens.sparsifiner.crossover import GROUP, timed
from vitalloy.compression.tokens.sparsifiner.predictor import MaskPredictor
from vitalloy.compression.trunk import macs as count_macs, nearest


def within(
    model: nn.Module, image: Tensor, budget: float, settings_for: Callable[[float], dict[str, Any]]
) -> dict[str, Any]:
    """Settings of the largest share of keys whose work stays within the budget."""
    whole = count_macs(model, image)

    def work(share: float) -> float:
        return sparse_macs(model, image, settings_for(share)) / whole

    low, high = 1e-6, 1.0
    if work(low) > budget:
        raise nearest(budget, [work(low)], "sparsifiner's macs")
    for _ in range(7):
        middle = (low + high) / 2
        low, high = (middle, high) if work(middle) <= budget else (low, middle)
    return settings_for(low)


def sparse_macs(model: nn.Module, image: Tensor, settings: dict[str, Any]) -> int:
    """Multiply-accumulates of a plain model's sparse form, predictors included, if all that is masked is skipped."""
    layers = {name: {**layer, "kernel": "gather"} for name, layer in settings["layers"].items()}
    return count_macs(rebuild(copy.deepcopy(model), **{**settings, "layers": layers}), image)


def choose_kernels(
    model: nn.Module, image: Tensor, settings: dict[str, Any], kernel: str, group: int | None
) -> list[dict[str, Any]]:
    """Time each layer's dense and skipping form for one image; with "auto" write the faster into the settings.

    Layers of the same shape share one measurement. Tokens that are dropped on the way are not accounted for.
    """
    found: dict[tuple[Any, ...], dict[str, float]] = {}
    seen = record(model, [model.get_submodule(name) for name in settings["layers"]], image)
    rows = []
    for name, layer in settings["layers"].items():
        row = {"layer": name, **layer}
        if settings["score_threshold"] is None:
            q, k, v, scale, bias = attention_of(seen[model.get_submodule(name)])
            size = min(GROUP if group is None else group, q.shape[2] - layer["prefix"])
            key = (q.shape, k.shape, v.shape, bias is None, layer["keep"], size)
            if key not in found:
                options = {"n_factor": settings["n_factor"], "c_factor": settings["c_factor"]}
                predictor = MaskPredictor(
                    k.shape[2], q.shape[1], q.shape[3], coefficients=settings["coefficients"], **options
                )
                found[key] = timed(
                    q,
                    k,
                    v,
                    prefix=layer["prefix"],
                    keep=layer["keep"],
                    group=size,
                    scale=scale,
                    bias=bias,
                    predictor=predictor.to(q),
                )
            if kernel == "auto" and found[key]["speedup"] > 1:
                layer |= {"kernel": "gather", "group": size}
            row |= layer | {f"{part}_ms": found[key][part] for part in ("dense", "skip", "layer")}
            row |= {"speedup": found[key]["speedup"], "measured_group": size}
        rows.append(row)
    return rows

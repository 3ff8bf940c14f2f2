"""A budget such as "10ms, 5MB, 92%": measure candidates on this machine, choose one, and judge the result by it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch

from vitalloy.benchmark import count, measure
from vitalloy.errors import RecipeError
from vitalloy.registry import create_model, default_cfg, entry, list_models
from vitalloy.runs.folder import Reporter
from vitalloy.training.recipe import Recipe

_TERM = re.compile(r"^(-?[0-9]*\.?[0-9]+)\s*(us|ms|s|kb|mb|gb|%)$", re.IGNORECASE)
_MILLISECONDS = {"us": 1e-3, "ms": 1.0, "s": 1e3}
_MEGABYTES = {"kb": 1e-3, "mb": 1.0, "gb": 1e3}
SMALL_INPUT = 64  # pixels: up to here the zoo's 32-pixel variants are the candidates


@dataclass(frozen=True)
class Budget:
    """Limits on one image's latency, the size of the weights, and the accuracy; None is no limit.

    `top1` is a fraction; `loss` is the fraction that compression may take off the accuracy of the float model.
    """

    asked: str
    latency_ms: float | None = None
    size_mb: float | None = None
    top1: float | None = None
    loss: float | None = None

    @classmethod
    def parse(cls, text: str, relative: bool = False) -> Budget:
        """Read "10ms, 5MB, 92%" (any of the three, in any order). Raises RecipeError.

        Where `relative`, "-0.5%" is an accuracy at most half a point below that of the float model.
        """
        limits: dict[str, float] = {}
        example = "'3ms, 1MB, -0.5%'" if relative else "'10ms, 5MB, 92%'"
        for part in filter(None, (p.strip() for p in text.split(","))):
            found = _TERM.match(part)
            if not found:
                raise RecipeError(f"budget {part!r}: write a time, a size or an accuracy, such as {example}.")
            value, unit = float(found[1]), found[2].lower()
            if unit in _MILLISECONDS:
                key, value = "latency_ms", value * _MILLISECONDS[unit]
            elif unit in _MEGABYTES:
                key, value = "size_mb", value * _MEGABYTES[unit]
            elif relative and found[1].startswith("-"):
                key, value = "loss", -value / 100
            else:
                key, value = "top1", value / 100
            if key in limits:
                raise RecipeError(f"budget {text!r} names two limits of one kind.")
            if (value < 0 if key == "loss" else value <= 0) or (key == "top1" and value > 1):
                raise RecipeError(f"budget {part!r} can be met by no model.")
            limits[key] = value
        if not limits:
            raise RecipeError(f"the budget is empty; write the likes of {example}.")
        return cls(text, **limits)

    def fits(self, latency_ms: float, size_mb: float) -> bool:
        return (self.latency_ms is None or latency_ms <= self.latency_ms) and (
            self.size_mb is None or size_mb <= self.size_mb
        )

    def met(self, runtimes: list[dict[str, Any]]) -> bool:
        """Whether one of the measured runtimes keeps every limit at once."""
        return any(
            self.fits(row["latency_ms"], row["size_bytes"] / 1e6) and (self.top1 is None or row["top1"] >= self.top1)
            for row in runtimes
        )


def choose_model(
    budget: Budget, recipe: Recipe, img_size: int | tuple[int, int], num_classes: int, reporter: Reporter
) -> dict[str, Any]:
    """The `budget` part of the metrics: every candidate measured, the most promising one that fits marked as chosen.

    Latency is PyTorch's on one image, size is that of float32 weights. Most promising is the highest published
    accuracy; where there is none (the 32-pixel variants), the most work in the forward pass.

    Raises:
        RecipeError: nothing fits; the nearest candidate is named.
    """
    side = max(img_size) if isinstance(img_size, tuple) else img_size
    sizes = {name: default_cfg(name)["input_size"] for name in list_models()}
    candidates = [n for n, s in sizes.items() if len(s) == 3 and (max(s) <= SMALL_INPUT) == (side <= SMALL_INPUT)]
    args = {"num_classes": num_classes, "img_size": img_size, "in_chans": recipe.in_chans}
    shape = (recipe.in_chans, *(img_size if isinstance(img_size, tuple) else (img_size, img_size)))
    table = sorted((_described(name, args, shape) for name in candidates), key=lambda row: row["macs"])
    hopeless = math.inf  # multiply-accumulates from which on nothing can be fast enough
    for done, row in enumerate(table, start=1):
        if budget.size_mb is not None and row["size_mb"] > budget.size_mb:
            row["note"] = "too large: not timed"
        elif row["macs"] > hopeless:
            row["note"] = "too much work: not timed"
        else:
            row["latency_ms"] = _latency(row["model"], args, shape)
            row["fits"] = budget.fits(row["latency_ms"], row["size_mb"])
            if budget.latency_ms is not None and row["latency_ms"] > 3 * budget.latency_ms:
                hopeless = min(hopeless, 3 * row["macs"])
        reporter.advance(done, len(table))
    fitting = [row for row in table if row["fits"]]
    if not fitting:
        known = [row for row in table if row["latency_ms"] is not None]
        near = min(known or table, key=lambda row: _excess(row, budget))
        speed = "" if near["latency_ms"] is None else f" at {near['latency_ms']:.2g} ms"
        raise RecipeError(
            f"no model keeps {budget.asked!r}; the nearest is {near['model']}{speed}, {near['size_mb']:.3g} MB."
        )
    best = max(fitting, key=lambda row: (row["published_top1"] or 0.0, row["macs"]))
    best["chosen"] = True
    table.sort(key=lambda row: row["params"])
    limits = {"latency_ms": budget.latency_ms, "size_mb": budget.size_mb, "top1": budget.top1}
    return {"asked": budget.asked, **limits, "table": table, "met": None}


def _described(name: str, args: dict[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
    """A row of the table, not yet timed."""
    with torch.device("meta"):
        work = count(create_model(name, **args), shape)
    return {
        "model": name,
        "params": work.params,
        "macs": work.macs,
        "size_mb": work.params * 4 / 1e6,
        "latency_ms": None,
        "published_top1": entry(name).variant.top1,
        "fits": False,
        "chosen": False,
        "note": "",
    }


def _latency(name: str, args: dict[str, Any], shape: tuple[int, ...]) -> float:
    model, image = create_model(name, **args).eval(), torch.zeros(1, *shape)
    with torch.inference_mode():
        return measure(lambda: model(image), warmup=2, repeats=15, budget_s=1.5).median_ms


def _excess(row: dict[str, Any], budget: Budget) -> float:
    """By what factor a candidate misses the budget."""
    ratios = [row["size_mb"] / budget.size_mb if budget.size_mb else 0.0]
    if budget.latency_ms and row["latency_ms"] is not None:
        ratios.append(row["latency_ms"] / budget.latency_ms)
    return max(ratios)

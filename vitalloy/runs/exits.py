"""The thresholds at which images leave a model early, found for a wanted accuracy or time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitalloy.checkpoints import load, save
from vitalloy.compression.reduction import steps_of
from vitalloy.compression.tokens.lgvit import EarlyExit, calibrate
from vitalloy.compression.tokens.lgvit.policies import totals
from vitalloy.data import make_loader
from vitalloy.deployment import CascadeModel, export_cascade
from vitalloy.errors import CompressionError
from vitalloy.report import write_report
from vitalloy.runs import stages
from vitalloy.runs.budget import Budget
from vitalloy.runs.folder import Reporter, RunFolder, Silent
from vitalloy.runs.left_out import LOOKED_AT, pictures_of
from vitalloy.training.recipe import Recipe
from vitalloy.training.scores import wilson_interval


def calibrate_exits(
    bundle: str | Path,
    budget: str = "-1%",
    *,
    policy: str | None = None,
    download: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Find the thresholds of a model with early exits, keep them in its bundle, and judge them on the test images.

    Thresholds are chosen by the run's validation images. The bundle, its ONNX files and, where the bundle lies in a run
    folder, the run's report and `metrics.json` follow.

    Args:
        bundle: what `compress` made with "lgvit", such as `runs/birds/compressed/lgvit`.
        budget: one limit: "-1%" (accuracy that may go), "90%" (accuracy to keep) or "2ms" (mean time of an image).
        policy: "confidence", "entropy", "patience" or "patient_and_confident"; the model's own when None.

    Returns:
        The curve and the chosen thresholds (`Curve.as_dict`), and under "test" what they give on the test images.

    Raises:
        CompressionError: the bundle has no exits, or the budget is out of reach. RecipeError: it cannot be read.
    """
    reporter, folder = reporter or Silent(), Path(bundle)
    limits = Budget.parse(budget, relative=True)
    targets = {"loss": limits.loss, "top1": limits.top1, "latency_ms": limits.latency_ms}
    targets = {name: value for name, value in targets.items() if value is not None}
    if len(targets) != 1:
        raise CompressionError(f"budget {budget!r}: exits take one limit, an accuracy or a time.")
    model = load(folder)
    if not isinstance(model, EarlyExit | CascadeModel):
        raise CompressionError(f"{folder}: this model has no exits; compress its run with --method lgvit first.")
    recipe_file = RunFolder(folder).recipe
    if not recipe_file.is_file():
        raise CompressionError(f"{folder}: there is no {recipe_file.name} that names the data.")
    recipe = Recipe.from_toml(recipe_file)
    reporter.stage(f"Reading {recipe.data}")
    splits, transform = stages.splits_of(recipe, download), stages.transform_of(model)
    val, test = (images.with_transform(transform) for images in (splits.val, splits.test))
    reporter.stage("Looking for thresholds")
    curve = calibrate(model, make_loader(val, 64, train=False), policy=policy, **targets)
    reporter.stage("Judging on the test images")
    found = {**curve.as_dict(), "asked": budget, "test": _judged(model, make_loader(test, 64, train=False), reporter)}
    shown = torch.cat(list(stages.batches_of(test, 64, LOOKED_AT)))
    if isinstance(model, CascadeModel):
        model.save()
    else:
        save(model, folder, {k: v for k, v in model.about.items() if k not in ("format", "model", "steps")})
        for cascade in [p for p in folder.iterdir() if p.is_dir()]:
            export_cascade(model, shown[:2], cascade)
    _report(folder, found, model, shown)
    return found


@torch.inference_mode()
def _judged(model: EarlyExit | CascadeModel, batches: Any, reporter: Reporter) -> dict[str, Any]:
    right, full, count, exits = 0, 0, 0, len(model.policy.thresholds)
    shares = torch.zeros(exits + 1)
    for images, labels, _ in batches:
        labels = torch.as_tensor(labels)
        every = model.every_exit(images)
        depths = model.policy.depths(model.policy.reading(every[:-1]))
        right += int((every[depths, torch.arange(len(labels))].argmax(1) == labels).sum())
        full += int((every[-1].argmax(1) == labels).sum())
        shares += depths.bincount(minlength=exits + 1)
        count += len(images)
        reporter.advance(count, len(batches.dataset))
    shares /= count
    costs = torch.tensor(totals(model.trunk_macs, model.head_macs, model.policy))
    return {
        "images": count,
        "top1": right / count,
        "top1_interval": list(wilson_interval(right, count)),
        "full_top1": full / count,
        "macs": float(shares @ costs),
        "shares": shares.tolist(),
    }


def _report(bundle: Path, found: dict[str, Any], model: EarlyExit | CascadeModel, images: Tensor) -> None:
    """Put the curve into the report of the run that the bundle lies in, and draw where images leave now."""
    run = RunFolder(bundle.parent.parent)
    if bundle.parent.name != "compressed" or not run.metrics.is_file():
        return
    metrics = run.read_metrics()
    for part in metrics.get("compression") or []:
        if part["folder"] == f"compressed/{bundle.name}":
            part["exits"] = found
            if isinstance(model, EarlyExit):
                part["steps"] = steps_of(model)
                part["pictures"] = pictures_of(model, images, model.about["preprocessing"], run.images / bundle.name)
    run.write_metrics(metrics)
    write_report(metrics, run.path)

"""`fit`: from a data set to a trained, exported, quantized, explained and stress-tested model with a report."""

from __future__ import annotations

import logging
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import vitalloy
from vitalloy.benchmark import count, describe
from vitalloy.checkpoints import load, load_checkpoint, save
from vitalloy.data import ImageSet, Splits
from vitalloy.data.loading import seeded
from vitalloy.data.transforms import SMALL
from vitalloy.errors import DataError, ModelError, RecipeError, RunError, VitalloyError
from vitalloy.registry import create_model, default_cfg
from vitalloy.report import write_report
from vitalloy.robustness import Corrupt
from vitalloy.runs import stages
from vitalloy.runs.budget import Budget, choose_model
from vitalloy.runs.folder import Reporter, RunFolder, Silent
from vitalloy.training.recipe import Recipe
from vitalloy.training.scores import temperature_scaling

log = logging.getLogger("vitalloy")
CHECKED_IMAGES = 20_000  # larger sets are not read through before training
NAMED_FILES = 5
_SHARED = "VITALLOY_RUN_FOLDER"


@dataclass(frozen=True)
class Run:
    """A finished run: its folder and everything that was measured."""

    folder: Path
    metrics: dict[str, Any]

    @property
    def report(self) -> Path:
        return RunFolder(self.folder).report

    def load(self) -> nn.Module:
        """The trained model, in evaluation mode."""
        return load(self.folder)


def fit(
    data: str | os.PathLike[str] | None = None,
    *,
    recipe: Recipe | str | Path | None = None,
    overrides: Iterable[str] | Mapping[str, Any] = (),
    name: str | None = None,
    runs: str | Path = "runs",
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> Run:
    """Train on a data set and make everything that a run folder holds.

    Args:
        data: "digits", a folder of class folders, a torchvision name, or "hf:owner/name"; the recipe's when None.
        recipe: a `Recipe`, or the path of a recipe.toml; all defaults when None.
        overrides: recipe keys put over it: `{"epochs": 4}` or `["epochs=4"]`.
        name, runs: the run goes to `runs/name`.
        overwrite: replace a run of that name.
        reporter: is told how it goes.

    Raises:
        VitalloyError: data, recipe, weights or training that cannot work, each with what to do.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.from_toml(recipe) if recipe else Recipe()
    recipe = recipe.with_overrides(overrides)
    if data is not None:
        recipe = recipe.with_overrides({"data": os.fspath(data)})
    if Path(recipe.data).is_dir():
        recipe = recipe.with_overrides({"data": str(Path(recipe.data).resolve())})
    return _run(recipe, None, name, Path(runs), overwrite, reporter or Silent())


def resume(folder: str | Path, *, overrides: Iterable[str] = (), reporter: Reporter | None = None) -> Run:
    """Go on with a run that was interrupted, to the weights that it would have had.

    Raises:
        RunError: there is no run in the folder.
    """
    opened = RunFolder.open(folder)
    recipe = Recipe.from_toml(opened.recipe).with_overrides(overrides)
    return _run(recipe, opened, None, opened.path.parent, False, reporter or Silent())


def _run(
    recipe: Recipe, folder: RunFolder | None, name: str | None, runs: Path, overwrite: bool, reporter: Reporter
) -> Run:
    started, resumed = time.monotonic(), folder is not None
    first = _rank() == 0
    reporter = reporter if first else Silent()
    _check_recipe(recipe)
    reporter.stage(f"Reading {recipe.data}")
    splits = stages.splits_of(recipe, recipe.download)
    if first and not resumed:
        _check_images(splits, reporter)
    reporter.result(
        f"{len(splits.classes)} classes; {len(splits.train)} training, {len(splits.val)} validation, "
        f"{len(splits.test)} test images of about {splits.native_size[1]}x{splits.native_size[0]} pixels"
    )
    recipe, chosen = _settle(recipe, splits, folder, reporter)
    model, teacher = _build(recipe, len(splits.classes)), _teacher(recipe)
    folder = folder or _make_folder(recipe, name, runs, overwrite, first)
    reporter.stage(f"Training {recipe.model} for up to {recipe.epochs} epochs")
    from vitalloy.training.trainer import train  # Lightning takes seconds to import: mistakes are told before

    try:
        result = train(model, splits, recipe, folder.path, resume=resumed, teacher=teacher)
    except VitalloyError:
        if first and not resumed and not any(folder.path.glob("checkpoints/*")):
            shutil.rmtree(folder.path, ignore_errors=True)  # nothing was trained: the next try shall not trip over it
        raise
    if not first:
        sys.exit(0)
    reporter.result(f"best validation accuracy {result.best_top1:.2%} in epoch {result.best_epoch + 1}")
    metrics = {
        "run": _about_run(folder, recipe),
        "data": {
            "spec": recipe.data,
            "name": splits.name,
            "classes": splits.classes,
            "train": len(splits.train),
            "val": len(splits.val),
            "test": len(splits.test),
            "native_size": list(splits.native_size),
            "counts": {"train": splits.train.counts(), "val": splits.val.counts(), "test": splits.test.counts()},
        },
        "history": [{**row, "epoch": row["epoch"] + 1} for row in result.history],
        "best": {"epoch": result.best_epoch + 1, "val_top1": result.best_top1, "weights": result.weights},
        "stopped_early": result.stopped_early,
        "budget": chosen,
    }
    try:
        _assess(model, splits, recipe, folder, metrics, reporter)
    finally:  # an export that fails must not take the test results with it
        metrics["run"]["seconds"] = round(time.monotonic() - started, 1)
        folder.write_metrics(metrics)
        write_report(metrics, folder.path)
    return Run(folder.path, metrics)


def _assess(
    model: nn.Module, splits: Splits, recipe: Recipe, folder: RunFolder, metrics: dict[str, Any], reporter: Reporter
) -> None:
    """Everything after training, into `metrics`; the bundle is written first, so that it is safe whatever follows."""
    from vitalloy.training.trainer import transforms

    _, judging = transforms(recipe, splits.native_size)
    train_set, val, test = (s.with_transform(judging) for s in (splits.train, splits.val, splits.test))
    batch, device = recipe.batch_size, "cuda" if recipe.accelerator == "gpu" else "cpu"
    size = recipe.img_size if isinstance(recipe.img_size, tuple) else (recipe.img_size, recipe.img_size)
    model.about = {
        "classes": splits.classes,
        "preprocessing": {
            "size": list(size),
            "mean": list(recipe.mean),
            "std": list(recipe.std),
            "interpolation": recipe.interpolation,
            "crop_pct": recipe.crop_pct,
            "small": max(splits.native_size) <= SMALL,
        },
        "temperature": 1.0,
        "data": splits.name,
    }
    save(model, folder.path, model.about)
    reporter.stage("Testing")
    model.to(device).eval()
    temperature = 1.0
    if recipe.calibrate:
        temperature = temperature_scaling(stages.logits_of(model, val, batch, reporter, device), val.labels)
    model.about["temperature"] = temperature
    logits = stages.logits_of(model, test, batch, reporter, device)
    metrics["test"] = found = stages.score(logits, test.labels, splits.classes, temperature)
    low, high = found["top1_interval"]
    reporter.result(f"{found['top1']:.2%} of {found['n']} test images right (95% interval {low:.1%} to {high:.1%})")
    if recipe.corruptions:
        reporter.stage("Testing on damaged images")
        metrics["corruptions"] = stages.under_corruption(
            model, test, recipe.corruptions, recipe.corruption_severity, batch, device, reporter
        )
        worst = min(metrics["corruptions"], key=lambda row: row["top1"])
        reporter.result(f"worst: {worst['top1']:.2%} under {worst['name'].replace('_', ' ')}")
    model.to("cpu")
    save(model, folder.path, model.about)
    work = count(model, (recipe.in_chans, *size))
    metrics["model"] = {
        "name": recipe.model,
        "params": work.params,
        "macs": work.macs,
        "size_bytes": (folder.path / "model.safetensors").stat().st_size,
        "img_size": list(size),
        "in_chans": recipe.in_chans,
        "weights": recipe.weights or ("timm" if recipe.pretrained else None),
        "probe": recipe.probe,
    }
    onnx = int8 = None
    if recipe.export:
        reporter.stage("Exporting to ONNX")
        metrics["onnx"], onnx = stages.export_float(model, test, folder, batch)
        reporter.result(f"largest difference from PyTorch on real images {metrics['onnx']['max_abs_diff']:.1e}")
    if recipe.export and recipe.int8:
        reporter.stage("Quantizing to int8")
        metrics["int8"], int8 = stages.export_int8(model, train_set, test, folder, batch, reporter)
    reporter.stage("Measuring speed")
    metrics["runtimes"] = stages.measure_runtimes(model, test[0][0][None], onnx, int8, metrics)
    if int8 is not None:
        reporter.result(metrics["int8"]["verdict"])
    if recipe.explain_images:
        reporter.stage("Explaining predictions")
        metrics["explanation"] = stages.explain_some(model, test, logits, splits.classes, recipe.explain_images, folder)
    if metrics["budget"]:
        metrics["budget"]["met"] = Budget.parse(recipe.budget).met(metrics["runtimes"])


def _check_recipe(recipe: Recipe) -> None:
    """What would fail only after hours of training fails here."""
    for name in recipe.corruptions:
        Corrupt(name, recipe.corruption_severity)
    if recipe.budget:
        Budget.parse(recipe.budget)
        if os.environ.get("WORLD_SIZE", "1") != "1" or (isinstance(recipe.devices, int) and recipe.devices > 1):
            raise RecipeError("a budget is measured by one process: run once on one device, then name the model")


def _make_folder(recipe: Recipe, name: str | None, runs: Path, overwrite: bool, first: bool) -> RunFolder:
    """The folder of a new run; the other processes of a run find the one that the first has made."""
    if first:
        if name is None and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
            raise RunError("several processes share a run by its name: give one with --name.")
        folder = RunFolder.create(runs, name, recipe.data, recipe.model, overwrite)
        folder.write(folder.recipe, recipe.to_toml())
        os.environ[_SHARED] = str(folder.path)  # for processes that Lightning starts from this one
        return folder
    return RunFolder(Path(os.environ[_SHARED]) if _SHARED in os.environ else runs / (name or ""))


def _check_images(splits: Splits, reporter: Reporter) -> None:
    """Read every image once, so that a broken one is named before hours of training and not after."""
    sets: list[ImageSet] = [splits.train, splits.val, splits.test]
    if sum(len(s) for s in sets) > CHECKED_IMAGES:
        log.info("More than %d images: they are not checked beforehand.", CHECKED_IMAGES)
        return
    broken = [f"{s.describe(i)}: {reason}" for s in sets for i, reason in s.check(reporter.advance)]
    if broken:
        more = f"\n  and {len(broken) - NAMED_FILES} more" if len(broken) > NAMED_FILES else ""
        listed = "\n  ".join(broken[:NAMED_FILES])
        count = "an image" if len(broken) == 1 else f"{len(broken)} images"
        raise DataError(f"{count} cannot be read:\n  {listed}{more}")


def _settle(
    recipe: Recipe, splits: Splits, folder: RunFolder | None, reporter: Reporter
) -> tuple[Recipe, dict[str, Any] | None]:
    """The recipe with nothing left open, and how a budget chose the model."""
    chosen = None
    facts = (len(splits.train), len(splits.classes), splits.native_size, splits.flip)
    if recipe.budget and folder is not None:
        chosen = folder.read_metrics().get("budget")
    elif recipe.budget:
        reporter.stage(f"Measuring models against {recipe.budget}")
        open_size = recipe.resolve(*facts, {}).img_size
        chosen = choose_model(Budget.parse(recipe.budget), recipe, open_size, len(splits.classes), reporter)
        model = next(row["model"] for row in chosen["table"] if row["chosen"])
        reporter.result(f"chose {model} of {len(chosen['table'])} models")
        recipe = recipe.with_overrides({"model": model})
    model = recipe.choose_model(splits.native_size)
    cfg = default_cfg(model)
    if len(cfg["input_size"]) != 3:
        raise RecipeError(f"{model} takes clips, and {splits.name} holds single images; choose a model for images.")
    return recipe.with_overrides({"model": model}).resolve(*facts, cfg), chosen


def _build(recipe: Recipe, num_classes: int) -> nn.Module:
    args: dict[str, Any] = {
        "num_classes": num_classes,
        "img_size": recipe.img_size,
        "in_chans": recipe.in_chans,
        "pretrained": recipe.pretrained,
    }
    with seeded(recipe.seed):
        try:
            model = create_model(recipe.model, drop_path_rate=recipe.drop_path, **args)
        except ModelError:
            if recipe.drop_path:
                log.warning("%s has no stochastic depth; drop_path is left out.", recipe.model)
            model = create_model(recipe.model, **args)
    if recipe.weights:
        load_checkpoint(model, recipe.weights, reset_head=True)
    return model


def _teacher(recipe: Recipe) -> nn.Module | None:
    if recipe.teacher is None:
        return None
    if Path(recipe.teacher).is_dir():
        if isinstance(teacher := load(recipe.teacher), nn.Module):
            return teacher
        raise RecipeError(f"teacher = {recipe.teacher!r} is a compressed model; name the run it was made from.")
    raise RecipeError(f"teacher = {recipe.teacher!r}: there is no such run folder.")


def _about_run(folder: RunFolder, recipe: Recipe) -> dict[str, Any]:
    import onnxruntime

    return {
        "name": folder.path.name,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["vitalloy", "fit", "--recipe", str(folder.recipe)]),
        "versions": {
            "vitalloy": vitalloy.__version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "onnxruntime": onnxruntime.__version__,
            "python": platform.python_version(),
        },
        "machine": describe(),
        "seed": recipe.seed,
    }


def _rank() -> int:
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0)))

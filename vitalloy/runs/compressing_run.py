"""Compressing the model of a run folder: the choice becomes a bundle in it, the measurements a part of its report."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitalloy.checkpoints import load, save, save_runtime
from vitalloy.compression.methods import METHODS
from vitalloy.data import ImageSet, make_loader
from vitalloy.errors import CompressionError
from vitalloy.report import write_report
from vitalloy.runs import stages
from vitalloy.runs.compressing import Compressed, CompressionReport, compress
from vitalloy.runs.folder import Reporter, RunFolder, Silent
from vitalloy.runs.plan import Plan
from vitalloy.training.recipe import Recipe

CALIBRATION_IMAGES = 128


def compress_run(
    run: str | Path,
    method: str = "auto",
    *,
    weights: int | None = None,
    activations: int | None = None,
    budget: str | None = None,
    calibration_images: int = CALIBRATION_IMAGES,
    epochs: int | None = None,
    download: bool = False,
    reporter: Reporter | None = None,
    **options: Any,
) -> Compressed:
    """Compress the model of a run folder, judge it on the run's test images and add that to the run's report.

    Calibration images come from the run's training images. What is chosen lies in `RUN/compressed/<method>`, which
    `predict` and `evaluate` take like a run folder; everything measured is in `metrics.json` under "compression".

    Args:
        epochs: of training, for the steps that train; none when 0, their own number when None.
        Others as in `compress`.

    Raises:
        RunError: there is no run in the folder. Others as in `compress`.
    """
    reporter = reporter or Silent()
    folder = RunFolder.open(run)
    if epochs is not None:
        options["epochs"] = epochs
    plan = Plan.of(method, weights, activations, options)
    model, recipe = load(run), Recipe.from_toml(folder.recipe)
    reporter.stage(f"Reading {recipe.data}")
    splits = stages.splits_of(recipe, download)
    judging = stages.transform_of(model)
    train, val, test = (s.with_transform(judging) for s in (splits.train, splits.val, splits.test))
    if epochs != 0 and plan.learns():
        from vitalloy.training.trainer import transforms

        shown = splits.train.with_transform(transforms(recipe, splits.native_size)[0])
        options["train"] = _Epochs(shown, recipe.batch_size, recipe.seed)
    fresh = folder.path / "compressed" / f".{plan.name}.part"
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        made = compress(
            model,
            list(stages.batches_of(train, recipe.batch_size, calibration_images)),
            plan.name,
            weights=weights,
            activations=activations,
            evaluation=make_loader(test, recipe.batch_size, train=False),
            selection=make_loader(val, recipe.batch_size, train=False),
            budget=budget,
            folder=fresh,
            reporter=reporter,
            **options,
        )
        report = _settle(made.report, folder, model.about, fresh, plan)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    part = report.as_dict()
    if plan.reducers:
        from vitalloy.runs.left_out import LOOKED_AT, pictures_of

        looked_at = torch.cat(list(stages.batches_of(test, recipe.batch_size, LOOKED_AT)))
        place = folder.images / report.folder.rpartition("/")[2]
        part["pictures"] = pictures_of(report.reduced, looked_at, model.about["preprocessing"], place)
    metrics = folder.read_metrics()
    others = [p for p in metrics.get("compression") or [] if p["folder"] != report.folder]
    metrics["compression"] = [*others, part]
    folder.write_metrics(metrics)
    write_report(metrics, folder.path)
    return Compressed(made.model, report)


def options_from(settings: Iterable[str]) -> dict[str, Any]:
    """Options of a method from texts such as "iterations=500"; a value that is no Python literal stays text.

    Raises:
        CompressionError: a text without "=".
    """
    options = {}
    for setting in settings:
        name, sign, value = setting.partition("=")
        if not sign:
            raise CompressionError(f"--set {setting}: write NAME=VALUE.")
        try:
            options[name.strip()] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name.strip()] = value
    return options


class _Epochs:
    """A run's training images, shuffled and transformed anew in every epoch."""

    def __init__(self, images: ImageSet, batch_size: int, seed: int) -> None:
        self.loader, self.epoch = make_loader(images, batch_size, train=True, seed=seed), -1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.epoch += 1
        self.loader.sampler.set_epoch(self.epoch)
        return ((images, labels) for images, labels, _ in self.loader)


def _settle(
    report: CompressionReport, run: RunFolder, about: dict[str, Any], made: Path, plan: Plan
) -> CompressionReport:
    """Keep what runs the chosen trial, as a bundle beside `made`; the report with what is there now.

    A model that only lost work is kept as weights too, which can be trained on; behind a quantizer what runs is alone.
    """
    chosen, last = report.after, plan.last
    place = made.with_name(f"{plan.name}-w{chosen.weights}a{chosen.activations}" if last in METHODS else plan.name)
    kept = Path(chosen.file).name if chosen.file else None
    for file in made.iterdir():
        if kept is None or file.stem != Path(kept).stem:
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    said = {k: v for k, v in about.items() if k not in ("format", "model", "runtime", "steps")}
    if last is None:
        save(report.reduced, made, said)
    elif kept:
        save_runtime(made, kept, {**said, "model": about["model"]})
    if last is None or kept:
        shutil.copyfile(run.recipe, made / run.recipe.name)  # so that `evaluate` knows the data
    shutil.rmtree(place, ignore_errors=True)
    made.replace(place)
    tried = tuple(replace(t, file=kept if t is chosen else None) for t in report.tried)
    where = str(place.relative_to(run.path))
    return replace(report, tried=tried, after=tried[report.tried.index(chosen)], folder=where)

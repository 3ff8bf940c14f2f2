"""What a finished run is used for: predicting images, evaluating on other data, exporting to other formats."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitalloy.checkpoints import load
from vitalloy.data import IMAGE_SUFFIXES, load_labelled, read_image
from vitalloy.deployment import export_onnx, export_pt2, export_torchscript, verify_onnx
from vitalloy.errors import DataError, ExportError, ModelError, suggest
from vitalloy.explanation import explain
from vitalloy.runs import stages
from vitalloy.runs.folder import Reporter, RunFolder, Silent
from vitalloy.training.recipe import Recipe

FORMATS = {"onnx": "model.onnx", "torchscript": "model.torchscript.pt", "pt2": "model.pt2"}


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, calibrated: `top` is [(class, probability), ...], best first."""

    file: str
    top: list[tuple[str, float]]

    @property
    def label(self) -> str:
        return self.top[0][0]

    def as_dict(self) -> dict[str, Any]:
        return {"file": self.file, "top": [{"class": name, "probability": p} for name, p in self.top]}


def predict(
    run: str | Path,
    images: Iterable[str | os.PathLike[str]],
    *,
    top_k: int = 5,
    explain_to: str | Path | None = None,
    batch_size: int = 32,
    reporter: Reporter | None = None,
) -> list[Prediction]:
    """Classify image files (or folders of them) with a run's model.

    Args:
        run: a run folder or bundle.
        top_k: classes to return for each image.
        explain_to: write a saliency overlay: a .png for one image, a folder for several.

    Raises:
        DataError: a file that is no readable image, or no files at all.
        CheckpointError: the run holds no model.
    """
    files = _image_files(images)
    model = load(run)
    if explain_to and not isinstance(model, nn.Module):
        raise ModelError(f"{run} runs outside PyTorch, so nothing can be explained: explain the run it was made from.")
    transform, classes = stages.transform_of(model), model.classes
    reporter = reporter or Silent()
    found, targets = [], _overlay_files(explain_to, files)
    for start in range(0, len(files), batch_size):
        chunk = files[start : start + batch_size]
        batch = torch.stack([transform(read_image(f)) for f in chunk])
        with torch.inference_mode():
            logits = model(batch)
        probabilities = (logits / model.about.get("temperature", 1.0)).softmax(1)
        best = probabilities.topk(min(top_k, len(classes)), dim=1)
        for file, values, places in zip(chunk, best.values.tolist(), best.indices.tolist(), strict=True):
            found.append(Prediction(str(file), [(classes[p], v) for p, v in zip(places, values, strict=True)]))
        if targets:
            maps = explain(model, batch, logits.argmax(1)).maps
            for k, target in enumerate(targets[start : start + batch_size]):
                stages.save_overlay(batch[k], maps[k], model.about["preprocessing"], target)
        reporter.advance(start + len(chunk), len(files))
    return found


def evaluate(
    run: str | Path,
    data: str | os.PathLike[str] | None = None,
    *,
    batch_size: int = 64,
    download: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Accuracy, per-class scores, confusion and calibration of a run's model.

    Args:
        data: labelled data whose classes the model knows; without it, or with the run's own data, the run's own test
            images.

    Returns:
        The `test` part of metrics.json, with `data` naming what was used.
    """
    model, reporter = load(run), reporter or Silent()
    recipe_file = RunFolder(Path(run)).recipe
    recipe = Recipe.from_toml(recipe_file) if recipe_file.is_file() else None
    own = recipe is not None and (data is None or _same(os.fspath(data), recipe.data))
    if own:
        splits = stages.splits_of(recipe, download)
        images, name = splits.test, f"{splits.name} (the run's test images)"
    elif data is None:
        raise DataError(f"{run} has no recipe that names its data: say what to evaluate on.")
    else:
        images, name = load_labelled(data, model.classes, download=download), os.fspath(data)
    images = images.with_transform(stages.transform_of(model))
    logits = stages.logits_of(model, images, batch_size, reporter)
    return {"data": name, **stages.score(logits, images.labels, model.classes, model.about.get("temperature", 1.0))}


def export(run: str | Path, format: str = "onnx", output: str | Path | None = None) -> dict[str, Any]:
    """Write a run's model in another format, verified against PyTorch.

    Args:
        format: "onnx", "torchscript" or "pt2".
        output: the file; in the run folder when None.

    Returns:
        path, size_bytes and max_abs_diff (largest difference of a logit).

    Raises:
        ExportError: an unknown format, or an export that fails or computes something else.
    """
    if format not in FORMATS:
        raise ExportError(f"format {format!r} is not one of {', '.join(FORMATS)}.{suggest(format, FORMATS)}")
    model = load(run)
    if not hasattr(model, "build_args"):
        raise ExportError(f"{run} holds a compressed model, which is in its runtime's format already.")
    path = Path(output) if output else Path(run) / FORMATS[format]
    if path.is_dir():
        path = path / FORMATS[format]
    if not path.parent.is_dir():
        raise ExportError(f"{path}: there is no folder {path.parent}.")
    args = model.build_args
    size = model.about["preprocessing"]["size"]
    example = torch.randn(2, args["in_chans"], *size, generator=torch.Generator().manual_seed(0))
    if format == "onnx":
        made = export_onnx(model, example, path)
        difference = verify_onnx(model, path, [example]).max_abs_diff
        return {"path": str(made.path), "size_bytes": made.size_bytes, "max_abs_diff": difference}
    made = asdict((export_torchscript if format == "torchscript" else export_pt2)(model, example, path))
    return {**made, "path": str(made["path"])}


def _same(data: str, own: str) -> bool:
    return data == own or (Path(data).exists() and Path(own).exists() and Path(data).resolve() == Path(own).resolve())


def _image_files(images: Iterable[str | os.PathLike[str]]) -> list[Path]:
    files = []
    for item in map(Path, images):
        inside = sorted(p for p in item.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES) if item.is_dir() else [item]
        if not inside:
            raise DataError(f"{item}: there are no images in this folder.")
        files += inside
    if not files:
        raise DataError("no images were named.")
    return files


def _overlay_files(target: str | Path | None, files: list[Path]) -> list[Path]:
    if target is None:
        return []
    target = Path(target)
    if len(files) == 1 and target.suffix:
        return [target]
    if target.suffix:
        raise DataError(f"{target}: several images need a folder for their overlays, not one file.")
    target.mkdir(parents=True, exist_ok=True)
    return [target / f"{k:03d}-{file.stem}.png" for k, file in enumerate(files)]

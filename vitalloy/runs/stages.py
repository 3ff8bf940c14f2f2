"""What happens after training, a stage a function: each returns its part of `metrics.json`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitalloy.benchmark import compare
from vitalloy.data import ImageSet, Splits, eval_transform, load_data, make_loader
from vitalloy.deployment import OnnxModel, export_onnx, quantize_onnx, verify_onnx
from vitalloy.errors import CheckpointError
from vitalloy.explanation import METHODS, explain, overlay
from vitalloy.robustness import evaluate_corruptions
from vitalloy.runs.folder import Reporter, RunFolder
from vitalloy.training.recipe import Recipe
from vitalloy.training.scores import (
    classification_scores,
    expected_calibration_error,
    negative_log_likelihood,
    wilson_interval,
)

log = logging.getLogger("vitalloy")
CALIBRATION_IMAGES = 256  # for int8 ranges
VERIFIED_IMAGES = 256  # for export against PyTorch
CORRUPTED_IMAGES = 1000
SHOWN_PIXELS = 160  # shorter side of a picture in the report


def transform_of(model: nn.Module) -> Callable[..., Tensor]:
    """The evaluation transform of a model from `vitalloy.load`: PIL RGB image -> normalised (C, H, W).

    Raises:
        CheckpointError: the bundle does not say how its images were prepared.
    """
    try:
        says = model.about["preprocessing"]
        return eval_transform(
            tuple(says["size"]),
            mean=says["mean"],
            std=says["std"],
            interpolation=says["interpolation"],
            crop_pct=says["crop_pct"],
            small=says["small"],
        )
    except (AttributeError, KeyError) as error:
        raise CheckpointError(f"the bundle does not say how its images were prepared ({error}).") from error


def splits_of(recipe: Recipe, download: bool) -> Splits:
    """The data of a recipe, divided as in its run."""
    return load_data(
        recipe.data,
        val_fraction=recipe.val_fraction,
        test_fraction=recipe.test_fraction,
        seed=recipe.seed,
        download=download,
        label_column=recipe.label_column,
    )


@torch.inference_mode()
def logits_of(
    model: Callable[[Tensor], Tensor], images: ImageSet, batch_size: int, reporter: Reporter, device: str = "cpu"
) -> np.ndarray:
    """Logits (N, classes) of every image of a set that has its transform."""
    parts, done = [], 0
    for batch, _, _ in make_loader(images, batch_size, train=False):
        parts.append(model(batch.to(device)).float().cpu().numpy())
        done += len(batch)
        reporter.advance(done, len(images))
    return np.concatenate(parts)


def score(logits: np.ndarray, labels: Sequence[int], classes: Sequence[str], temperature: float) -> dict[str, Any]:
    """The `test` part: accuracy with its interval, per-class scores, confusion, calibration before and after."""
    labels = np.asarray(labels)
    right = logits.argmax(1) == labels
    ece, reliability = expected_calibration_error(softmax(logits), labels)
    calibrated, reliability_calibrated = expected_calibration_error(softmax(logits / temperature), labels)
    top5 = None
    if len(classes) > 5:
        top5 = float((np.argsort(-logits, 1)[:, :5] == labels[:, None]).any(1).mean())
    return {
        "top1": float(right.mean()),
        "top1_interval": list(wilson_interval(int(right.sum()), len(labels))),
        "top5": top5,
        "n": len(labels),
        "nll": negative_log_likelihood(logits, labels),
        "nll_calibrated": negative_log_likelihood(logits, labels, temperature),
        "ece": ece,
        "ece_calibrated": calibrated,
        "temperature": temperature,
        "reliability": reliability,
        "reliability_calibrated": reliability_calibrated,
        **classification_scores(labels, logits.argmax(1), classes),
    }


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def batches_of(images: ImageSet, batch_size: int, limit: int) -> Iterator[Tensor]:
    """Up to `limit` images, evenly spread over the set, as batches."""
    step = max(len(images) // limit, 1)
    chosen = images.subset(range(0, min(len(images), limit * step), step))
    for batch, _, _ in make_loader(chosen, batch_size, train=False):
        yield batch


def export_float(
    model: nn.Module, images: ImageSet, folder: RunFolder, batch_size: int
) -> tuple[dict[str, Any], OnnxModel]:
    """The `onnx` part without its latency: the file, verified on real images."""
    batches = list(batches_of(images, batch_size, VERIFIED_IMAGES))
    made = export_onnx(model, batches[0][:2], folder.onnx)
    runtime = OnnxModel(folder.onnx)
    seen = verify_onnx(model, runtime, batches)
    part = {
        "file": made.path.name,
        "opset": made.opset,
        "size_bytes": made.size_bytes,
        "max_abs_diff": seen.max_abs_diff,
        "agreement": seen.agreement,
        "images": seen.images,
    }
    return part, runtime


def export_int8(
    model: nn.Module, train: ImageSet, test: ImageSet, folder: RunFolder, batch_size: int, reporter: Reporter
) -> tuple[dict[str, Any], OnnxModel]:
    """The `int8` part without its latency: calibrated on training images, judged on all test images."""
    made = quantize_onnx(folder.onnx, folder.int8, batches_of(train, 1, CALIBRATION_IMAGES))
    runtime = OnnxModel(folder.int8)
    seen = verify_onnx(model, runtime, batches_of(test, batch_size, VERIFIED_IMAGES), tolerance=None)
    logits = logits_of(runtime, test, batch_size, reporter)
    part = {
        "file": made.path.name,
        "size_bytes": made.size_bytes,
        "top1": float((logits.argmax(1) == np.asarray(test.labels)).mean()),
        "max_abs_diff": seen.max_abs_diff,
        "agreement": seen.agreement,
        "calibration_images": made.calibration_images,
        "method": made.method,
    }
    return part, runtime


def measure_runtimes(
    model: nn.Module, example: Tensor, onnx: OnnxModel | None, int8: OnnxModel | None, metrics: dict[str, Any]
) -> list[dict[str, Any]]:
    """The `runtimes` part, timed in turns on one image; fills the latencies of `onnx` and `int8` in `metrics`."""
    image = example[:1]

    def eager() -> Tensor:
        with torch.inference_mode():
            return model(image)

    calls: dict[str, Callable[[], Any]] = {"PyTorch fp32": eager}
    parts: dict[str, dict[str, Any]] = {}
    array = image.numpy()
    for name, key, runtime in (("ONNX Runtime fp32", "onnx", onnx), ("ONNX Runtime int8", "int8", int8)):
        if runtime is not None:
            calls[name], parts[name] = (lambda r=runtime: r(array)), metrics[key]
    times = compare(calls, repeats=50, budget_s=6.0)
    rows = []
    for name, time in times.items():
        latency = {"latency_ms": time.median_ms, "latency_p90_ms": time.p90_ms}
        part = parts.get(name, {"size_bytes": metrics["model"]["size_bytes"]})
        if name in parts:
            part.update(latency)
        top1 = part.get("top1", metrics["test"]["top1"])
        rows.append({"name": name, "batch": 1, "top1": top1, "size_bytes": part["size_bytes"], **latency})
    if onnx is not None and int8 is not None:
        quick, small = metrics["int8"], metrics["onnx"]
        quick["speedup"] = small["latency_ms"] / quick["latency_ms"]
        quick["verdict"] = verdict(quick, small, metrics["test"]["top1"])
    return rows


def verdict(int8: dict[str, Any], fp32: dict[str, Any], top1: float) -> str:
    """One honest sentence on what quantization gave and cost in this run."""
    smaller, speed = fp32["size_bytes"] / int8["size_bytes"], int8["speedup"]
    points = 100 * (int8["top1"] - top1)
    if speed >= 1.05:
        pace = f"{speed:.2f}x faster than fp32 in the same runtime"
    elif speed > 0.95:
        pace = "no faster than fp32 in the same runtime"
    else:
        pace = f"slower than fp32 in the same runtime ({1 / speed:.2f}x the time)"
    change = "the same accuracy" if abs(points) < 0.05 else f"{points:+.1f} points of accuracy"
    return f"int8 is {smaller:.1f}x smaller and {pace} on one image here, with {change}."


def under_corruption(
    model: nn.Module,
    test: ImageSet,
    names: Sequence[str],
    severity: int,
    batch_size: int,
    device: str,
    reporter: Reporter,
) -> list[dict[str, Any]]:
    """The `corruptions` part, on at most `CORRUPTED_IMAGES` evenly spread test images."""
    step = max(len(test) // CORRUPTED_IMAGES, 1)
    chosen = range(0, min(len(test), CORRUPTED_IMAGES * step), step)

    @torch.inference_mode()
    def predict(batch: Tensor) -> Tensor:
        return model(batch.to(device)).cpu()

    return evaluate_corruptions(
        predict,
        [test.image(i) for i in chosen],
        [test.labels[i] for i in chosen],
        test.transform,
        names=names,
        severity=severity,
        batch_size=batch_size,
        progress=reporter.advance,
    )


def explain_some(
    model: nn.Module, test: ImageSet, logits: np.ndarray, classes: Sequence[str], count: int, folder: RunFolder
) -> dict[str, Any]:
    """The `explanation` part: overlays of right and wrong examples, the surest mistakes first."""
    confidence, guesses = softmax(logits).max(1), logits.argmax(1)
    right = guesses == np.asarray(test.labels)
    by_confidence = np.argsort(-confidence, kind="stable")
    wrong = [i for i in by_confidence if not right[i]][: count // 2]
    spread = np.flatnonzero(right)
    good = spread[np.linspace(0, len(spread) - 1, count - len(wrong)).astype(int)] if len(spread) else []
    chosen = [int(i) for i in dict.fromkeys([*wrong, *good])]
    batch = torch.stack([test[i][0] for i in chosen])
    found = explain(model, batch, torch.from_numpy(guesses[chosen]))
    folder.images.mkdir(exist_ok=True)
    rows = []
    for k, i in enumerate(chosen):
        file = folder.images / f"explain-{k:02d}.png"
        save_overlay(batch[k], found.maps[k], model.about["preprocessing"], file)
        rows.append(
            {
                "file": f"{folder.images.name}/{file.name}",
                "source": test.describe(i),
                "truth": classes[test.labels[i]],
                "prediction": classes[guesses[i]],
                "confidence": float(confidence[i]),
                "correct": bool(right[i]),
            }
        )
    return {"method": found.method, "meaning": METHODS[found.method], "images": rows}


def save_overlay(image: Tensor, saliency: Tensor, preprocessing: dict[str, Any], path: Path) -> None:
    """Write a normalised image (C, H, W) with its map over it as a PNG that is large enough to look at."""
    from PIL import Image

    picture = as_picture(image, preprocessing)
    scale = max(SHOWN_PIXELS / min(picture.size), 1)
    size = (round(picture.width * scale), round(picture.height * scale))
    overlay(picture.resize(size, Image.Resampling.NEAREST if scale > 3 else Image.Resampling.BICUBIC), saliency).save(
        path
    )


def as_picture(image: Tensor, preprocessing: dict[str, Any]) -> Any:
    """A normalised image (C, H, W) as an RGB picture of its own size."""
    from PIL import Image

    mean, std = (torch.tensor(preprocessing[k]).view(-1, 1, 1) for k in ("mean", "std"))
    pixels = ((image * std + mean).clamp(0, 1) * 255).byte()
    pixels = pixels.expand(3, -1, -1) if len(pixels) == 1 else pixels[:3]
    return Image.fromarray(pixels.movedim(0, -1).numpy())

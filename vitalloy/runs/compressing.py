"""`compress`: a model made smaller and faster, with what that gave and cost measured in the same run."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from vitalloy.benchmark import describe
from vitalloy.compression import accounting
from vitalloy.compression.calibration import images_for
from vitalloy.compression.quantization import METHODS, check_options
from vitalloy.compression.simulated import float_modules
from vitalloy.errors import CompressionError, ExportError, suggest
from vitalloy.runs.budget import Budget
from vitalloy.runs.folder import Reporter, Silent
from vitalloy.runs.trials import RUNTIMES, Batches, Call, Trial, Workbench, judge, time_all

AUTO = ("int8", "int8_dynamic", "openvino")  # what `auto` tries, whatever of it is installed
SMALLEST = ("aphq", {"weights": 4, "activations": 8})  # tried when nothing of it is small enough
TOLERANCE = 0.005  # accuracy that `auto` may lose where no budget says otherwise


@dataclass(frozen=True)
class CompressionReport:
    """What compression gave and cost, measured in one run on one machine.

    `before` is the float model in PyTorch and `before_runtime` in ONNX Runtime; `after` is what was chosen; `tried` is
    everything, those two and what failed included. `layers` has a row for each quantized layer (name, bits,
    multiply-accumulates, signal-to-noise ratio in dB), `float_modules` the modules that stayed in float. `folder` is
    where a run keeps the result, below the run.
    """

    before: Trial
    before_runtime: Trial
    after: Trial
    tried: tuple[Trial, ...]
    calibration_images: int
    layers: list[dict[str, Any]] = field(default_factory=list)
    float_modules: list[str] = field(default_factory=list)
    budget: Budget | None = None
    folder: str | None = None
    machine: dict[str, Any] = field(default_factory=describe)

    @property
    def met(self) -> bool | None:
        """Whether the budget is kept; None without one."""
        if self.budget is None:
            return None
        asked = self.budget.loss is not None or self.budget.top1 is not None
        return not _excess(self.after, self.before, self.budget if asked else replace(self.budget, loss=1.0))

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "folder": self.folder,
            "chosen": self.after.name,
            "verdict": self.verdict,
            "budget": self.budget and {"asked": self.budget.asked, "met": self.met},
            "tried": [trial.as_dict() for trial in self.tried],
            "calibration_images": self.calibration_images,
            "layers": self.layers,
            "bit_operations": accounting.bit_operations(self.layers) if self.layers else None,
            "float_modules": self.float_modules,
            "machine": self.machine,
        }

    @property
    def verdict(self) -> str:
        """The result in one honest sentence."""
        after, eager, runtime = self.after, self.before, self.before_runtime
        parts = []
        if after.size_bytes and eager.size_bytes:
            ratio = eager.size_bytes / after.size_bytes
            parts.append(f"{ratio:.1f}x smaller" if ratio >= 1 else f"{1 / ratio:.1f}x larger")
        if after.execution == "simulation":
            parts.append("only simulated, so not faster")
        elif after.latency_ms and eager.latency_ms and runtime.latency_ms:
            parts.append(
                f"{_times(eager.latency_ms / after.latency_ms)} PyTorch and "
                f"{_times(runtime.latency_ms / after.latency_ms)} ONNX Runtime in float32 on one image here"
            )
        if after.top1 is not None and eager.top1 is not None:
            points = 100 * (after.top1 - eager.top1)
            parts.append("the same accuracy" if abs(points) < 0.005 else f"{points:+.2f} points of accuracy")
        elif after.agreement is not None:
            parts.append(f"the float model's answer on {after.agreement:.1%} of {after.images} images")
        return f"{after.name}: {', '.join(parts)}."


class Compressed(NamedTuple):
    """A compressed model, called as the float one, and what was measured."""

    model: Call
    report: CompressionReport


def compress(
    model: nn.Module,
    calibration: Any = None,
    method: str = "auto",
    *,
    weights: int | None = None,
    activations: int | None = None,
    evaluation: Batches | None = None,
    selection: Batches | None = None,
    budget: str | Budget | None = None,
    folder: str | Path | None = None,
    reporter: Reporter | None = None,
    **options: Any,
) -> Compressed:
    """Quantize a classifier and measure what that gave and cost.

    Args:
        model: any backbone of ours or of timm, with a classifier; not changed.
        calibration: images as the model takes them: a tensor (N, C, H, W), or batches of them; 32 or more.
        method: "auto" measures what runs in integers on this machine and takes the fastest that keeps the budget;
            "int8", "int8_dynamic", "openvino", "inductor" or "torchao" name one of these; "easyquant", "fq_vit",
            "ptq4vit", "repq_vit", "aphq", "q_hyvit", "i_vit", "bivit" or "fliqs" is a published method.
        weights, activations: bits, for the published methods; their own when None.
        evaluation: batches (images, labels), gone through more than once; without it the answers on the calibration
            images are compared with the float model's.
        selection: other labelled batches, by which "auto" chooses; `evaluation` when None.
        budget: limits such as "3ms, 1MB, -0.5%" (half a point of accuracy); for "auto" half a point when None.
        folder: where the files go that run the result; a temporary one when None, which lives as long as the result.
        reporter: is told how it goes.
        **options: the method's own options, such as `train`, `epochs` or `seed`.

    Returns:
        (model, report): the model is a `torch.nn.Module` for a published method, and a runtime's session otherwise;
        both take images (B, C, H, W) and return logits.

    Raises:
        CompressionError: a calibration set, method, option or bit width that cannot work.
        RecipeError: a budget that cannot be read.
    """
    reporter = reporter or Silent()
    check(method, weights, activations, options)
    budget = Budget.parse(budget, relative=True) if isinstance(budget, str) else budget
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        images = images_for(model, calibration)
        held = None if folder else tempfile.TemporaryDirectory(prefix="vitalloy-")
        place = Path(folder or held.name)
        place.mkdir(parents=True, exist_ok=True)
        bench = Workbench(model, images, place, reporter)
        tried = [bench.float(), bench.onnx()]
        judging = [images] if evaluation is None else _repeatable(evaluation)
        if method == "auto":
            choosing = judging if selection is None else _repeatable(selection)
            tried, place_of_choice = _automatic(bench, tried, choosing, budget or Budget("", loss=TOLERANCE), reporter)
        else:
            reporter.stage(f"{method}: {RUNTIMES[method] if method in RUNTIMES else METHODS[method].about}")
            bits = {k: v for k, v in (("weights", weights), ("activations", activations)) if v is not None}
            tried, place_of_choice = [*tried, bench.make(method, **bits, **options)], 2
        reporter.stage("Measuring")
        tried, failed = [t for t in tried if t.call], [t for t in tried if not t.call]
        tried = [*time_all(judge(tried, judging, reporter), images[:1]), *failed]
    finally:
        for module, mode in training.items():
            module.training = mode
    after = tried[place_of_choice]
    report = CompressionReport(
        before=tried[0],
        before_runtime=tried[1],
        after=after,
        tried=tuple(tried),
        calibration_images=len(images),
        layers=accounting.table(after.module, images) if after.module is not None else [],
        float_modules=float_modules(after.module) if after.module is not None else [],
        budget=budget,
    )
    if held is not None:
        after.call.kept = held  # the files go when what runs them goes
    reporter.result(report.verdict)
    return Compressed(after.call if after.module is None else after.module, report)


def check(method: str, weights: int | None, activations: int | None, options: dict[str, Any]) -> None:
    """Refuse what would fail only after the work has begun."""
    known = ("auto", *RUNTIMES, *METHODS)
    if method not in known:
        raise CompressionError(f"there is no method {method!r}: use {', '.join(known)}.{suggest(method, known)}")
    if method in METHODS:
        check_options(method, options)
        return
    if options:
        raise CompressionError(f"{method} has no options, but got {', '.join(options)}: they belong to a method.")
    for name, bits in (("weights", weights), ("activations", activations)):
        if bits not in (None, 8):
            raise CompressionError(f"{name}={bits}: {method} works in 8 bits; name a published method for others.")


def _repeatable(batches: Batches) -> Batches:
    return list(batches) if isinstance(batches, Iterator) else batches


def _automatic(
    bench: Workbench, tried: list[Trial], choosing: Batches, budget: Budget, reporter: Reporter
) -> tuple[list[Trial], int]:
    """Everything worth trying, and the number of the one to take: the fastest, or the nearest to the budget."""
    for name in AUTO:
        tried.append(_attempt(bench, name, reporter))
    seen = judge([t for t in tried if t.call], choosing, reporter)
    integer = [t for t in seen if t.execution != "float"]
    if not any(_lost(t, seen[0]) <= _allowed(budget, seen[0]) for t in integer):
        tried.append(_attempt(bench, "q_hyvit", reporter))
    if budget.size_mb is not None and not any(t.size_bytes and t.size_bytes <= budget.size_mb * 1e6 for t in integer):
        name, options = SMALLEST
        tried.append(_attempt(bench, name, reporter, **options))
    runs = [t for t in tried if t.call]
    if len(runs) > len(seen):
        seen = judge(runs, choosing, reporter)
    seen = time_all(seen, bench.images[:1])
    best = min(
        (i for i, t in enumerate(seen) if t.execution != "simulation" and i > 0),
        key=lambda i: (_excess(seen[i], seen[0], budget), seen[i].latency_ms),
    )
    failed = [t for t in tried if not t.call]
    return [*runs, *failed], best


def _attempt(bench: Workbench, name: str, reporter: Reporter, **options: Any) -> Trial:
    """A trial, or the reason why there is none."""
    reporter.stage(f"Trying {name}")
    try:
        return bench.make(name, **options)
    except (CompressionError, ExportError) as error:
        reporter.result(f"not possible: {error}")
        bits = {"weights": 8, "activations": 8, **options}
        return Trial(name, execution="float", runtime="not run", version="", problem=str(error), **bits)


def _excess(trial: Trial, before: Trial, budget: Budget) -> float:
    """By how much a trial goes beyond the limits, each as a share of itself; 0 within all of them."""
    over = 0.0
    if budget.latency_ms is not None and trial.latency_ms is not None:
        over += max(trial.latency_ms / budget.latency_ms - 1, 0)
    if budget.size_mb is not None and trial.size_bytes is not None:
        over += max(trial.size_bytes / 1e6 / budget.size_mb - 1, 0)
    allowed = _allowed(budget, before)
    return over + max(_lost(trial, before) - allowed, 0) / max(allowed, TOLERANCE)


def _lost(trial: Trial, before: Trial) -> float:
    """Accuracy lost; without labels, the share of answers that changed."""
    if trial.top1 is None or before.top1 is None:
        return 1 - (1.0 if trial.agreement is None else trial.agreement)
    return before.top1 - trial.top1


def _allowed(budget: Budget, before: Trial) -> float:
    """The accuracy that may be lost."""
    if budget.loss is not None:
        return budget.loss
    if budget.top1 is not None and before.top1 is not None:
        return before.top1 - budget.top1
    return TOLERANCE


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x faster than" if ratio >= 1 else f"{1 / ratio:.2f}x slower than"

"""`compress`: a model made smaller and faster, with what that gave and cost measured in the same run."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from vitalloy.benchmark import describe
from vitalloy.compression import accounting
from vitalloy.compression.calibration import images_for
from vitalloy.compression.methods import METHODS
from vitalloy.compression.reduction import steps_of
from vitalloy.compression.simulated import float_modules
from vitalloy.errors import CompressionError, ExportError
from vitalloy.runs.budget import Budget
from vitalloy.runs.folder import Reporter, Silent
from vitalloy.runs.plan import AUTO, Plan
from vitalloy.runs.trials import RUNTIMES, Batches, Call, Trial, Workbench, judge, time_all, time_batches

TRIED = ("int8", "int8_dynamic", "openvino")  # what `auto` tries, whatever of it is installed
SMALLEST = ("aphq", {"weights": 4, "activations": 8})  # tried when nothing of it is small enough
TIMED = 32  # images that are timed one by one where they take different times
TOLERANCE = 0.005  # accuracy that `auto` may lose where no budget says otherwise


@dataclass(frozen=True)
class CompressionReport:
    """What compression gave and cost, measured in one run on one machine.

    `before` is the float model in PyTorch and `before_runtime` in ONNX Runtime; `after` is what was chosen; `tried` is
    everything, those two and what failed included. `layers` has a row for each quantized layer (name, bits,
    multiply-accumulates, signal-to-noise ratio in dB), `float_modules` the modules that stayed in float. `steps` are
    the methods that left work out, with their settings, and `reduced` the model that they made. `folder` is where a
    run keeps the result, below the run.
    """

    before: Trial
    before_runtime: Trial
    after: Trial
    tried: tuple[Trial, ...]
    calibration_images: int
    layers: list[dict[str, Any]] = field(default_factory=list)
    float_modules: list[str] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    reduced: nn.Module | None = None
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
            "steps": self.steps,
            "machine": self.machine,
        }

    @property
    def verdict(self) -> str:
        """The result in one honest sentence."""
        after, eager, runtime = self.after, self.before, self.before_runtime
        parts = []
        if after.macs and eager.macs and after.macs != eager.macs:
            parts.append(f"{_less(after.macs / eager.macs)} work")
            if after.batch_ms and runtime.batch_ms and after.execution != "simulation":
                same = runtime if after.runtime == runtime.runtime else eager
                parts.append(f"{_less(after.batch_ms / same.batch_ms)} time for a batch in {same.runtime}")
        if after.size_bytes and eager.size_bytes:
            ratio = eager.size_bytes / after.size_bytes
            size = f"{ratio:.1f}x smaller" if ratio >= 1 else f"{1 / ratio:.1f}x larger"
            parts.append("the same size" if size.startswith("1.0x") else size)
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
    method: str | Iterable[str] = AUTO,
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
    """Make a classifier smaller or faster and measure what that gave and cost.

    Args:
        model: any backbone of ours or of timm, with a classifier; not changed.
        calibration: images as the model takes them: a tensor (N, C, H, W), or batches of them; 32 or more.
        method: "auto" measures what runs in integers on this machine and takes the fastest that keeps the budget;
            "int8", "int8_dynamic", "openvino", "inductor" or "torchao" name one of these; "easyquant", "fq_vit",
            "ptq4vit", "repq_vit", "aphq", "q_hyvit", "i_vit", "bivit" or "fliqs" is a published quantizer; "sit",
            "sparsifiner", "lgvit" and "lpvit" leave work out. Several are joined by "+" (or in a list), what leaves
            work out first: "sit+lpvit+int8".
        weights, activations: bits, for the published methods; their own when None.
        evaluation: batches (images, labels), gone through more than once; without it the answers on the calibration
            images are compared with the float model's.
        selection: other labelled batches, by which "auto" chooses; `evaluation` when None.
        budget: limits such as "3ms, 1MB, -0.5%" (half a point of accuracy); for "auto" half a point when None.
        folder: where the files go that run the result; a temporary one when None, which lives as long as the result.
        reporter: is told how it goes.
        **options: the methods' own options, such as `train`, `epochs` or `seed`; where several have one of that name,
            `**{"sit.epochs": 3}` is for one of them.

    Returns:
        (model, report): the model is a `torch.nn.Module` for a published method, and a runtime's session otherwise;
        both take images (B, C, H, W) and return logits.

    Raises:
        CompressionError: a calibration set, method, option or bit width that cannot work.
        RecipeError: a budget that cannot be read.
    """
    reporter = reporter or Silent()
    plan = Plan.of(method, weights, activations, options)
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
        for name, own in plan.reducers:
            reporter.stage(f"{name}: {METHODS[name].about}")
            bench = bench.reduced(name, own)
            tried += [bench.float(), _onnx(bench, reporter)]
        judging = [images] if evaluation is None else _repeatable(evaluation)
        if plan.last == AUTO:
            choosing = judging if selection is None else _repeatable(selection)
            tried, chosen = _automatic(bench, tried, choosing, budget or Budget("", loss=TOLERANCE), reporter)
        else:
            if plan.last:
                about = RUNTIMES[plan.last] if plan.last in RUNTIMES else METHODS[plan.last].about
                reporter.stage(f"{plan.last}: {about}")
                tried.append(bench.make(plan.last, **plan.options))
            chosen = tried[-1] if tried[-1].call else tried[-2]
        reporter.stage("Measuring")
        tried, failed = [t for t in tried if t.call], [t for t in tried if not t.call]
        place_of_choice = tried.index(chosen)
        tried = time_all(judge(tried, judging, reporter), images[:TIMED])
        tried = [*(time_batches(tried, images) if plan.reducers else tried), *failed]
    finally:
        for module, mode in training.items():
            module.training = mode
    after = tried[place_of_choice]
    quantized = after.module is not None and after.module is not bench.model
    report = CompressionReport(
        before=tried[0],
        before_runtime=tried[1],
        after=after,
        tried=tuple(tried),
        calibration_images=len(images),
        layers=accounting.table(after.module, images) if quantized else [],
        float_modules=float_modules(after.module) if quantized else [],
        steps=steps_of(bench.model),
        reduced=bench.model if plan.reducers else None,
        budget=budget,
    )
    if held is not None:
        after.call.kept = held  # the files go when what runs them goes
    reporter.result(report.verdict)
    module = after.module if plan.last else bench.model
    return Compressed(after.call if module is None else module, report)


def _onnx(bench: Workbench, reporter: Reporter) -> Trial:
    """The reduced model in ONNX Runtime, or the reason why there is no such file."""
    try:
        return bench.onnx()
    except ExportError as error:
        reporter.result(f"no ONNX file: {error}")
        return Trial(bench.done, 32, 32, "float", "ONNX Runtime", "", problem=str(error))


def _repeatable(batches: Batches) -> Batches:
    return list(batches) if isinstance(batches, Iterator) else batches


def _automatic(
    bench: Workbench, tried: list[Trial], choosing: Batches, budget: Budget, reporter: Reporter
) -> tuple[list[Trial], Trial]:
    """Everything worth trying, and the one to take: the fastest, or the nearest to the budget."""
    for name in TRIED:
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
    seen = time_all(seen, bench.images[:TIMED])
    best = min(
        (i for i, t in enumerate(seen) if t.execution != "simulation" and i > 0),
        key=lambda i: (_excess(seen[i], seen[0], budget), seen[i].latency_ms),
    )
    return [*runs, *(t for t in tried if not t.call)], runs[best]


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


def _less(share: float) -> str:
    return f"{1 - share:.0%} less" if share <= 1 else f"{share - 1:.0%} more"


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x faster than" if ratio >= 1 else f"{1 / ratio:.2f}x slower than"

"""Ways to run a classifier, each made, held to the labels and timed beside the others: what `compress` chooses from."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitalloy.benchmark import compare
from vitalloy.compression import accounting, trunk
from vitalloy.compression.methods import METHODS, options_of
from vitalloy.compression.quantization import quantize
from vitalloy.compression.reduction import reduce
from vitalloy.compression.tokens.lgvit import EarlyExit
from vitalloy.deployment import (
    CascadeModel,
    OnnxModel,
    OpenVinoModel,
    compile_int8,
    export_cascade,
    export_onnx,
    export_qdq,
    quantize_cascade,
    quantize_dynamic,
    quantize_onnx,
    quantize_openvino,
)
from vitalloy.errors import CompressionError, ExportError
from vitalloy.runs.folder import Reporter
from vitalloy.training.scores import wilson_interval

Call = Callable[[Tensor], Tensor]
Batches = Iterable[Any]
FLOAT, ONNX_FLOAT = "float", "onnx"
COUNTED = 64  # images whose mean work is counted
BATCH = 16  # images at once, where a batch is timed
# what runs without a published method, and what it does
RUNTIMES = {
    "int8": "static int8 in ONNX Runtime: ranges from the calibration images",
    "int8_dynamic": "dynamic int8 in ONNX Runtime: ranges of matrix products measured in every call",
    "openvino": "static int8 in OpenVINO, quantized by NNCF (extra: openvino)",
    "inductor": "static int8 compiled by PyTorch's Inductor (extra: torchao, and a C++ compiler)",
    "torchao": "dynamic int8 of linear layers by torchao, on CUDA where there is one (extra: torchao)",
}


@dataclass(frozen=True)
class Trial:
    """One way to run the model, and what was measured of it. None: not measured.

    `execution` says what really ran: "float", "integer layers" (matrix products and convolutions in integers, the rest
    in float), "integer only", "binary", or "simulation" (float arithmetic on quantized values: accuracy alone).
    `agreement` is the share of images on which it answers as the float model does. `macs` are the multiply-accumulates
    of one image, in the mean where images differ; `batch_ms` is the time of `BATCH` images. `problem` says why it could
    not be made, or what to know about it.
    """

    method: str
    weights: int
    activations: int
    execution: str
    runtime: str
    version: str
    size_bytes: int | None = None
    top1: float | None = None
    top1_interval: tuple[float, float] | None = None
    agreement: float | None = None
    images: int = 0
    macs: int | None = None
    batch_ms: float | None = None
    latency_ms: float | None = None
    latency_p90_ms: float | None = None
    seconds: float | None = None
    file: str | None = None
    problem: str | None = None
    call: Call | None = None
    module: nn.Module | None = None

    @property
    def name(self) -> str:
        bits = "" if self.weights == self.activations == 32 else f" {self.weights}/{self.activations}"
        label = "float" if self.method in (FLOAT, ONNX_FLOAT) else self.method
        return f"{label}{bits}, {self.runtime}"

    def as_dict(self) -> dict[str, Any]:
        """Everything but the model itself, for JSON."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("call", "module")}
        return {"name": self.name, **plain, "top1_interval": self.top1_interval and list(self.top1_interval)}


class Workbench:
    """A model, its calibration images and a folder for what is made of them.

    Args:
        model: a float classifier in evaluation mode.
        images: calibration images (N, C, H, W).
        folder: where files go.
        done: the steps that made the model, joined by "+"; nothing for the model as it was given.
    """

    def __init__(self, model: nn.Module, images: Tensor, folder: Path, reporter: Reporter, done: str = "") -> None:
        self.model, self.images, self.folder, self.reporter, self.done = model, images, folder, reporter, done
        self.example = images[:2]
        self.macs = trunk.macs(model, images[:COUNTED]) // min(len(images), COUNTED)
        self._onnx: Trial | None = None

    def reduced(self, method: str, options: dict[str, Any]) -> Workbench:
        """The bench of what a method that leaves work out makes of the model."""
        progress = {"progress": self.reporter.advance} if "progress" in options_of(method) else {}
        made = reduce(self.model, self.images, method, **progress, **options)
        return Workbench(made, self.images, self.folder, self.reporter, self._name(method))

    def float(self) -> Trial:
        """The model as it is, in PyTorch."""
        size = sum(v.numel() * v.element_size() for v in self.model.state_dict().values())
        trial = Trial(self.done or FLOAT, 32, 32, "float", "PyTorch", _version("torch"), size, macs=self.macs)
        return replace(trial, call=eager(self.model), module=self.model if self.done else None)

    def onnx(self) -> Trial:
        """The model in float32 in ONNX Runtime; the file that others start from."""
        if self._onnx is None:
            name = self.done or ONNX_FLOAT
            trial = Trial(name, 32, 32, "float", *_onnxruntime(), macs=self.macs)
            if self._leaves_early:
                made = export_cascade(self.model, self.example, self.folder / name)
                self._onnx = replace(trial, file=str(made), size_bytes=_bytes_below(made), call=CascadeModel(made))
            else:
                made = export_onnx(self.model, self.example, self.folder / f"{self.done or FLOAT}.onnx")
                self._onnx = self._file(trial, made.path)
        return self._onnx

    def make(self, method: str, **options: Any) -> Trial:
        """Quantize by a runtime of RUNTIMES or a published method of METHODS.

        Raises:
            CompressionError, ExportError: it cannot be done with this model, these images or on this machine.
        """
        started = time.perf_counter()
        made = getattr(self, f"_{method}")() if method in RUNTIMES else self._published(method, options)
        return replace(made, method=self._name(method), macs=self.macs, seconds=round(time.perf_counter() - started, 2))

    @property
    def _leaves_early(self) -> bool:
        return isinstance(self.model, EarlyExit)

    def _name(self, method: str) -> str:
        return f"{self.done}+{method}" if self.done else method

    def _int8(self) -> Trial:
        path = self.folder / self._name("int8.onnx")
        if self._leaves_early:
            made = quantize_cascade(Path(self.onnx().file), path.with_suffix(""), self.images)
            trial = Trial("int8", 8, 8, "integer layers", *_onnxruntime())
            return replace(trial, file=str(made), size_bytes=_bytes_below(made), call=CascadeModel(made))
        quantize_onnx(Path(self.onnx().file), path, self.images.split(1))
        return self._file(Trial("int8", 8, 8, "integer layers", *_onnxruntime()), path)

    def _int8_dynamic(self) -> Trial:
        path = self.folder / self._name("int8-dynamic.onnx")
        quantize_onnx(self._one_file(), path, self.images.split(1), dynamic_products=True)
        return self._file(Trial("int8_dynamic", 8, 8, "integer layers", *_onnxruntime()), path)

    def _openvino(self) -> Trial:
        path = self.folder / self._name("openvino.xml")
        made = quantize_openvino(self._one_file(), path, self.images.split(1))
        trial = Trial("openvino", 8, 8, "integer layers", "OpenVINO", _version("openvino"), made.size_bytes)
        return replace(trial, file=str(path), call=OpenVinoModel(path))

    def _inductor(self) -> Trial:
        call = compile_int8(self.model, self.images)
        return Trial("inductor", 8, 8, "integer layers", "PyTorch Inductor", _version("torch"), call=call)

    def _torchao(self) -> Trial:
        call = quantize_dynamic(self.model)
        return Trial("torchao", 8, 8, "integer layers", "torchao", _version("torchao"), call=call)

    def _published(self, method: str, options: dict[str, Any]) -> Trial:
        progress = {"progress": self.reporter.advance} if "progress" in options_of(method) else {}
        module = quantize(self.model, self.images, method, **progress, **options)
        rows = accounting.sized_layers(module).values()
        bits = {
            "weights": min((m.weight_bits for m in rows), default=options.get("weights", 32)),
            "activations": min((m.activation_bits for m in rows), default=options.get("activations", 32)),
        }
        simulated = Trial(
            method,
            **bits,
            execution="simulation",
            runtime="PyTorch",
            version=_version("torch"),
            size_bytes=accounting.size_bytes(module),
            call=eager(module),
            module=module,
        )
        runs = METHODS[method].runs
        path = self.folder / self._name(f"{method}-w{bits['weights']}a{bits['activations']}.onnx")
        try:
            if runs == "integer layers":
                export_qdq(module, self.example, path, calibration=self.images)
            elif runs == "integer only":
                from vitalloy.compression.quantization.i_vit import export_integer_onnx, to_integer

                export_integer_onnx(to_integer(module), self.example, path)
            elif runs == "binary":
                from vitalloy.compression.quantization.bivit import packed, save_packed

                made = packed(module)
                file = save_packed(made, path.with_suffix(".safetensors"))
                facts = {"size_bytes": file.stat().st_size, "file": str(file), "call": eager(made)}
                return replace(simulated, execution=runs, runtime="NumPy", version=np.__version__, **facts)
            else:
                return replace(simulated, problem="simulated: float arithmetic on quantized values, slower than float")
        except ExportError as error:
            return replace(simulated, problem=str(error))
        return self._file(
            replace(simulated, execution=runs, runtime="ONNX Runtime", version=_version("onnxruntime")), path
        )

    def _one_file(self) -> Path:
        """The float model's ONNX file, for what reads one graph."""
        if self._leaves_early:
            raise CompressionError("early exits run in ONNX Runtime as several files: put int8 behind lgvit.")
        return Path(self.onnx().file)

    def _file(self, trial: Trial, path: Path) -> Trial:
        return replace(trial, file=str(path), size_bytes=path.stat().st_size, call=OnnxModel(path, spinning=False))


@torch.inference_mode()
def judge(trials: list[Trial], batches: Batches, reporter: Reporter) -> list[Trial]:
    """Accuracy and agreement with the first trial (the float model) on labelled batches (images, labels).

    Batches without labels (tensors) give the agreement alone.
    """
    total = len(batches.dataset) if hasattr(batches, "dataset") else None
    right, same, count, labelled = np.zeros(len(trials)), np.zeros(len(trials)), 0, True
    for batch in batches:
        images, labels = (batch, None) if isinstance(batch, Tensor) else batch[:2]
        answers = np.stack([_answers(trial, images) for trial in trials])
        same += (answers == answers[:1]).sum(1)
        if labels is None:
            labelled = False
        else:
            right += (answers == np.asarray(labels)[None]).sum(1)
        count += len(images)
        if total:
            reporter.advance(min(count, total), total)
    rows = []
    for trial, hits, equal in zip(trials, right, same, strict=True):
        found: dict[str, Any] = {"agreement": float(equal / max(count, 1)), "images": count}
        if labelled and count:
            found |= {"top1": float(hits / count), "top1_interval": wilson_interval(int(hits), count)}
        rows.append(replace(trial, **found))
    return rows


def _answers(trial: Trial, images: Tensor) -> np.ndarray:
    fixed = getattr(trial.call, "batch", None)
    parts = [trial.call(part) for part in (images.split(fixed) if fixed else [images])]
    return torch.cat([part.detach().cpu() for part in parts]).argmax(-1).numpy()


def time_all(trials: list[Trial], images: Tensor, budget_s: float = 2.0) -> list[Trial]:
    """Latency of one image, all trials in turn within this process.

    Args:
        images: (N, C, H, W); the first is timed. Where trials treat images differently, a run goes through all of them
            one by one, and its mean counts.
    """
    differ = any(hasattr(trial.call, "depths") for trial in trials)
    shown = images.split(1) if differ else images[:1].split(1)

    def run(trial: Trial) -> None:
        for image in shown:
            trial.call(image)

    times = compare({str(i): lambda t=t: run(t) for i, t in enumerate(trials)}, repeats=50, budget_s=budget_s)
    return [
        replace(t, latency_ms=time.median_ms / len(shown), latency_p90_ms=time.p90_ms / len(shown))
        for t, time in zip(trials, times.values(), strict=True)
    ]


def time_batches(trials: list[Trial], images: Tensor, budget_s: float = 2.0) -> list[Trial]:
    """The time of `BATCH` images at once, all trials in turn; of trials that take any number."""
    batch = images[:BATCH]
    calls = {str(i): lambda t=t: t.call(batch) for i, t in enumerate(trials) if getattr(t.call, "batch", None) is None}
    times = compare(calls, repeats=30, budget_s=budget_s) if len(batch) == BATCH else {}
    return [replace(t, batch_ms=times[str(i)].median_ms) if str(i) in times else t for i, t in enumerate(trials)]


def eager(model: nn.Module) -> Call:
    """A PyTorch model as a call without gradients; with `depths` where images leave early."""

    def call(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return model(images)

    if isinstance(model, EarlyExit):
        call.depths = True
    return call


def _bytes_below(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package).split("+")[0]


def _onnxruntime() -> tuple[str, str]:
    return "ONNX Runtime", _version("onnxruntime")

"""Times int8 against float for one image on one thread: `OMP_NUM_THREADS=1 python benchmarks/quantized.py`.

Every way to run a model is timed in turns in one process: PyTorch as it is, timm's model where it has one, ONNX Runtime
and OpenVINO in float32, and their int8 forms: static and dynamic quantization by ONNX Runtime, our own scales as a Q/DQ
file, NNCF's, and PT2E compiled. Weights are random, which latency does not depend on; figures are medians, and what
counts is the ratio to eager PyTorch. Files are kept in `--files` and reused, so that a second run only times. Of
OpenVINO's int8 form the time in each kind of operation is kept too.
Results go to benchmarks/results/quantized-<machine>.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
from collections import Counter
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import vitalloy
from vitalloy.benchmark import compare, describe
from vitalloy.compression.calibration import prepared, record
from vitalloy.compression.quantizers import asymmetric, symmetric
from vitalloy.compression.simulated import simulate
from vitalloy.deployment import (
    OnnxModel,
    OpenVinoModel,
    compile_int8,
    export_onnx,
    export_qdq,
    quantize_onnx,
    quantize_openvino,
)
from vitalloy.errors import ExportError

ROOT = Path(__file__).parent.parent
MODELS = ("deit_tiny_patch16_224", "deit_small_patch16_224", "cvt_13", "pvt_v2_b0", "efficientformer_l1")
Call = Callable[[torch.Tensor], torch.Tensor]


def images(count: int) -> torch.Tensor:
    """Noise at several scales: nearer to the spectrum of photographs than white noise."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(count, 3, side, side, generator=generator) for side in (7, 14, 28, 56, 112, 224)]
    return sum(nn.functional.interpolate(part, size=224, mode="bilinear") for part in parts) / len(parts) ** 0.5


@torch.no_grad()
def rounded(model: nn.Module, seen: torch.Tensor) -> nn.Module:
    """8 bits by minima and maxima: weights per channel, activations per tensor, attention in float."""
    own = prepared(model).requires_grad_(False)
    layers = [layer for layer in simulate(own).values() if hasattr(layer, "weight_quantizer")]
    for layer, saw in record(own, layers, seen).items():
        layer.weight_quantizer = symmetric(layer.weight, 8, tuple(range(1, layer.weight.ndim)))
        layer.input_quantizer = asymmetric(saw.inputs[0].amin(), saw.inputs[0].amax(), 8)
    return own


def eager(model: nn.Module) -> Call:
    def call(batch: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return model(batch)

    return call


def files(name: str, model: nn.Module, seen: torch.Tensor, folder: Path) -> dict[str, Path]:
    """What is needed to run the model elsewhere, written where it is not there yet."""
    paths = {
        "onnx_fp32": folder / f"{name}.onnx",
        "onnx_static_int8": folder / f"{name}.static.onnx",
        "onnx_dynamic_int8": folder / f"{name}.dynamic.onnx",
        "onnx_our_scales_int8": folder / f"{name}.qdq.onnx",
        "openvino_int8": folder / f"{name}.xml",
    }
    whole = paths["onnx_fp32"]
    make: dict[str, Callable[[Path], Any]] = {
        "onnx_fp32": lambda path: export_onnx(model, seen[:2], path, opset=20),
        "onnx_static_int8": lambda path: quantize_onnx(whole, path, [seen]),
        "onnx_dynamic_int8": lambda path: quantize_onnx(whole, path, [seen], dynamic_products=True),
        "onnx_our_scales_int8": lambda path: export_qdq(rounded(model, seen), seen[:2], path, calibration=seen),
        "openvino_int8": lambda path: quantize_openvino(whole, path, [seen]),
    }
    for kind, path in paths.items():
        if not path.exists():
            make[kind](path)
    return paths


def measure(name: str, folder: Path, repeats: int, budget_s: float, inductor: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    model, seen = vitalloy.create_model(name).eval(), images(8)
    paths = files(name, model, seen, folder)
    runs: dict[str, Call] = {"eager_fp32": eager(model)}
    import timm

    if timm.is_model(name):
        runs["timm_eager_fp32"] = eager(timm.create_model(name).eval())
    runs |= {kind: OnnxModel(path, threads=1) for kind, path in paths.items() if kind.startswith("onnx")}
    runs["openvino_fp32"] = OpenVinoModel(paths["onnx_fp32"], threads=1)
    runs["openvino_int8"] = OpenVinoModel(paths["openvino_int8"], threads=1)
    runs["openvino_our_scales_int8"] = OpenVinoModel(paths["onnx_our_scales_int8"], threads=1)
    row: dict[str, Any] = {"model": name, "failed": {}}
    if inductor:
        try:
            runs["inductor_int8"] = compile_int8(model, seen)
        except ExportError as error:
            row["failed"]["inductor_int8"] = str(error)
    times = compare(
        {kind: lambda run=run: run(seen[:1]) for kind, run in runs.items()}, repeats=repeats, budget_s=budget_s
    )
    reference = runs["eager_fp32"](seen[:1])
    row["ways"] = {
        kind: {
            "median_ms": time.median_ms,
            "p90_ms": time.p90_ms,
            "runs": time.runs,
            "speed_up": times["eager_fp32"].median_ms / time.median_ms,
            "cosine": None
            if kind.startswith("timm")
            else nn.functional.cosine_similarity(reference, runs[kind](seen[:1])).item(),
            "bytes": size(paths.get(kind.replace("openvino_fp32", "onnx_fp32").replace("openvino_our", "onnx_our"))),
        }
        for kind, time in times.items()
    }
    row["profile_openvino_int8"] = profile(paths["openvino_int8"], seen[:1])
    return row


def profile(path: Path, image: torch.Tensor, repeats: int = 20) -> dict[str, float]:
    """Milliseconds that OpenVINO spends in each kind of operation on one image, the longest first."""
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    model.reshape([*image.shape])
    options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32", "PERF_COUNT": True}
    request = core.compile_model(model, "CPU", options).create_infer_request()
    spent: Counter[str] = Counter()
    for turn in range(2 * repeats):
        request.infer({0: image.numpy()})
        if turn >= repeats:  # the first half warms up
            for node in request.get_profiling_info():
                spent[f"{node.node_type} {node.exec_type}"] += node.real_time.total_seconds() * 1e3 / repeats
    return {kind: round(ms, 3) for kind, ms in spent.most_common() if ms > 0}


def size(path: Path | None) -> int | None:
    """Of the file, with the weights beside it where they are apart."""
    if path is None:
        return None
    parts = [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]
    return sum(part.stat().st_size for part in parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--files", type=Path, default=Path("runs/quantized"), help="where exported files are kept")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--budget", type=float, default=5.0, help="seconds a way")
    parser.add_argument("--inductor", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != "1":
        parser.error("set OMP_NUM_THREADS=1: all is measured on one thread")
    torch.set_num_threads(1)
    machine = describe()
    label = re.sub(r"[^a-z0-9]+", "-", str(machine.get("cpu", "unknown")).lower()).strip("-")
    output = options.output or ROOT / "benchmarks" / "results" / f"quantized-{label}-1-thread.json"
    rows = {row["model"]: row for row in json.loads(output.read_text())["rows"]} if output.exists() else {}
    for name in options.models:
        rows[name] = row = measure(name, options.files, options.repeats, options.budget, options.inductor)
        table = Table("way", "ms", "x eager", "cosine", "MB", title=name)
        for kind, way in row["ways"].items():
            table.add_row(
                kind,
                f"{way['median_ms']:.1f}",
                f"{way['speed_up']:.2f}",
                "" if way["cosine"] is None else f"{way['cosine']:.4f}",
                "" if way["bytes"] is None else f"{way['bytes'] / 1e6:.1f}",
            )
        Console().print(table)
        result = {"date": date.today().isoformat(), "machine": machine, "batch": 1, "rows": list(rows.values())}
        output.write_text(json.dumps(result, indent=1) + "\n")
        gc.collect()


if __name__ == "__main__":
    main()

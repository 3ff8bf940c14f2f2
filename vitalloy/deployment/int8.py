"""Int8 ONNX: weights and the inputs of matrix products and convolutions in 8 bits, run by integer kernels.

Static post-training quantization by ONNX Runtime, in the QDQ format: every runtime that knows QuantizeLinear reads
the file. What is quantized follows measurements (one thread, AVX-512 VNNI, DeiT-Ti, ResNet-18 and EfficientFormer-L1
against the same runtime in float32):

- activations unsigned, weights signed and per channel: signed activations were up to 2.5 times slower on such CPUs;
- only convolutions, matrix products and what convolutions fuse with: softmax, LayerNorm and GELU gain no speed in
  int8 and residual sums lose accuracy;
- products of two activations (attention) stay float: quantizing both factors costs more time than it saves;
- the results of matrix products leave in float: rounding them too cost accuracy and time, as the next operator is
  float.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitalloy.deployment._common import quiet, reason, written_whole
from vitalloy.errors import ExportError

METHODS = ("minmax", "percentile", "entropy")
_CONVOLUTIONS = ["Conv", "Relu", "Clip", "MaxPool"]  # the last three keep neighbouring convolutions in int8
_PRODUCTS = ["MatMul", "Gemm"]
_WEIGHTED = {"Conv", *_PRODUCTS}


@dataclass(frozen=True)
class Int8Export:
    """An int8 file and how it came about.

    `fp32_size_bytes` is the size of the file it was made from, `quantized` of `weighted` operators that hold a weight
    now run on int8 weights, and `method` says in words how.
    """

    path: Path
    size_bytes: int
    fp32_size_bytes: int
    calibration_images: int
    quantized: int
    weighted: int
    method: str


def quantize_onnx(
    fp32_path: str | Path,
    int8_path: str | Path,
    batches: Iterable[Any],
    *,
    per_channel: bool = True,
    method: str = "minmax",
    dynamic_products: bool = False,
    reduce_range: bool | None = None,
    exclude: Iterable[str] = (),
) -> Int8Export:
    """Quantize an ONNX file that `export_onnx` wrote.

    Args:
        fp32_path: the float file.
        int8_path: the file to write; an existing one is replaced, and only by a complete one.
        batches: real images as the model takes them (training images, a hundred or more): tensors or arrays (B, C, H,
            W), or tuples that start with one. Read once.
        per_channel: one scale an output channel of a weight, instead of one a weight.
        method: how a range is read off the activations: "minmax" (all of it; right for most), "percentile" (99.999 %
            of it) or "entropy". The last two keep every activation of the calibration images in memory: use few
            images.
        dynamic_products: measure the range of a matrix product's input anew in every call, instead of by calibration.
            A little faster and nearer to float on a transformer, but an image's answer then depends on the others of
            its batch.
        reduce_range: 7-bit weights, for x86 CPUs without VNNI instructions, whose int8 sums overflow; None asks this
            machine.
        exclude: names of nodes to leave in float.

    Raises:
        ExportError: for an unknown method, no images, images that do not fit the file, or a graph without weights to
            quantize.
    """
    import onnx

    fp32_path, int8_path = Path(fp32_path), Path(int8_path)
    if method not in METHODS:
        raise ExportError(f"There is no calibration method {method!r}: use one of {', '.join(METHODS)}.")
    graph = float_graph(fp32_path)
    weighted, skipped = products(graph)
    if not weighted:
        raise ExportError(
            f"{fp32_path} has no convolution or matrix product with a weight: there is nothing to quantize."
        )
    if reduce_range is None:
        reduce_range = _int8_overflows()
    images = CalibrationImages(fp32_path, graph, batches, one_by_one=method != "minmax")
    with written_whole(int8_path) as unfinished:
        try:
            with quiet():
                _quantize(
                    graph,
                    unfinished,
                    images,
                    per_channel=per_channel,
                    method=method,
                    dynamic_products=dynamic_products,
                    reduce_range=reduce_range,
                    skipped=skipped + list(exclude),
                )
        except ExportError:
            raise
        except Exception as error:  # ONNX Runtime raises whatever its steps raise
            raise ExportError(f"{fp32_path} could not be quantized: {reason(error)}.") from error
        done = _int8_weighted(onnx.load(unfinished))
        if done == 0:
            raise ExportError(f"No weight of {fp32_path} could be turned into int8: is every node excluded?")
    return Int8Export(
        path=int8_path,
        size_bytes=int8_path.stat().st_size,
        fp32_size_bytes=fp32_path.stat().st_size,
        calibration_images=images.count,
        quantized=done,
        weighted=len(weighted),
        method=_words(per_channel, method, dynamic_products, reduce_range),
    )


def float_graph(path: Path) -> Any:
    """The ONNX model in a file, to quantize; ExportError where there is none, or one that already is."""
    import onnx

    if not path.is_file():
        raise ExportError(f"There is no ONNX file at {path}. Export the model first.")
    try:
        model = onnx.load(path)
    except Exception as error:  # protobuf's own error types
        raise ExportError(f"{path} is not a readable ONNX file: {reason(error)}.") from error
    if any(node.op_type == "DequantizeLinear" for node in model.graph.node):
        raise ExportError(f"{path} is already quantized: run it as it is, or start from the float file.")
    return model


class CalibrationImages:
    """Calibration images as ONNX Runtime asks for them: `get_next` returns the next input, None at the end."""

    def __init__(self, path: Path, graph: Any, batches: Iterable[Any], one_by_one: bool) -> None:
        initial = {weight.name for weight in graph.graph.initializer}
        self.input = next(entry for entry in graph.graph.input if entry.name not in initial)
        self.path = path
        self.count = 0
        shape = [size.dim_value or None for size in self.input.type.tensor_type.shape.dim]  # None: any size
        self._shape = shape
        self._size = shape[0] or (1 if one_by_one else None)  # histograms want batches of one size
        self._chunks = self._read(batches)
        self._first = next(self._chunks, None)  # fails here, before any work, when it does not fit
        if self._first is None:
            raise ExportError(f"{path} cannot be quantized without calibration images: pass at least one full batch.")

    def get_next(self) -> dict[str, np.ndarray] | None:
        chunk = self._first if self._first is not None else next(self._chunks, None)
        self._first = None
        if chunk is None:
            return None
        self.count += len(chunk)
        return {self.input.name: chunk}

    def __iter__(self) -> CalibrationImages:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        batch = self.get_next()
        if batch is None:
            raise StopIteration
        return batch

    def _read(self, batches: Iterable[Any]) -> Iterator[np.ndarray]:
        for batch in batches:
            batch = batch[0] if isinstance(batch, (tuple, list)) else batch
            if isinstance(batch, torch.Tensor):
                batch = batch.detach().cpu().float().numpy()
            batch = np.ascontiguousarray(batch, dtype=np.float32)
            if batch.ndim != len(self._shape) or any(
                want not in (None, have) for want, have in zip(self._shape[1:], batch.shape[1:], strict=True)
            ):
                wanted = ", ".join("any" if size is None else str(size) for size in self._shape)
                raise ExportError(
                    f"Calibration images of shape {batch.shape} do not fit {self.path.name}, which takes ({wanted})."
                )
            size = self._size or len(batch)
            for start in range(0, len(batch), max(size, 1)):
                chunk = batch[start : start + size]
                if len(chunk) == size or self._shape[0] is None:
                    yield chunk


def _quantize(
    graph: Any,
    path: Path,
    images: CalibrationImages,
    *,
    per_channel: bool,
    method: str,
    dynamic_products: bool,
    reduce_range: bool,
    skipped: list[str],
) -> None:
    import onnx
    from onnxruntime.quantization import (
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )

    kinds = {
        "minmax": CalibrationMethod.MinMax,
        "percentile": CalibrationMethod.Percentile,
        "entropy": CalibrationMethod.Entropy,
    }
    options: dict[str, Any] = {
        "ActivationSymmetric": False,
        "WeightSymmetric": True,
        "OpTypesToExcludeOutputQuantization": _PRODUCTS,
    }
    del graph.graph.value_info[:]  # shapes of the float graph: stale ones break later steps
    source, static = path.with_suffix(".float.onnx"), path.with_suffix(".static.onnx")
    onnx.save(graph, source)
    operators = {node.op_type for node in graph.graph.node}
    if not dynamic_products or "Conv" in operators:
        quantize_static(
            source,
            static,
            images,
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=_CONVOLUTIONS + ([] if dynamic_products else _PRODUCTS),
            per_channel=per_channel,
            reduce_range=reduce_range,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=skipped,
            calibrate_method=kinds[method],
            extra_options=options,
        )
    else:
        shutil.copyfile(source, static)
    if not dynamic_products:
        shutil.move(static, path)
        return
    half = onnx.load(static)
    del half.graph.value_info[:]
    onnx.save(half, static)
    quantize_dynamic(
        static,
        path,
        op_types_to_quantize=_PRODUCTS,
        per_channel=per_channel,
        reduce_range=reduce_range,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=skipped,
        extra_options={"MatMulConstBOnly": True},
    )


def products(graph: Any) -> tuple[list[str], list[str]]:
    """Names of the operators that hold a weight, and of the matrix products that hold none (attention's two)."""
    weights = {weight.name for weight in graph.graph.initializer}
    weighted, free = [], []
    for node in graph.graph.node:
        if node.op_type in _WEIGHTED:
            holds = node.input[1] in weights or (node.op_type == "MatMul" and node.input[0] in weights)
            (weighted if holds else free).append(node.name)
    return weighted, free


def _int8_weighted(graph: Any) -> int:
    """How many operators read an int8 weight in a quantized graph."""
    from onnx import TensorProto

    int8 = {weight.name for weight in graph.graph.initializer if weight.data_type == TensorProto.INT8}
    matrices = {w.name for w in graph.graph.initializer if w.name in int8 and len(w.dims) >= 2}
    held = {
        node.output[0] for node in graph.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in matrices
    }
    return sum(
        (node.op_type in _WEIGHTED and any(name in held for name in node.input))
        or (node.op_type in ("MatMulInteger", "ConvInteger") and any(name in matrices for name in node.input))
        for node in graph.graph.node
    )


def _int8_overflows() -> bool:
    """Whether this CPU multiplies int8 pairs into 16 bits, which overflow: x86 without VNNI, or unknown x86."""
    if platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686"):
        return False
    try:
        return "vnni" not in Path("/proc/cpuinfo").read_text()
    except OSError:
        return True


def _words(per_channel: bool, method: str, dynamic_products: bool, reduce_range: bool) -> str:
    weights = f"{'7-bit' if reduce_range else 'int8'} weights per {'channel' if per_channel else 'tensor'}"
    ranges = f"static uint8 activations ({method} calibration)"
    if dynamic_products:
        ranges += ", dynamic ones for matrix products"
    return f"ONNX Runtime QDQ, {weights}, {ranges}; attention products, softmax and normalization in float"

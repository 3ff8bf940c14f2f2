"""OpenVINO: int8 by NNCF, and a runner for its files and for ONNX files; the fastest runtime measured on x86 CPUs.

Needs the extra `vitalloy[openvino]`. NNCF corrects biases, and graphs with a softmax get its transformer mode. Two
departures from its defaults:

- The transformer mode would divide activations by the range of each channel and multiply the weights by it
  (SmoothQuant, Xiao et al. 2023, arXiv 2211.10438). Without outliers among the channels this only coarsens the weights
  (an untrained DeiT-Ti: cosine of the logits' deviations 0.93 with it, 0.99 without) and costs time: one asks for it.
- The input of a depthwise convolution would get a scale a channel. Where a matrix product comes before, as in the
  perceptrons of PVT v2, OpenVINO then leaves the convolution in float: PVT v2-b0 took 1.2 times as long.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitalloy.deployment._common import quiet, reason, written_whole
from vitalloy.deployment.int8 import CalibrationImages, Int8Export, float_graph, products
from vitalloy.errors import ExportError

_WEIGHTED = {"MatMul", "Convolution", "GroupConvolution"}
PRECISIONS = ("f32", "bf16", "f16")


def quantize_openvino(
    onnx_path: str | Path,
    path: str | Path,
    batches: Iterable[Any],
    *,
    smooth: bool = False,
    limit: int = 300,
) -> Int8Export:
    """Quantize a float ONNX file into an OpenVINO model: 8-bit weights per channel, static 8-bit activations.

    Args:
        onnx_path: a file that `export_onnx` wrote.
        path: the `.xml` file to write; the weights go beside it as `.bin`. Existing ones are replaced, and only by
            complete ones.
        batches: real images as the model takes them (training images, a hundred or more): tensors or arrays (B, C, H,
            W), or tuples that start with one. Read once, kept in memory.
        smooth: SmoothQuant, for models whose activations have channels far larger than the others.
        limit: images at most.

    Raises:
        ExportError: the extra is not installed, no images, images that do not fit the file, a file that is no float
            ONNX model, or a path that does not end in .xml.
    """
    openvino, nncf = _tools()
    onnx_path, path = Path(onnx_path), Path(path)
    if path.suffix != ".xml":
        raise ExportError(f"An OpenVINO model is a .xml file with a .bin beside it: {path} does not end in .xml.")
    graph = float_graph(onnx_path)
    attends = any(node.op_type == "Softmax" for node in graph.graph.node)
    reader = CalibrationImages(onnx_path, graph, batches, one_by_one=True)
    images = [next(iter(image.values())) for image, _ in zip(reader, range(limit), strict=False)]
    per_tensor = nncf.quantization.advanced_parameters.QuantizationParameters(per_channel=False)
    options = nncf.AdvancedQuantizationParameters(activations_quantization_params=per_tensor)
    if not smooth:
        options.smooth_quant_alphas = nncf.AdvancedSmoothQuantParameters(matmul=-1)
    with written_whole(path) as unfinished:
        try:
            with quiet():
                model = openvino.Core().read_model(onnx_path)
                _fold(model)
                model = nncf.quantize(
                    model,
                    nncf.Dataset(images),
                    preset=nncf.QuantizationPreset.MIXED,
                    model_type=nncf.ModelType.TRANSFORMER if attends else None,
                    subset_size=len(images),
                    advanced_parameters=options,
                )
                openvino.save_model(model, unfinished, compress_to_fp16=False)
        except Exception as error:  # NNCF raises whatever its steps raise
            raise ExportError(f"{onnx_path} could not be quantized by NNCF: {reason(error)}.") from error
        os.replace(unfinished.with_suffix(".bin"), path.with_suffix(".bin"))
    return Int8Export(
        path=path,
        size_bytes=path.stat().st_size + path.with_suffix(".bin").stat().st_size,
        fp32_size_bytes=onnx_path.stat().st_size,
        calibration_images=len(images),
        quantized=_int8_weighted(model),
        weighted=len(products(graph)[0]),
        method=f"OpenVINO int8 by NNCF, weights per channel, static activations{', SmoothQuant' * smooth}",
    )


class OpenVinoModel:
    """A model file as a callable: images in, logits out, on OpenVINO's CPU device.

    The first call with a batch of another size compiles for that size: fixed shapes ran up to twice as fast as free
    ones.

    Args:
        path: an `.xml` or an `.onnx` file, float or with Q/DQ pairs.
        threads: for the whole model; None takes PyTorch's count, so that the two compare like with like.
        precision: of what is not integer: "f32", or "bf16" and "f16" on CPUs that have them. OpenVINO by itself would
            choose bf16 silently.

    Raises:
        ExportError: the extra is not installed, the file is missing or damaged, or a batch does not fit it.
    """

    def __init__(self, path: str | Path, threads: int | None = None, precision: str = "f32") -> None:
        openvino, _ = _tools(quantizer=False)
        self.path = Path(path)
        if not self.path.is_file():
            raise ExportError(f"There is no model file at {self.path}. Export the model first.")
        if precision not in PRECISIONS:
            raise ExportError(f"There is no precision {precision!r}: use one of {', '.join(PRECISIONS)}.")
        self._core = openvino.Core()
        self._options = {
            "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision,
        }
        try:
            self._model = self._core.read_model(self.path)
        except Exception as error:  # the runtime's own exception types are private
            raise ExportError(f"{self.path} cannot be loaded by OpenVINO: {reason(error)}.") from error
        self._shape = [None if size.is_dynamic else size.get_length() for size in self._model.input(0).partial_shape]
        self._requests: dict[tuple[int, ...], Any] = {}

    @property
    def batch(self) -> int | None:
        """How many images one call takes; None is any number."""
        return self._shape[0]

    def __call__(self, images: torch.Tensor | np.ndarray) -> torch.Tensor:
        """Images (B, C, H, W) -> logits (B, classes), on the CPU."""
        if isinstance(images, torch.Tensor):
            images = images.detach().cpu().float().numpy()
        images = np.ascontiguousarray(images, dtype=np.float32)
        if len(self._shape) != images.ndim or any(
            want not in (None, have) for want, have in zip(self._shape, images.shape, strict=True)
        ):
            wanted = ", ".join("batch" if size is None else str(size) for size in self._shape)
            raise ExportError(f"{self.path.name} takes images of shape ({wanted}), not {images.shape}.")
        try:
            if images.shape not in self._requests:
                self._requests[images.shape] = self._compiled(images.shape)
            return torch.from_numpy(self._requests[images.shape].infer({0: images})[0].copy())
        except Exception as error:
            raise ExportError(f"{self.path} failed to run: {reason(error)}.") from error

    def _compiled(self, shape: tuple[int, ...]) -> Any:
        model = self._model.clone()
        model.reshape(list(shape))
        return self._core.compile_model(model, "CPU", self._options).create_infer_request()


def _tools(quantizer: bool = True) -> tuple[Any, Any]:
    """OpenVINO and NNCF; importing them leaves the logging of the process as it was."""
    try:
        with quiet():
            import openvino

            if not quantizer:
                return openvino, None
            import nncf
    except ImportError as error:
        raise ExportError(f"OpenVINO is not installed ({error}): pip install 'vitalloy[openvino]'.") from error
    return openvino, nncf


def _fold(model: Any) -> None:
    """Compute constants now: NNCF leaves the weights of grouped convolutions in float behind a reshape."""
    from openvino.passes import ConstantFolding, Manager

    manager = Manager()
    manager.register_pass(ConstantFolding())
    manager.run_passes(model)


def _int8_weighted(model: Any) -> int:
    """How many products and convolutions read an 8-bit constant."""
    return sum(_is_int8(node.input_value(1)) for node in model.get_ops() if node.get_type_name() in _WEIGHTED)


def _is_int8(output: Any) -> bool:
    node = output.get_node()
    while node.get_type_name() != "Constant":
        if node.get_input_size() == 0:
            return False
        node = node.input_value(0).get_node()
    return node.get_element_type().get_type_name() in ("i8", "u8")

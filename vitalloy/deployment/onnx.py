"""ONNX: export a model into one file, run it, and prove that it computes what the model computes.

The graph comes from `torch.export`. The input is called "image", the output "logits", and the first axis of both is
"batch".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vitalloy.deployment._common import at_rest, deployable, example_batch, quiet, reason, written_whole
from vitalloy.deployment._layout import products_on_maps
from vitalloy.errors import ExportError
from vitalloy.layers.attention import Attend

OLDEST_OPSET = 18  # what the exporter writes without converting down
INPUT, OUTPUT, BATCH_AXIS = "image", "logits", "batch"


@dataclass(frozen=True)
class OnnxExport:
    """An ONNX file: where it is, its operator set version and its size."""

    path: Path
    opset: int
    size_bytes: int


@dataclass(frozen=True)
class Verification:
    """An export held against its model: largest difference of a logit, share of equal answers, number of images."""

    max_abs_diff: float
    agreement: float
    images: int


def export_onnx(
    model: nn.Module,
    example: torch.Tensor,
    path: str | Path,
    *,
    opset: int | None = None,
    dynamic_batch: bool = True,
) -> OnnxExport:
    """Write `model`, as it computes in eval mode, to one ONNX file with its weights inside.

    Args:
        model: takes (B, C, H, W) and returns one tensor; keeps its training flags.
        example: a batch of the image size to export for; its values do not matter.
        path: the file; an existing one is replaced, and only by a complete one.
        opset: operator set version, at least 18; None leaves it to PyTorch (20 writes GELU as one node).
        dynamic_batch: let the file take any number of images. Otherwise it takes as many as `example` holds.

    Raises:
        ExportError: when the model cannot be traced or the file cannot be written.
    """
    path = Path(path)
    if opset is not None and opset < OLDEST_OPSET:
        raise ExportError(f"ONNX opset {opset} is too old: use {OLDEST_OPSET} or later, or leave it out.")
    graph = traced(model, opened, example, opset, dynamic_batch)
    return OnnxExport(path, _opset(graph), saved(graph, path, type(model).__name__))


def traced(
    model: nn.Module,
    prepare: Callable[[nn.Module], nn.Module],
    example: torch.Tensor,
    opset: int | None,
    dynamic_batch: bool,
) -> Any:
    """What `prepare(model)` computes at rest, as an ONNX model."""
    example = example_batch(model, example, least=2 if dynamic_batch else 1)  # an axis of 1 would stay 1
    shapes = ({0: torch.export.Dim(BATCH_AXIS)},) if dynamic_batch else None
    try:
        with at_rest(model), quiet():
            program = torch.onnx.export(
                prepare(model),
                (example,),
                dynamo=True,
                input_names=[INPUT],
                output_names=[OUTPUT],
                opset_version=opset,
                dynamic_shapes=shapes,
                external_data=False,
                verbose=False,
            )
            graph = program.model_proto
    except ExportError:
        raise
    except Exception as error:  # any model code may run here, so anything may be raised
        hint = " Try dynamic_batch=False." if dynamic_batch else ""
        raise ExportError(f"{type(model).__name__} could not be exported to ONNX: {reason(error)}.{hint}") from error
    _forget_source(graph)
    _turn_weights(graph.graph)
    if products_on_maps(graph.graph):
        del graph.graph.value_info[:]  # shapes of the maps as they were
    return graph


def saved(graph: Any, path: Path, name: str) -> int:
    """Write an ONNX model whole; returns its bytes."""
    import onnx

    with written_whole(path) as unfinished:
        try:
            onnx.save(graph, unfinished)
        except ValueError as error:  # protobuf ends at 2 GB
            raise ExportError(f"{name} does not fit into one ONNX file: {reason(error)}.") from error
    return path.stat().st_size


class OnnxModel:
    """An ONNX file as a callable: images in, logits out, on ONNX Runtime.

    Args:
        path: the file.
        threads: threads within an operator; None takes PyTorch's count, so that the two compare like with like.
        providers: ONNX Runtime execution providers, best first.
        spinning: idle threads wait busily for the next operator. Faster where this is the only session in use; several
            in turns take the processor from each other.

    Raises:
        ExportError: when the file is missing or damaged, or a batch does not fit it.
    """

    def __init__(
        self,
        path: str | Path,
        threads: int | None = None,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        spinning: bool = True,
    ) -> None:
        import onnxruntime

        self.path = Path(path)
        if not self.path.is_file():
            raise ExportError(f"There is no ONNX file at {self.path}. Export the model first.")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
        try:
            self.session = onnxruntime.InferenceSession(str(self.path), options, providers=list(providers))
        except Exception as error:  # the runtime's own exception types are private
            raise ExportError(f"{self.path} cannot be loaded by ONNX Runtime: {reason(error)}.") from error
        self._input = self.session.get_inputs()[0]

    @property
    def batch(self) -> int | None:
        """How many images one call takes; None is any number."""
        return _fixed(self._input.shape[0])

    def __call__(self, images: torch.Tensor | np.ndarray) -> torch.Tensor:
        """Images (B, C, H, W) -> logits (B, classes), on the CPU."""
        if isinstance(images, torch.Tensor):
            images = images.detach().cpu().float().numpy()
        images = np.ascontiguousarray(images, dtype=np.float32)
        expected = self._input.shape
        if len(expected) != images.ndim or any(
            _fixed(want) not in (None, have) for want, have in zip(expected, images.shape, strict=True)
        ):
            raise ExportError(
                f"{self.path.name} takes images of shape ({', '.join(map(str, expected))}), not {images.shape}."
            )
        try:
            return torch.from_numpy(self.session.run(None, {self._input.name: images})[0])
        except Exception as error:
            raise ExportError(f"{self.path} failed to run: {reason(error)}.") from error


def verify_onnx(
    model: nn.Module,
    path: str | Path | OnnxModel,
    batches: Iterable[Any],
    *,
    tolerance: float | None = 1e-3,
) -> Verification:
    """Hold an ONNX file against the model it came from.

    Args:
        model: the PyTorch model; run in eval mode on its own device.
        path: the file, or an `OnnxModel` already open.
        batches: real images as the model takes them, tensors (B, C, H, W) or tuples that start with one.
        tolerance: the largest difference of a logit that passes; None only measures, for a file that is meant to
            differ (int8).

    Raises:
        ExportError: beyond the tolerance, or without images.
    """
    exported = path if isinstance(path, OnnxModel) else OnnxModel(path)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    worst, equal, images = 0.0, 0, 0
    with at_rest(model):
        for batch in batches:
            batch = batch[0] if isinstance(batch, (tuple, list)) else batch
            ours, theirs = model(batch.to(device)).float().cpu(), exported(batch)
            if ours.shape != theirs.shape:
                raise ExportError(
                    f"{exported.path} returns {tuple(theirs.shape)} where the model returns {tuple(ours.shape)}."
                )
            difference = (ours - theirs).abs().max().item()
            worst = difference if not difference <= worst else worst  # lets a NaN through
            equal += (ours.argmax(-1) == theirs.argmax(-1)).sum().item()
            images += ours.argmax(-1).numel()
    if images == 0:
        raise ExportError(f"{exported.path} cannot be verified without images: pass at least one batch.")
    if tolerance is not None and not worst <= tolerance:
        raise ExportError(
            f"{exported.path} does not compute what {type(model).__name__} computes: logits differ by up to "
            f"{worst:.3g} (tolerance {tolerance:g}), answers agree on {equal} of {images} images."
        )
    return Verification(worst, equal / images, images)


class _OpenAttend(Attend):
    """Attention in its plain terms: the exporter writes the fused one with a scale on both factors."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None, bias: Any = None
    ) -> torch.Tensor:
        logits = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        return (logits if bias is None else logits + bias).softmax(-1) @ v


def opened(model: nn.Module) -> nn.Module:
    """What to write into a graph: see `deployable`; attention opened where the copy is ours."""
    own = deployable(model)
    if own is not model:
        for layer in own.modules():
            if type(layer) is Attend:
                layer.__class__ = _OpenAttend
    return own


def _fixed(size: Any) -> int | None:
    return size if isinstance(size, int) else None


def _opset(graph: Any) -> int:
    return next(entry.version for entry in graph.opset_import if entry.domain in ("", "ai.onnx"))


def _forget_source(graph: Any) -> None:
    """Drop the exporter's stack trace of each node: they hold local file paths and swell small files."""
    parts = [graph.graph, *graph.functions]
    for part in parts:
        del part.metadata_props[:]
        for node in part.node:
            del node.metadata_props[:]
            node.doc_string = ""
        for info in part.value_info:
            del info.metadata_props[:]
    for info in [*graph.graph.input, *graph.graph.output, *graph.graph.initializer]:
        del info.metadata_props[:]
    del graph.metadata_props[:]


def _turn_weights(graph: Any) -> None:
    """Replace each transposition of a weight by the transposed weight.

    The exporter does so itself, but not where a module is called twice; and only a weight can be quantized.
    """
    from onnx import numpy_helper

    weights, turned = {w.name: w for w in graph.initializer}, {}
    for node in [n for n in graph.node if n.op_type == "Transpose" and n.input[0] in weights]:
        order = next((tuple(a.ints) for a in node.attribute), None)
        if (node.input[0], order) not in turned:
            name = f"{node.input[0]}_{len(turned)}_turned"
            array = np.ascontiguousarray(numpy_helper.to_array(weights[node.input[0]]).transpose(order))
            graph.initializer.append(numpy_helper.from_array(array, name))
            turned[node.input[0], order] = name
        for user in graph.node:
            for i, used in enumerate(user.input):
                if used == node.output[0]:
                    user.input[i] = turned[node.input[0], order]
        graph.node.remove(node)
    used = {name for node in graph.node for name in node.input}
    for name in {name for name, _ in turned} - used:
        graph.initializer.remove(weights[name])

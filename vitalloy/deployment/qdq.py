"""Q/DQ: a quantized model with its own scales as one ONNX file, which runtimes compute on integers.

Each layer that rounds to equal steps (`vitalloy.compression`) is written as QuantizeLinear and DequantizeLinear around
its inputs, and its weight as 8-bit or 4-bit integers. ONNX Runtime and OpenVINO turn such pairs into integer kernels.

The file computes what the simulation computes, with one exception that `calibration` turns on: ONNX Runtime has
integer convolutions only where the result is rounded to 8 bits too, which the simulation does not do.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitalloy.deployment._common import at_rest, example_batch
from vitalloy.deployment.onnx import OnnxExport, saved, traced
from vitalloy.errors import ExportError

OPSET = 21  # the first with 4-bit integers
_PLACES = (
    "input_quantizer",
    "weight_quantizer",
    "query_quantizer",
    "key_quantizer",
    "map_quantizer",
    "value_quantizer",
)
_INT4 = "_int4"  # ends the names of buffers that are stored in 4 bits


@dataclass(frozen=True)
class QdqExport(OnnxExport):
    """A file with integer layers.

    `integer` names the layers that multiply integers; `simulated` those that keep at least one factor in float,
    rounded as the model rounds it, because its grid is none of ONNX's (log steps, two ranges, more than 8 bits, a step
    for each row of an activation, or no rounding at all).
    """

    integer: tuple[str, ...]
    simulated: tuple[str, ...]


def export_qdq(
    model: nn.Module,
    example: Tensor,
    path: str | Path,
    *,
    calibration: Tensor | None = None,
    dynamic_batch: bool = True,
    strict: bool = False,
) -> QdqExport:
    """Write a simulated model, such as `vitalloy.compression.quantization.quantize` returns, for integer kernels.

    Args:
        model: takes (B, C, H, W) and returns one tensor.
        example: a batch of the image size to export for; its values do not matter.
        path: the file; an existing one is replaced, and only by a complete one.
        calibration: real images (N, C, H, W). With them the results of integer convolutions are rounded to 8 bits
            over the range seen, which ONNX Runtime needs to compute them on integers: each then differs from the
            simulation by half a step of its result. Without them they stay float, exact and, in ONNX Runtime, slow;
            OpenVINO does not need it.
        dynamic_batch: let the file take any number of images. Otherwise it takes as many as `example` holds.
        strict: refuse a model that has a layer to simulate.

    Raises:
        ExportError: no layer on a grid of equal steps; with `strict`, any layer without; a model that cannot be traced
            or a file that cannot be written.
    """
    path = Path(path)
    layers = {name: layer for name, layer in model.named_modules() if _rounds(layer)}
    if not layers:
        raise ExportError(
            f"{type(model).__name__} has no layer with quantizers: quantize it first, or use export_onnx."
        )
    ranges = {} if calibration is None else _results(model, layers, calibration)
    integer, simulated = [], []

    def prepare(model: nn.Module) -> nn.Module:
        own = copy.deepcopy(model)
        named = dict(own.named_modules())
        for name in layers:
            (integer if _write(named[name], ranges.get(name)) else simulated).append(name)
        if not integer:
            raise ExportError(f"No layer of {type(model).__name__} multiplies two factors of equal steps.")
        if strict and simulated:
            raise ExportError(
                f"ONNX has no integers for the grids of layer {', '.join(simulated[:3])}"
                f"{' and others' * (len(simulated) > 3)}: leave `strict` out to have them computed in float."
            )
        return own

    graph = traced(model, prepare, example, OPSET, dynamic_batch)
    _turn_codes(graph.graph)
    _drop_double_rounding(graph.graph)
    _pack(graph.graph)
    size = saved(graph, path, type(model).__name__)
    return QdqExport(path, OPSET, size, tuple(integer), tuple(simulated))


class Codes(nn.Module):
    """A weight as integers: takes the weight, which it ignores, and returns its dequantized codes."""

    def __init__(self, codes: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> None:
        super().__init__()
        self.name = f"codes{_INT4}" if bits <= 4 else "codes"
        self.register_buffer(self.name, codes.to(torch.int8))
        self.register_buffer("scale", scale.clone())
        self.register_buffer("zero_point", zero_point.to(torch.int8))

    def forward(self, weight: Tensor) -> Tensor:
        parts = (getattr(self, self.name), self.scale, self.zero_point)
        return _symbolic("DequantizeLinear", parts, weight.shape, torch.float32, {"axis": 0})


class Grid(nn.Module):
    """An activation to unsigned 8-bit codes and back; fewer codes than 256 by clipping first."""

    def __init__(self, scale: Tensor, zero_point: Tensor, last: int) -> None:
        super().__init__()
        self.clip = last < 255
        self.register_buffer("scale", scale.reshape(()).clone())
        self.register_buffer("zero_point", zero_point.reshape(()).to(torch.uint8))
        self.low, self.high = (((end - zero_point) * scale).item() for end in (0, last))

    def forward(self, x: Tensor) -> Tensor:
        if self.clip:
            x = x.clamp(self.low, self.high)
        codes = _symbolic("QuantizeLinear", (x, self.scale, self.zero_point), x.shape, torch.uint8)
        return _symbolic("DequantizeLinear", (codes, self.scale, self.zero_point), x.shape, torch.float32)


def _symbolic(
    operator: str, inputs: tuple[Tensor, ...], shape: Any, dtype: torch.dtype, attributes: dict[str, int] | None = None
) -> Tensor:
    return torch.onnx.ops.symbolic(operator, inputs, attributes or {}, dtype=dtype, shape=shape, version=OPSET)


def _rounds(layer: nn.Module) -> bool:
    return any(not isinstance(getattr(layer, place, None), nn.Identity | None) for place in _PLACES)


def _write(layer: nn.Module, result: tuple[float, float] | None) -> bool:
    """Put what exports into the sockets of a layer; whether all of them got integers."""
    integers = []
    for place in (place for place in _PLACES if hasattr(layer, place)):
        quantizer = getattr(layer, place)
        if place == "weight_quantizer":
            made = _codes(quantizer, layer.weight)
            if made is None:  # rounded once, here, instead of in every call
                layer.weight = nn.Parameter(quantizer(layer.weight).detach(), requires_grad=False)
                setattr(layer, place, nn.Identity())
        else:
            made = _grid(quantizer)
        integers.append(made is not None)
        if made is not None:
            setattr(layer, place, made)
    if result is not None and all(integers):
        low, high = min(result[0], 0.0), max(result[1], 0.0)
        scale = torch.tensor(max((high - low) / 255, 1e-8))
        grid = Grid(scale, (-low / scale).round(), 255)
        layer.register_forward_hook(lambda layer, args, output: layer.result_grid(output))
        layer.result_grid = grid
    return all(integers)


def _equal_steps(quantizer: nn.Module) -> bool:
    return all(hasattr(quantizer, name) for name in ("bits", "scale", "zero_point", "low", "high", "codes"))


def _codes(quantizer: nn.Module, weight: Tensor) -> Codes | None:
    """A weight's integers, shifted to be signed; None where no 8-bit integers give the same values."""
    if not _equal_steps(quantizer) or quantizer.bits > 8:
        return None
    scale, zero_point = quantizer.scale.detach(), quantizer.zero_point.detach().round()
    if scale.numel() > 1 and scale.numel() != scale.shape[0]:
        return None  # steps along another axis than that of the results
    shift = quantizer.low + 2 ** (quantizer.bits - 1)
    codes, zero_point = quantizer.codes(weight).detach() - shift, zero_point - shift
    scale, zero_point = (part.flatten().expand(len(weight)) for part in (scale, zero_point))
    storage = 8 if zero_point.min() < -8 or zero_point.max() > 7 else quantizer.bits
    if zero_point.min() < -128 or zero_point.max() > 127:
        return None
    rows = (-1, *[1] * (weight.ndim - 1))
    same = torch.allclose((codes - zero_point.view(rows)) * scale.view(rows), quantizer(weight), rtol=1e-5, atol=0)
    return Codes(codes, scale, zero_point, storage) if same else None


def _grid(quantizer: nn.Module) -> Grid | None:
    """An activation's grid, shifted to be unsigned; None where no 8-bit integers give the same values."""
    if not _equal_steps(quantizer) or quantizer.bits > 8 or quantizer.scale.numel() != 1:
        return None
    zero_point = quantizer.zero_point.detach().round() - quantizer.low
    scale = quantizer.scale.detach()
    if not 0 <= zero_point.item() <= 255:
        return None
    last = quantizer.high - quantizer.low
    probe = scale.reshape(()) * torch.linspace(-0.6 * last, 1.6 * last, 4 * last + 3).to(scale)
    ours = ((probe / scale.reshape(())).round() + zero_point.reshape(())).clamp(0, last) - zero_point.reshape(())
    same = torch.allclose(ours * scale.reshape(()), quantizer(probe), rtol=1e-5, atol=0)
    return Grid(scale, zero_point, last) if same else None


def _results(model: nn.Module, layers: dict[str, nn.Module], images: Tensor) -> dict[str, tuple[float, float]]:
    """The range of each convolution's results over the calibration images."""
    ranges: dict[str, tuple[float, float]] = {}
    convolutions = {layer: name for name, layer in layers.items() if isinstance(layer, nn.Conv2d)}

    def note(layer: nn.Module, args: Any, output: Tensor) -> None:
        low, high = ranges.get(convolutions[layer], (0.0, 0.0))
        ranges[convolutions[layer]] = (min(low, output.min().item()), max(high, output.max().item()))

    hooks = [layer.register_forward_hook(note) for layer in convolutions]
    try:
        with at_rest(model):
            for batch in example_batch(model, images, least=1).split(8):
                model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return ranges


def _turn_codes(graph: Any) -> None:
    """Replace each transposition of a dequantized weight by the transposed codes."""
    from onnx import helper, numpy_helper

    weights = {weight.name: weight for weight in graph.initializer}
    makers = {node.output[0]: node for node in graph.node}
    for node in [n for n in graph.node if n.op_type == "Transpose"]:
        source = makers.get(node.input[0])
        if source is None or source.op_type != "DequantizeLinear" or source.input[0] not in weights:
            continue
        order = [*next(a.ints for a in node.attribute)]
        name = f"{source.input[0].removesuffix(_INT4)}_turned{_INT4 * source.input[0].endswith(_INT4)}"
        if name not in weights:
            codes = np.ascontiguousarray(numpy_helper.to_array(weights[source.input[0]]).transpose(order))
            weights[name] = numpy_helper.from_array(codes, name)
            graph.initializer.append(weights[name])
        turned = helper.make_node(
            "DequantizeLinear", [name, *source.input[1:]], list(node.output), name=node.name, axis=order.index(0)
        )
        graph.node.insert([*graph.node].index(node), turned)
        graph.node.remove(node)
    _drop_unused(graph)


def _drop_double_rounding(graph: Any) -> None:
    """Where only another QuantizeLinear reads a convolution's rounded result, round once."""
    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    makers = {node.output[0]: node for node in graph.node}
    for again in [n for n in graph.node if n.op_type == "QuantizeLinear"]:
        back = makers.get(again.input[0])
        first = makers.get(back.input[0]) if back is not None and back.op_type == "DequantizeLinear" else None
        if first is not None and len(users[back.output[0]]) == 1 and makers[first.input[0]].op_type == "Conv":
            again.input[0] = first.input[0]
    _drop_unused(graph)


def _drop_unused(graph: Any) -> None:
    kept = {entry.name for entry in graph.output}
    for node in [*graph.node][::-1]:
        if kept.isdisjoint(node.output):
            graph.node.remove(node)
        else:
            kept.update(node.input)
    for weight in [w for w in graph.initializer if w.name not in kept]:
        graph.initializer.remove(weight)


def _pack(graph: Any) -> None:
    """Store marked integers in 4 bits, and widen them when the file is loaded: integer kernels multiply 8 bits."""
    from onnx import TensorProto, helper, numpy_helper

    for weight in [w for w in graph.initializer if w.name.endswith(_INT4)]:
        codes = numpy_helper.to_array(weight).flatten()
        codes = np.append(codes, np.zeros(codes.size % 2, codes.dtype)).view(np.uint8) & 15
        packed = TensorProto(name=weight.name, data_type=TensorProto.INT4, dims=weight.dims)
        packed.raw_data = (codes[0::2] | codes[1::2] << 4).tobytes()
        graph.initializer.remove(weight)
        graph.initializer.append(packed)
        wide = f"{weight.name}_wide"
        for node in graph.node:
            for i, name in enumerate(node.input):
                if name == weight.name:
                    node.input[i] = wide
        graph.node.insert(0, helper.make_node("Cast", [weight.name], [wide], name=wide, to=TensorProto.INT8))

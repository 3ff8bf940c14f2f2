"""From a frozen simulation to the integer runtime: `to_integer`.

The simulation runs once in float64, and what every grid and constant is then makes the runtime's layers. From the
quantization of the image to the scaling of the logits the runtime computes with integers alone, and gives exactly the
integers of the float64 simulation.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from vitalloy.compression.quantization.i_vit import arithmetic, layers, runtime
from vitalloy.compression.quantization.i_vit.operations import IntegerModel
from vitalloy.errors import CompressionError


@dataclass
class Known:
    """What is known beforehand of an integer value: its scale, its largest magnitude, its shape for two images."""

    scale: Tensor
    bound: int
    shape: torch.Size


@dataclass
class Made:
    """A layer of the runtime, or the integers of a constant; and the largest magnitude that comes out."""

    layer: nn.Module | Tensor | None  # None: the integers stay as they are
    bound: int


MAKERS: dict[type[nn.Module], Callable[..., Made]] = {}


def maker(kind: type[nn.Module]) -> Callable[[Callable[..., Made]], Callable[..., Made]]:
    def register(function: Callable[..., Made]) -> Callable[..., Made]:
        MAKERS[kind] = function
        return function

    return register


def rescale(x: Known, target: Tensor) -> runtime.Rescale:
    return runtime.Rescale(x.scale.double() / target.float().double(), x.bound)


@maker(layers.QuantAct)
def quant_act(layer: layers.QuantAct, x: Known | Tensor | None, identity: Known | None = None) -> Made:
    bound = 2 ** (layer.bits - 1)
    if isinstance(x, Tensor):
        return Made(arithmetic.quantize(x, layer.scale, layer.bits).to(runtime.stored(layer.bits)), bound)
    if x is None:
        return Made(runtime.Quantize(layer.scale, layer.bits), bound)
    addends = [rescale(v, layer.scale) for v in (x, identity) if v is not None]
    return Made(runtime.Requantize(addends, layer.bits), bound)


@maker(layers.Together)
def together(layer: layers.Together, *values: Known) -> Made:
    each = [runtime.Requantize([rescale(v, layer.scale)], layer.bits) for v in values]
    return Made(runtime.RequantizeEach(each), 2 ** (layer.bits - 1))


def weights(layer: layers.QuantLinear | layers.QuantConv, x: Known) -> tuple[Tensor, Tensor | None, int]:
    weight, bias, _ = layer.constants(x.scale)
    bound = weight.flatten(1).abs().sum(1) * x.bound + (0 if bias is None else bias.abs())
    if bound.max() >= 2**31:
        raise CompressionError("A layer's sums do not fit 32 bits: its bias is too large for its weights.")
    return weight, bias, int(bound.max())


@maker(layers.QuantLinear)
def linear(layer: layers.QuantLinear, x: Known) -> Made:
    weight, bias, bound = weights(layer, x)
    return Made(runtime.Linear(weight, bias), bound)


@maker(layers.QuantConv)
def conv(layer: layers.QuantConv, x: Known) -> Made:
    weight, bias, bound = weights(layer, x)
    return Made(runtime.Conv(weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups), bound)


@maker(layers.QuantMatMul)
def matmul(layer: layers.QuantMatMul, a: Known, b: Known) -> Made:
    return Made(runtime.MatMul(), a.bound * b.bound * a.shape[-1])


@maker(layers.Shiftmax)
def shiftmax(layer: layers.Shiftmax, x: Known) -> Made:
    scale = x.scale.double()
    saturated = -arithmetic.SHIFTMAX_SHIFT * torch.floor(-1 / scale)  # beyond, all exponentials are the same
    length = int(min(saturated, torch.tensor(2.0 * x.bound))) + 1
    table = arithmetic.shift_exp(-torch.arange(length, dtype=torch.float64), scale, arithmetic.SHIFTMAX_SHIFT)
    return Made(runtime.Shiftmax(table, layer.bits, layer.word), 2 ** (layer.bits - 1))


@maker(layers.ShiftGate)
def gate(layer: layers.ShiftGate, x: Known) -> Made:
    whole = torch.arange(-128, 128, dtype=torch.float64)
    table = arithmetic.shift_sigmoid(
        whole[None], layer.factor * x.scale.double(), layer.bits, word=layer.word, largest=whole[:, None]
    )
    table = (table * whole if layer.keep else table).flatten().clamp(1 - 2.0**31, 2.0**31 - 1)
    return Made(runtime.Gate(table), int(table.abs().max()))


@maker(layers.QuantNorm)
def norm(layer: layers.QuantNorm, x: Known) -> Made:
    dims = layer.dims(len(x.shape))
    count = math.prod(x.shape[d] for d in dims)
    shift, _ = layer.constants(arithmetic.norm_unit(count), len(x.shape), x.scale)
    return Made(runtime.Norm(shift, dims, count), 2**31 + int(shift.abs().max()))


@maker(layers.Scale)
def scale(layer: layers.Scale, x: Known, constant: Tensor | float) -> Made:
    return Made(None, x.bound)


@maker(layers.Product)
def product(layer: layers.Product, a: Known, b: Known) -> Made:
    return Made(runtime.Product(), a.bound * b.bound)


@maker(layers.Rectify)
def rectify(layer: layers.Rectify, x: Known) -> Made:
    return Made(runtime.Rectify(x.scale.sign().int()), x.bound)


@maker(layers.Sum)
def sum_(layer: layers.Sum, x: Known) -> Made:
    count = math.prod(x.shape[d] for d in layer.dims)
    if layer.mean and layer.rounded:
        return Made(runtime.Sum(layer.dims, layer.keepdim, count), x.bound)
    return Made(runtime.Sum(layer.dims, layer.keepdim), x.bound * count)


@maker(layers.Pool)
def pool(layer: layers.Pool, x: Known) -> Made:
    return Made(runtime.Pool(layer.size, layer.stride, layer.padding), x.bound * math.prod(layer.size))


@maker(layers.Adopt)
@maker(layers.Mask)
def adopt(layer: layers.Adopt | layers.Mask, x: Tensor, like: Known) -> Made:
    whole = (layer(x.double(), (x.new_zeros(1), like.scale.double())) / like.scale.double()).round()
    bound = int(whole.abs().max())
    return Made(whole.to(torch.int8 if max(bound, like.bound) <= 127 else torch.int32), bound)


@maker(layers.Leave)
def leave(layer: layers.Leave, x: Known) -> Made:
    return Made(runtime.Dequantize(x.scale), x.bound)


class _Record(fx.Interpreter):
    """Keeps what every node gives."""

    def __init__(self, model: fx.GraphModule) -> None:
        super().__init__(model)
        self.seen: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.seen[n] = super().run_node(n)
        return self.seen[n]


def in_double(model: IntegerModel) -> IntegerModel:
    """A copy of a converted model that computes in float64."""
    made = copy.deepcopy(model).double().eval()
    for node in made.graph.nodes:
        node.args, node.kwargs = (
            fx.node.map_aggregate(x, lambda v: torch.float64 if v is torch.float32 else v)
            for x in (node.args, node.kwargs)
        )
    made.recompile()
    for act in made.modules():
        if isinstance(act, layers.QuantAct):
            act.set_scale(act.scale.item())
    return made


@torch.no_grad()
def to_integer(model: IntegerModel) -> fx.GraphModule:
    """The integer runtime of a converted and calibrated model: images -> logits, float32.

    Raises:
        CompressionError: a grid that has no scale yet, or sums beyond 32 bits.
    """
    for name, act in model.named_modules():
        if isinstance(act, layers.QuantAct) and not act.scale.item() > 0:
            raise CompressionError(f"The grid {name} has no scale yet: run the model on calibration images first.")
    exact = in_double(model).cpu()
    record = _Record(exact)
    record.run(torch.zeros(2, *exact.image_shape, dtype=torch.float64))
    return _Assembly(exact, record.seen).build()


class _Assembly:
    """Makes the runtime's graph, node by node.

    Attributes:
        live: what stands for the nodes that depend on the image; values are integers, except those in `real`.
        bounds: the largest magnitudes of integer values.
    """

    def __init__(self, old: fx.GraphModule, seen: dict[fx.Node, Any]) -> None:
        self.old, self.seen = old, seen
        self.root, self.graph = nn.Module(), fx.Graph()
        self.live: dict[fx.Node, fx.Node] = {}
        self.bounds: dict[fx.Node, int] = {}

    def build(self) -> fx.GraphModule:
        for node in self.old.graph.nodes:
            if node.op == "placeholder":
                self.live[node] = self.graph.placeholder("image")
            elif node.op == "output":
                self.graph.output(self.live[node.args[0]])
            elif node.op == "call_module":
                self.layer(node)
            elif node.op == "call_function":
                self.function(node)
        made = fx.GraphModule(self.root, self.graph, "IntegerRuntime").eval()
        made.graph.eliminate_dead_code()
        made.delete_all_unused_submodules()
        made.recompile()
        return made

    def layer(self, node: fx.Node) -> None:
        layer = self.old.get_submodule(node.target)
        made = MAKERS[type(layer)](layer, *(self.known(x) for x in node.args))
        values = [v for x in node.args if (v := x[0] if isinstance(x, tuple) else x) in self.live]
        inputs = tuple(self.live[v] for v in values)
        self.bounds[node] = made.bound
        if made.layer is None:
            self.live[node] = inputs[0]
            return
        name = f"{node.target.replace('.', '_')}_{len(self.live)}"
        if isinstance(made.layer, Tensor):
            self.root.register_buffer(name, made.layer)
            self.live[node] = self.graph.get_attr(name)
        else:
            self.root.add_module(name, made.layer)
            self.live[node] = self.graph.call_module(name, inputs)

    def known(self, x: object) -> Known | Tensor | float | None:
        """A pair: what is known of it; a constant: itself; a real tensor that depends on the image: None."""
        if isinstance(x, tuple):
            return Known(self.seen[x[1]], self.bounds[x[0]], self.seen[x[0]].shape)
        if isinstance(x, fx.Node):
            return None if x in self.live else self.seen[x]
        return x

    def function(self, node: fx.Node) -> None:
        source = node.args[0] if node.target is operator.getitem else None
        if source is not None and source.op == "call_module":  # parts of a pair, or of several values
            several = isinstance(self.old.get_submodule(source.target), layers.Together)
            index = node.args[1]
            if index < len(self.seen[source]) - 1:
                out = self.live[source]
                self.live[node] = self.graph.call_function(node.target, (out, index)) if several else out
                self.bounds[node] = self.bounds[source]
            return
        inputs = [n for n in node.all_input_nodes if n in self.live]
        if not inputs:
            return
        for n in node.all_input_nodes:  # such as the indices of a gather
            if n not in self.live:
                self.live[n] = self.fixed(n)
        self.live[node] = self.graph.node_copy(node, self.live.__getitem__)
        bounds = [self.bounds[n] for n in inputs if n in self.bounds]
        if bounds:
            self.bounds[node] = sum(bounds) if str(node.target).startswith("aten.add") else max(bounds)

    def fixed(self, node: fx.Node) -> fx.Node:
        name = f"fixed_{len(self.live)}"
        self.root.register_buffer(name, self.seen[node])
        return self.graph.get_attr(name)

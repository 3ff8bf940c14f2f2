"""What stands for each tensor operation in a graph of integers: RULES, operation -> function of (builder, node).

A rule returns a `Value`, or None where it does not cover this form of the operation.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import fx, nn

from vitalloy.compression.quantization.i_vit import layers
from vitalloy.compression.quantization.i_vit.graph import Builder, Value
from vitalloy.compression.quantization.i_vit.operations import MOVING, name_of

aten = torch.ops.aten
Rule = Callable[[Builder, fx.Node], Value | None]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def arguments(node: fx.Node) -> dict[str, object]:
    """All arguments of an operation by name, with defaults."""
    schema = node.target._schema.arguments
    given = {a.name: a.default_value for a in schema if a.has_default_value()}
    return given | dict(zip((a.name for a in schema), node.args, strict=False)) | dict(node.kwargs)


def parameter(builder: Builder, x: fx.Node | None) -> nn.Parameter | None:
    """A weight: one of the model, or a constant worked out from some, which then is a parameter of its own."""
    if x is None:
        return None
    if x.op == "get_attr":
        value = builder.original(x.target)
    else:
        known: dict[fx.Node, object] = {}
        for n in builder.old.graph.nodes:  # constants come before what reads them
            if n.op == "get_attr":
                known[n] = builder.original(n.target)
            elif n.op == "call_function" and all(m in known for m in n.all_input_nodes) and builder.is_constant(n):
                known[n] = n.target(*fx.map_arg(n.args, known.get), **fx.map_arg(n.kwargs, known.get))
            if n is x:
                break
        value = known[x].detach()
    return value if isinstance(value, nn.Parameter) else nn.Parameter(value)


def weighted(builder: Builder, node: fx.Node, make: Callable[..., nn.Module], *rest: object) -> str:
    """The name of the layer that holds a weight; a weight that is used twice has one layer."""
    given = arguments(node)
    weight, bias = given["weight"], given["bias"]
    home = weight.target.removesuffix(".weight") if weight is not None and weight.op == "get_attr" else None
    key = (weight, bias, *map(str, rest))
    if key not in builder.layers or weight is None:
        layer = make(parameter(builder, weight), parameter(builder, bias), *rest)
        builder.layers[key] = builder.put(builder.label(node) if home is None else home, layer)
    return builder.layers[key]


@rule("linear")
def linear(builder: Builder, node: fx.Node) -> Value | None:
    given = arguments(node)
    if not builder.is_constant(given["weight"]):
        return None
    layer = weighted(builder, node, layers.QuantLinear)
    return builder.emit("", layer, builder.get(given["input"], 8).pair, kind="product")


@rule("conv1d", "conv2d", "conv3d")
def conv(builder: Builder, node: fx.Node) -> Value | None:
    given = arguments(node)
    if not builder.is_constant(given["weight"]) or isinstance(given["padding"], str):
        return None
    dims = builder.ndim(node) - 2
    lists = [list(v) * dims if len(v) == 1 else list(v) for v in (given[k] for k in ("stride", "padding", "dilation"))]
    layer = weighted(builder, node, layers.QuantConv, *lists, given["groups"])
    return builder.emit("", layer, builder.get(given["input"], 8).pair, kind="product")


@rule("layer_norm", "group_norm")
def norm(builder: Builder, node: fx.Node) -> Value | None:
    given = arguments(node)
    first = name_of(node) == "group_norm"
    if (given["num_groups"] if first else len(given["normalized_shape"])) != 1:
        return None
    layer = weighted(builder, node, layers.QuantNorm, first)
    return builder.emit("", layer, builder.get(given["input"], 16).pair, kind="norm")


@rule("batch_norm")
def batch_norm(builder: Builder, node: fx.Node) -> Value:
    """One that no linear map stands before: a scale and a shift for each channel."""
    given, shape = arguments(node), (-1, *[1] * (builder.ndim(node) - 2))
    mean, variance = (builder.mapped(given[k]) for k in ("running_mean", "running_var"))
    call = builder.graph.call_function
    factor = call(aten.rsqrt.default, (call(aten.add.Tensor, (variance, given["eps"])),))
    if given["weight"] is not None:
        factor = call(aten.mul.Tensor, (factor, builder.mapped(given["weight"])))
    shift = call(aten.neg.default, (call(aten.mul.Tensor, (mean, factor)),))
    if given["bias"] is not None:
        shift = call(aten.add.Tensor, (shift, builder.mapped(given["bias"])))
    factor, shift = (call(aten.reshape.default, (t, shape)) for t in (factor, shift))
    label = builder.label(node)
    scaled = builder.emit(label, layers.Scale(), builder.get(given["input"], 16).pair, factor)
    shift = builder.emit(f"{label}_shift_act", layers.QuantAct(16), shift, bits=16)
    return total(builder, builder.fit(scaled, 16, label), shift, 16, label)


def total(builder: Builder, x: Value, y: Value, bits: int, label: str) -> Value:
    """x + y on a grid of its own, the published form of a residual."""
    return builder.emit(f"{label}_act", layers.QuantAct(bits), x.pair, y.pair, bits=bits)


def constant(builder: Builder, x: fx.Node | float) -> fx.Node | float:
    return builder.mapped(x) if isinstance(x, fx.Node) else x


def number(builder: Builder, x: float, like: str) -> fx.Node:
    """A number as a constant of the new graph."""
    name = like.replace(".", "_") + "_number"
    while hasattr(builder.root, name):
        name += "_"
    return builder.tensor(name, torch.tensor([float(x)]))


def operand(builder: Builder, x: fx.Node | float, bits: int, label: str) -> Value:
    """A value, a constant or a number for an operation element by element."""
    if isinstance(x, fx.Node):
        return builder.get(x, bits)
    return builder.emit(f"{label}_number_act", layers.QuantAct(bits), number(builder, x, label), bits=bits)


@rule("add", "sub", "rsub")
def add(builder: Builder, node: fx.Node) -> Value:
    a, b = node.args[:2]
    if name_of(node) == "rsub":
        a, b = b, a
    alpha = node.kwargs.get("alpha", 1) * (1 if name_of(node) == "add" else -1)
    label = builder.label(node)
    if name_of(node) == "add" and "softmax" in builder.readers(node) and alpha == 1:
        if builder.is_constant(a):
            a, b = b, a
        return add_bias(builder, builder.get(a, 8), b, label)
    x, y = (operand(builder, n, 16, label) for n in (a, b))
    if alpha != 1:
        y = builder.emit(label, layers.Scale(), y.pair, alpha, bits=16)
    return total(builder, x, y, 16, label)


def add_bias(builder: Builder, logits: Value, bias: fx.Node, label: str) -> Value:
    """What is added to attention logits on 8 bits: a grid for what is learned, whole steps for a fixed mask."""
    if not builder.is_constant(bias):
        return total(builder, logits, builder.get(bias, 8), 8, f"{label}_sum")
    for term, is_learned, moves in terms(builder, bias):
        if is_learned:
            table = builder.emit(f"{label}_bias_act", layers.QuantAct(8), term, bits=8)
        else:
            table = Value(builder.call(f"{label}_mask", layers.Mask(), term, logits.pair), logits.scale)
        for move in moves:
            table.value = builder.copy(move, table.value)
        if is_learned:
            logits = total(builder, logits, table, 8, f"{label}_sum")
        else:
            masked = builder.graph.call_function(aten.add.Tensor, (logits.value, table.value))
            logits = Value(masked, logits.scale, 16)
    return logits


def terms(builder: Builder, node: fx.Node) -> list[tuple[fx.Node, bool, list[fx.Node]]]:
    """A constant as a sum of what depends on parameters and what does not.

    Returns:
        For each: a node of the new graph, whether it depends on parameters, and the old nodes that move it into place.
    """
    if name_of(node) in MOVING and (len(found := terms(builder, node.args[0])) > 1 or builder.depends_on_batch(node)):
        return [(term, flag, [*moves, node]) for term, flag, moves in found]
    if learned(builder, node) and name_of(node) == "add" and len(node.all_input_nodes) == 2:
        sizes = node.meta["val"].shape
        found = [t for a in node.args[:2] for t in terms(builder, a)]
        if not all(flag for _, flag, _ in found) and all(isinstance(s, int) for s in sizes):
            expand = aten.expand.default
            return [(builder.graph.call_function(expand, (t, list(sizes))), flag, []) for t, flag, _ in found]
    return [(builder.mapped(node), learned(builder, node), [])]


def learned(builder: Builder, node: fx.Node) -> bool:
    if node.op == "get_attr":
        return isinstance(builder.original(node.target), nn.Parameter)
    return any(learned(builder, n) for n in node.all_input_nodes)


@rule("mul", "div")
def mul(builder: Builder, node: fx.Node) -> Value | None:
    a, b = node.args[:2]
    if name_of(node) == "mul" and builder.is_constant(a):
        a, b = b, a
    label = builder.label(node)
    if not builder.is_constant(b):
        return None if name_of(node) == "div" else product(builder, builder.get(a, 16), builder.get(b, 16), label)
    factor = constant(builder, b)
    if name_of(node) == "div":
        factor = builder.graph.call_function(aten.reciprocal.default, (factor,)) if isinstance(b, fx.Node) else 1 / b
    return scaled(builder, builder.get(a, None), factor, label)


def product(builder: Builder, a: Value, b: Value, label: str) -> Value:
    return builder.emit(label, layers.Product(), a.pair, b.pair)


def scaled(builder: Builder, x: Value, factor: fx.Node | float, label: str) -> Value:
    """A value times a constant; it stays on its grid if that is a positive number."""
    same = not isinstance(factor, fx.Node) and factor > 0
    if not same and x.bits is None and x.kind not in ("product", "norm"):
        x = builder.fit(x, 16, label)
    return builder.emit(label, layers.Scale(), x.pair, factor, bits=x.bits if same else None, kind=x.kind)


@rule("addcmul")
def addcmul(builder: Builder, node: fx.Node) -> Value | None:
    x, a, b = node.args
    label = builder.label(node)
    if node.kwargs.get("value", 1) != 1 or (builder.is_constant(a) and builder.is_constant(b)):
        return None
    if builder.is_constant(a):
        a, b = b, a
    if builder.is_constant(b):
        branch = scaled(builder, builder.get(a, None), constant(builder, b), label)
    else:
        branch = product(builder, builder.get(a, 16), builder.get(b, 16), label)
    return total(builder, builder.fit(branch, 16, f"{label}_product"), builder.get(x, 16), 16, label)


@rule("lerp")
def lerp(builder: Builder, node: fx.Node) -> Value | None:
    a, b, weight = node.args
    if not builder.is_constant(weight):
        return None
    label, there = builder.label(node), constant(builder, weight)
    if isinstance(weight, fx.Node):
        here = builder.graph.call_function(aten.rsub.Scalar, (there, 1))
    else:
        here = 1 - there
    parts = [builder.fit(scaled(builder, builder.get(x, 16), w, label), 16, label) for x, w in ((a, here), (b, there))]
    return total(builder, *parts, 16, label)


@rule("square")
def square(builder: Builder, node: fx.Node) -> Value:
    x = builder.get(node.args[0], 16)
    return product(builder, x, x, builder.label(node))


@rule("gelu", "silu", "sigmoid")
def gate(builder: Builder, node: fx.Node) -> Value:
    name = name_of(node)
    factor, keep, bits = {"gelu": (1.702, True, 8), "silu": (1.0, True, 8), "sigmoid": (1.0, False, 16)}[name]
    layer = layers.ShiftGate(factor, keep, bits, builder.word)
    return builder.emit(builder.label(node), layer, builder.get(node.args[0], 8).pair, bits=None if keep else bits)


@rule("relu")
def relu(builder: Builder, node: fx.Node) -> Value:
    x = builder.get(node.args[0], None)
    return builder.emit(builder.label(node), layers.Rectify(), x.pair, bits=x.bits)


@rule("softmax", "_softmax")
def softmax(builder: Builder, node: fx.Node) -> Value | None:
    if node.args[1] not in (-1, builder.ndim(node) - 1):
        return None
    return probabilities(builder, builder.get(node.args[0], 8), builder.label(node))


def probabilities(builder: Builder, logits: Value, label: str) -> Value:
    bits = builder.softmax_bits
    return builder.emit(label, layers.Shiftmax(bits, builder.word), logits.pair, bits=bits, kind="softmax")


@rule("matmul", "bmm")
def matmul(builder: Builder, node: fx.Node) -> Value:
    a, b = (factor(builder, n) for n in node.args)
    return builder.emit(builder.label(node), layers.QuantMatMul(), a.pair, b.pair)


def factor(builder: Builder, node: fx.Node) -> Value:
    """8 bits, or an attention map with all its bits."""
    held = builder.held[node]
    return held if isinstance(held, Value) and held.kind == "softmax" else builder.get(node, 8)


@rule("scaled_dot_product_attention")
def attention(builder: Builder, node: fx.Node) -> Value | None:
    given, label = arguments(node), builder.path(node) or "attention"
    if given["is_causal"] or given.get("enable_gqa"):
        return None
    q, k, v = (builder.get(given[n], 8) for n in ("query", "key", "value"))
    turned = builder.graph.call_function(aten.transpose.int, (k.value, -2, -1))
    logits = builder.emit(f"{label}.matmul_1", layers.QuantMatMul(), q.pair, (turned, k.scale))
    scale = given["scale"] or 1 / math.sqrt(given["query"].meta["val"].shape[-1])
    logits = builder.fit(scaled(builder, logits, scale, f"{label}.scale"), 8, f"{label}.logits")
    if given["attn_mask"] is not None:
        logits = add_bias(builder, logits, given["attn_mask"], label)
    attended = probabilities(builder, logits, f"{label}.softmax")
    return builder.emit(f"{label}.matmul_2", layers.QuantMatMul(), attended.pair, v.pair)


@rule("mean", "sum")
def mean(builder: Builder, node: fx.Node) -> Value | None:
    given = arguments(node)
    dims = given.get("dim")
    if not dims:
        return None
    is_mean, published = name_of(node) == "mean", builder.as_published
    x = builder.get(node.args[0], 8 if is_mean and published else 16)
    layer = layers.Sum(list(dims), given.get("keepdim", False), is_mean, published)
    return builder.emit(builder.label(node), layer, x.pair)


@rule("avg_pool2d", "adaptive_avg_pool2d")
def pool(builder: Builder, node: fx.Node) -> Value | None:
    given, source = arguments(node), node.args[0]
    if name_of(node) == "avg_pool2d":
        size, padding = (list(given[k]) * (3 - len(given[k])) for k in ("kernel_size", "padding"))
        stride = list(given["stride"]) * (3 - len(given["stride"])) if given["stride"] else size
        sides = zip(source.meta["val"].shape[-2:], size, stride, padding, strict=True)
        if given["ceil_mode"] and any((n + 2 * p - k) % s for n, k, s, p in sides):
            return None
        layer = layers.Pool(size, stride, padding, given["count_include_pad"], given["divisor_override"])
    else:
        sides, out = source.meta["val"].shape[-2:], given["output_size"]
        if any(s % o for s, o in zip(sides, out, strict=True)):
            return None
        size = [s // o for s, o in zip(sides, out, strict=True)]
        layer = layers.Pool(size, size, [0, 0], True, None)
    return builder.emit(builder.label(node), layer, builder.get(source, 16).pair)


@rule("minimum", "maximum")
def extreme(builder: Builder, node: fx.Node) -> Value:
    values = [operand(builder, n, 16, builder.label(node)) for n in node.args]
    parts, scale = builder.together(values, 16, builder.label(node))
    return Value(builder.graph.call_function(node.target, tuple(parts)), scale, 16)


@rule("amax", "amin")
def reduce(builder: Builder, node: fx.Node) -> Value:
    x = builder.get(node.args[0], 16)
    return Value(builder.copy(node, x.value), x.scale, x.bits)


@rule("upsample_bilinear2d", "upsample_bicubic2d", "upsample_nearest2d")
def upsample(builder: Builder, node: fx.Node) -> Value:
    """Interpolation as two products with fixed matrices."""
    given, x = arguments(node), builder.get(node.args[0], 8)
    sides, out = ([*n.meta["val"].shape[-2:]] for n in (node.args[0], node))
    mode = name_of(node).removeprefix("upsample_").removesuffix("2d")
    options = {} if mode == "nearest" else {"mode": "bilinear" if mode == "bilinear" else mode}
    if options:
        options["align_corners"] = given["align_corners"]
    label = builder.label(node)
    for axis, (old, new) in enumerate(zip(sides, out, strict=True)):
        eye = torch.eye(old)[:, None, :, None].expand(-1, -1, -1, 2)  # as images (old, 1, old, 2)
        matrix = F.interpolate(eye, size=(new, 2), **options)[:, 0, :, 0]  # (old, new)
        name = f"{label.replace('.', '_')}_{axis}"
        held = builder.tensor(name, matrix.mT.contiguous() if axis == 0 else matrix.contiguous())
        fixed = builder.emit(f"{label}_matrix_act", layers.QuantAct(8), held, bits=8)
        pairs = (fixed.pair, x.pair) if axis == 0 else (x.pair, fixed.pair)
        x = builder.emit(f"{label}_product", layers.QuantMatMul(), *pairs)
        if axis == 0:
            x = builder.fit(x, 8, label)
    return x

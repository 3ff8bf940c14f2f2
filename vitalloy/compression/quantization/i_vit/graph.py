"""Turns a model into one of I-ViT's layers alone, whatever the model: `convert`.

The model is exported to a graph of tensor operations, and each operation is replaced by its integer rule (`rules.py`).
Where the graph needs a grid, a `QuantAct` is put:

- products (linear, convolution, attention) read 8 bits; softmax, GELU and their kin too;
- sums, norms, means and what else works element by element read 16 bits;
- of what products and norms give, every reader gets a grid of its own where it reads, except that moving entries about
  (reshaping, splitting into queries, keys and values) does not count as reading;
- constants of the model (position tables, tables of biases, class tokens) are quantized where they are read.

For ViT, DeiT and Swin that is where the authors put theirs.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from vitalloy.compression.quantization.i_vit import arithmetic, layers
from vitalloy.compression.quantization.i_vit.operations import (
    MOVING,
    NOTHING,
    PERMUTING,
    PREPROCESSING,
    SUBSETS,
    IntegerModel,
    along,
    export,
    name_of,
)
from vitalloy.errors import CompressionError


@dataclass
class Value:
    """A pair in the new graph.

    Attributes:
        bits: of the grid that it is on; None for what has no `QuantAct` yet: sums of products, norms.
        kind: "product", "norm", "softmax" or "".
    """

    value: fx.Node
    scale: fx.Node
    bits: int | None = None
    kind: str = ""

    @property
    def pair(self) -> tuple[fx.Node, fx.Node]:
        return self.value, self.scale

    def fits(self, bits: int | None) -> bool:
        return bits is None or (self.bits is not None and self.bits <= bits)


@dataclass
class Plain:
    """A tensor that is not on a grid yet: a constant of the model, or the image.

    Attributes:
        node: in the new graph; None for a parameter or buffer that nothing has read yet (layers own theirs).
    """

    node: fx.Node | None
    constant: bool


class Moved:
    """Entries of its first argument, moved; made where it is read, on the grid of the reader."""


class Joined:
    """A concatenation, made where it is read."""


class Builder:
    """Makes the new graph; `rules.RULES` holds what is done for each operation.

    Attributes:
        held: what stands for each node of the old graph.
        root: holds the layers of the new graph, by the paths of the old modules.
    """

    def __init__(
        self, model: nn.Module, old: fx.GraphModule, softmax_bits: int, as_published: bool, allow_float: bool
    ) -> None:
        self.model, self.old = model, old
        self.softmax_bits, self.as_published, self.allow_float = softmax_bits, as_published, allow_float
        self.word = arithmetic.WORD if as_published else layers.LONG
        self.root, self.graph = nn.Module(), fx.Graph()
        self.held: dict[fx.Node, Value | Plain | Moved | Joined | fx.Node] = {}
        self.made: dict[tuple[fx.Node, int | None], Value] = {}
        self.layers: dict[tuple, str] = {}
        self.float_nodes: list[str] = []

    # what is in the graph

    def path(self, node: fx.Node) -> str:
        """The module that the operation was called in."""
        stack = node.meta.get("nn_module_stack") or {"": ("", None)}
        path = list(stack.values())[-1][0]
        return path.removeprefix("L['self']").lstrip(".")

    def where(self, node: fx.Node) -> str:
        return f"{name_of(node)} in {self.path(node) or 'the model'}"

    def readers(self, node: fx.Node) -> set[str]:
        """The operations that read a node, where it was moved to."""
        found = set()
        for user in node.users:
            found |= self.readers(user) if name_of(user) in MOVING else {name_of(user)}
        return found

    def ndim(self, node: fx.Node) -> int:
        return node.meta["val"].ndim

    def is_constant(self, x: object) -> bool:
        return not isinstance(x, fx.Node) or (isinstance(held := self.held[x], Plain) and held.constant)

    # putting things into the new graph

    def put(self, path: str, module: nn.Module) -> str:
        """Name a layer; a taken path gets a number."""
        parent, _, leaf = path.rpartition(".")
        owner, number = self.folder(parent), 0
        leaf = leaf if leaf and not (leaf[0].isdigit() and not parent) else f"part_{leaf}"
        if type(held := getattr(owner, leaf, None)) is nn.Module and not isinstance(module, layers.QuantAct):
            for name, inner in [*held.named_children(), *held.named_parameters(recurse=False)]:
                setattr(module, name, inner)  # a folder of what came before becomes the layer itself
            delattr(owner, leaf)
        free = leaf
        while hasattr(owner, free):
            number += 1
            free = f"{leaf}_{number}"
        owner.add_module(free, module)
        return f"{parent}.{free}".lstrip(".")

    def folder(self, path: str) -> nn.Module:
        owner = self.root
        for part in path.split(".") if path else ():
            if not isinstance(getattr(owner, part, None), nn.Module):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        return owner

    def call(self, path: str, module: nn.Module | str, *args: object) -> fx.Node:
        name = module if isinstance(module, str) else self.put(path, module)
        return self.graph.call_module(name, args)

    def emit(self, path: str, module: nn.Module | str, *args: object, bits: int | None = None, kind: str = "") -> Value:
        """Call a layer that returns a pair."""
        out = self.call(path, module, *args)
        return Value(*(self.graph.call_function(operator.getitem, (out, i)) for i in (0, 1)), bits, kind)

    def tensor(self, name: str, value: Tensor) -> fx.Node:
        """A constant of the model, under its own name."""
        parent, _, leaf = name.rpartition(".")
        owner = self.folder(parent)
        if not hasattr(owner, leaf):
            if isinstance(value, nn.Parameter):
                owner.register_parameter(leaf, value)
            else:
                owner.register_buffer(leaf, value)
        return self.graph.get_attr(name)

    def mapped(self, x: object) -> object:
        """Arguments for the new graph: constants and sizes by what stands for them."""
        return fx.map_arg(x, self.plain)

    def plain(self, node: fx.Node) -> fx.Node:
        """What stands for a constant, the image or a size."""
        held = self.held[node]
        if not isinstance(held, Plain):
            return held
        if held.node is None:
            held.node = self.tensor(node.target, self.original(node.target))
        return held.node

    def copy(self, node: fx.Node, first: fx.Node | None = None) -> fx.Node:
        """The same operation in the new graph, on another first argument if one is given."""
        args = self.mapped(node.args) if first is None else (first, *map(self.mapped, node.args[1:]))
        target = node.target
        if name_of(node) in ("view_as", "expand_as"):  # a shape that is known but for the number of images
            sizes = [s if isinstance(s, int) else -1 for s in node.meta["val"].shape]
            new = torch.ops.aten.reshape if name_of(node) == "view_as" else torch.ops.aten.expand
            target, args = new.default, (args[0], sizes)
        elif getattr(target, "_schema", None) is not None and target._schema.is_mutable:
            plain = getattr(torch.ops.aten, name_of(node))
            target = getattr(plain, target._overloadname)
        return self.graph.call_function(target, args, self.mapped(node.kwargs))

    # reading

    def get(self, node: fx.Node, bits: int | None) -> Value:
        """The node's value, on a grid of at most `bits`; None takes it as it is."""
        held = self.held[node]
        if isinstance(held, Value) and held.fits(bits):
            return held
        if (node, bits) not in self.made:
            self.made[node, bits] = self.read(node, held, bits)
        return self.made[node, bits]

    def read(self, node: fx.Node, held: Value | Plain | Moved | Joined, bits: int | None) -> Value:
        if isinstance(held, Moved):
            return self.moved(node, bits)
        if isinstance(held, Joined):
            return self.joined(node, bits or 16)
        if isinstance(held, Plain):
            return self.quantized(node, held, bits or 16)
        if self.as_published and held.kind == "product" and "layer_norm" in self.readers(node):
            bits = 8  # the authors' embeddings and mergings
        return self.fit(held, bits, self.label(node))

    def label(self, node: fx.Node) -> str:
        return f"{self.path(node)}.{name_of(node)}".lstrip(".")

    def fit(self, x: Value, bits: int | None, label: str) -> Value:
        """The value itself where it is on a grid of at most `bits`, or put on one."""
        if x.fits(bits):
            return x
        return self.emit(f"{label}_act", layers.QuantAct(bits), x.pair, bits=bits)

    def moved(self, node: fx.Node, bits: int | None) -> Value:
        name, source = name_of(node), node.args[0]
        bent = self.get(source, None if name in SUBSETS else bits)
        if bent.bits is None and name not in PERMUTING | SUBSETS:  # channels may not stay apart: one scale for all
            bent = self.get(source, bits or 16)
        scale = bent.scale
        if bent.bits is None:
            scale = self.graph.call_function(
                along, (scale, node.target, self.ndim(source), *self.mapped(node.args[1:])), {}
            )
        value = Value(self.copy(node, bent.value), scale, bent.bits, bent.kind)
        return self.fit(value, bits, self.label(node))

    def joined(self, node: fx.Node, bits: int) -> Value:
        parts = node.args[0]
        values = [p for p in parts if not self.is_constant(p)]
        if len(values) == 1:  # constants, such as a class token, take the grid of what they are joined with
            one = self.get(values[0], bits)
            join = [one.value if p is values[0] else self.adopted(p, one, self.label(node)) for p in parts]
            return Value(self.graph.call_function(node.target, (join, *node.args[1:])), one.scale, one.bits)
        join, shared = self.together([self.get(p, None) for p in parts], bits, self.label(node))
        return Value(self.graph.call_function(node.target, (join, *node.args[1:])), shared, bits)

    def adopted(self, node: fx.Node, like: Value, label: str) -> fx.Node:
        if self.depends_on_batch(node):
            return self.copy(node, self.adopted(node.args[0], like, label))
        return self.call(label, layers.Adopt(), self.plain(node), like.pair)

    def together(self, values: list[Value], bits: int, label: str) -> tuple[list[fx.Node], fx.Node]:
        """The values on one grid, and its scale."""
        if all(v.fits(bits) and v.scale is values[0].scale for v in values):
            return [v.value for v in values], values[0].scale
        out = self.call(f"{label}_act", layers.Together(bits), *(v.pair for v in values))
        *parts, scale = (self.graph.call_function(operator.getitem, (out, i)) for i in range(len(values) + 1))
        return parts, scale

    def quantized(self, node: fx.Node, held: Plain, bits: int) -> Value:
        """The image or a constant on a grid of its own."""
        if held.constant and node.op == "call_function" and self.depends_on_batch(node):
            return self.moved(node, bits)  # what the number of images decides comes behind the grid
        label = "image" if node.op == "placeholder" else str(node.target) if node.op == "get_attr" else self.label(node)
        bits = bits if held.constant or self.float_nodes else 8
        return self.emit(f"{label}_act", layers.QuantAct(bits), self.plain(node), bits=bits)

    def depends_on_batch(self, node: fx.Node) -> bool:
        return name_of(node) in MOVING and any(not isinstance(s, int) for s in node.meta["val"].shape)

    # the walk

    def build(self) -> IntegerModel:
        from vitalloy.compression.quantization.i_vit.rules import RULES

        for node in self.old.graph.nodes:
            if self.does_nothing(node) and node.args[0].meta["val"].is_floating_point():
                node.replace_all_uses_with(node.args[0])
            elif node.op == "placeholder":
                self.held[node] = Plain(self.graph.placeholder("image"), constant=False)
            elif node.op == "get_attr":
                self.held[node] = Plain(None, constant=True)
            elif node.op == "output":
                self.output(node)
            elif node.op == "call_function":
                self.held[node] = self.stand_in(node, RULES)
        for node in reversed(self.graph.nodes):
            if not node.users and node.op not in ("output", "placeholder"):
                self.graph.erase_node(node)
        made = IntegerModel(self.root, self.graph)
        made.meta["float_nodes"] = self.float_nodes
        return made

    def does_nothing(self, node: fx.Node) -> bool:
        whole = name_of(node) == "slice" and node.args[2:3] in ((), (0,), (None,)) and len(node.args) < 5
        return name_of(node) in NOTHING or (whole and (len(node.args) < 4 or node.args[3] in (None, 2**63 - 1)))

    def original(self, name: str) -> Tensor:
        try:
            return self.model.get_parameter(name)
        except AttributeError:
            return operator.attrgetter(name)(self.old)

    def stand_in(self, node: fx.Node, rules: dict) -> object:
        name, inputs = name_of(node), node.all_input_nodes
        if name.startswith("_assert") or name == "promote_types":
            return None
        plain = [self.held[n] for n in inputs if not isinstance(self.held[n], fx.Node)]
        if name == "sym_size" or not isinstance(node.meta.get("val"), (Tensor, list, tuple)):
            return self.size(node)
        if all(isinstance(h, Plain) and h.constant for h in plain):
            return Plain(self.copy(node), constant=True)
        if name in PREPROCESSING and isinstance(plain[0], Plain) and not plain[0].constant:
            return Plain(self.copy(node), constant=False)
        if name in MOVING:
            self.check_padding(node)
            return Moved()
        if name in ("cat", "stack"):
            return Joined()
        found = rules[name](self, node) if name in rules else None
        return self.floating(node) if found is None else found

    def size(self, node: fx.Node) -> fx.Node:
        """A number of the shape."""
        if name_of(node) != "sym_size":
            return self.copy(node)
        held = self.held[node.args[0]]
        return self.copy(node, None if isinstance(held, Plain) else self.get(node.args[0], 16).value)

    def check_padding(self, node: fx.Node) -> None:
        if name_of(node) in ("pad", "constant_pad_nd"):
            mode, value = [*node.args[2:], *[None] * 2][:2] if name_of(node) == "pad" else ("constant", node.args[2])
            if (mode or "constant") != "constant" or value:
                raise CompressionError(f"{self.where(node)} pads with other than zeros, which integers cannot follow.")

    def floating(self, node: fx.Node) -> Plain:
        """An operation without a rule, in floating point."""
        if not self.allow_float or not isinstance(node.meta["val"], Tensor) or not node.meta["val"].is_floating_point():
            raise CompressionError(
                f"{self.where(node)} has no integer form in I-ViT. Use allow_float=True to leave it in floating point "
                "where that is possible, or another method, such as 'easyquant'."
            )
        self.float_nodes.append(self.where(node))

        def real(x: fx.Node) -> fx.Node:
            held = self.held[x]
            if isinstance(held, fx.Node | Plain):
                return self.plain(x)
            return self.call(f"{self.label(node)}_leave", layers.Leave(), self.get(x, 16).pair)

        args, kwargs = fx.map_arg(node.args, real), fx.map_arg(node.kwargs, real)
        return Plain(self.graph.call_function(node.target, args, kwargs), constant=False)

    def output(self, node: fx.Node) -> None:
        flat = node.all_input_nodes
        if len(flat) != 1:
            raise CompressionError(f"The model returns {len(flat)} tensors where I-ViT takes one: the logits.")
        self.graph.output(self.call("logits", layers.Leave(), self.get(flat[0], None).pair))


def convert(
    model: nn.Module,
    example: Tensor,
    *,
    softmax_bits: int = 16,
    as_published: bool = False,
    allow_float: bool = False,
) -> IntegerModel:
    """The model in the layers of I-ViT, with the same parameters under the same names: images -> logits.

    It starts out calibrating: every call makes the grids follow what passes. `freeze` ends that.

    Args:
        model: in evaluation mode, its batch norms folded.
        example: images (B, C, H, W) of the size that the model is for.
        softmax_bits: of attention maps: 16 as in the authors' DeiT, 8 as in their Swin.
        as_published: start the trunk behind a patch merging on 8 bits, round means to the grid of what they are the
            mean of, and take the reciprocals of softmax and GELU with 31 bits. All three lose accuracy.
        allow_float: leave operations without an integer rule in floating point; `float_nodes` of the result lists them.

    Raises:
        CompressionError: an operation without a rule, or a model whose operations depend on values.
    """
    example = example[:2] if len(example) > 1 else torch.cat([example, example])
    old = export(model.eval(), example)
    made = Builder(model, old, softmax_bits, as_published, allow_float).build()
    made.meta["image_shape"] = tuple(example.shape[1:])
    return made.to(example).eval()

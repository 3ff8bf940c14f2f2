"""Where a hybrid's convolutions meet its transformer: bridge blocks, found in the data flow of one exported pass.

The paper names bridge blocks for each family; here one rule finds them. Tensors that are computed from each other
without changing how positions are laid out form a region. A region in which neighbouring pixels meet (an overlapping
convolution or pooling) is local, as is a map that the head pools; any other region that feeds attention, or is fed by
it, is global. A bridge is

- a layer whose output leaves a local region for a global one or for attention itself;
- where a sum leaves instead, the layers of the sum's last residual branch and the first layers behind it;
- a local layer that takes what comes out of a global region, and the layer that joins its output with a local map by
  concatenation;
- where attention is fed and read by local layers alone, all layers of the residual branch that holds it.

Bridges that feed each other directly make one block. A model without attention, or without overlapping windows, has
none.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from vitalloy.layers.attention import Attend

log = logging.getLogger("vitalloy")
LAYERS = {"linear": nn.Linear, "conv2d": nn.Conv2d, "scaled_dot_product_attention": Attend}
PRODUCTS = {"matmul", "bmm", "einsum", "scaled_dot_product_attention"}
LAYOUT = {"view", "reshape", "unsafe_view", "flatten", "unflatten", "unfold", "im2col", "col2im"}
LAYOUT |= {"pixel_shuffle", "pixel_unshuffle"}


def operation(node: fx.Node) -> str:
    """The name of an ATen operation without overload and underscores, "" for what is none."""
    schema = getattr(node.target, "_schema", None)
    return schema.name.split("::")[-1].strip("_") if schema else ""


def _dims(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.ndim if isinstance(value, Tensor) else 0


@dataclass(frozen=True)
class Block:
    """Layers that are quantized as one.

    Attributes:
        layers: names, in the order in which they run.
        nodes: the part of the graph from the first of them to the last.
        outputs: the nodes at which its error is measured.
    """

    layers: tuple[str, ...]
    nodes: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]

    @property
    def inputs(self) -> list[fx.Node]:
        """What the block's nodes take from outside."""
        inside = set(self.nodes)
        return list(dict.fromkeys(n for node in self.nodes for n in node.all_input_nodes if n not in inside))


class Flow:
    """The data flow of a model on a batch of one size, as ATen operations.

    Args:
        model: in evaluation mode, before `simulate`; its layers may be replaced by simulated ones afterwards.
        images: (N, C, H, W); `run` takes batches of this shape only.
    """

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        learns = [p for p in model.parameters() if p.requires_grad]
        for parameter in learns:  # or `Attend` takes its unfused path
            parameter.requires_grad_(False)
        try:
            self.program = torch.export.export(model, (images,), strict=False)
        finally:
            for parameter in learns:
                parameter.requires_grad_(True)
        self.model = model
        self.nodes = list(self.program.graph.nodes)
        signature = self.program.graph_signature
        self.held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.image = next(n for n in self.nodes if n.name in signature.user_inputs)
        self.live = self.reach([self.image], lambda n: n.users) | {self.image}
        self.layer = {n: name for n in self.nodes if n in self.live and (name := self._layer_of(n)) is not None}
        self.answer = self.nodes[-1].all_input_nodes[0]

    def _layer_of(self, node: fx.Node) -> str | None:
        kind = LAYERS.get(operation(node))
        if kind is Attend:
            name = next((path for path, _ in reversed([*node.meta.get("nn_module_stack", {}).values()])), "")
        elif kind is not None and isinstance(node.args[1], fx.Node):
            name = self.held.get(node.args[1].name, "").rpartition(".")[0]
        else:
            return None
        try:
            return name if name and isinstance(self.model.get_submodule(name), kind) else None
        except AttributeError:
            return None

    def reach(
        self,
        start: Iterable[fx.Node],
        step: Callable[[fx.Node], Iterable[fx.Node]],
        stop: Callable[[fx.Node], bool] = lambda _: False,
    ) -> set[fx.Node]:
        """The nodes that `step` leads to from `start`, which is not among them; `stop` nodes are not passed."""
        found: set[fx.Node] = set()
        todo = [n for s in start for n in step(s)]
        while todo:
            node = todo.pop()
            if node not in found:
                found.add(node)
                todo += [] if stop(node) else step(node)
        return found

    def before(self, node: fx.Node) -> list[fx.Node]:
        return [n for n in node.all_input_nodes if n in self.live]

    def is_layer(self, node: fx.Node) -> bool:
        return node in self.layer

    def is_sum(self, node: fx.Node) -> bool:
        return operation(node) == "add" and len(self.before(node)) > 1

    def is_layer_or_sum(self, node: fx.Node) -> bool:
        return self.is_layer(node) or self.is_sum(node)

    def run(self, images: Tensor, keep: Sequence[fx.Node], grads: Sequence[fx.Node] = ()) -> dict[fx.Node, Any]:
        """Run the model, layers as they are now, and return what `keep` computed.

        Values of `grads` are returned with their graph: `torch.autograd.grad` takes them.
        """
        wanted = {*keep, *grads, self.answer}
        values: dict[fx.Node, Any] = {}
        last = {n: node for node in self.nodes for n in node.all_input_nodes}
        for node in self.nodes[:-1]:
            if node.op == "placeholder":
                values[node] = images if node is self.image else self._value(node)
            else:
                values[node] = self.call(node, values)
            for n in node.all_input_nodes:
                if last[n] is node and n not in wanted:
                    del values[n]
        return {n: values[n] for n in wanted}

    def _value(self, node: fx.Node) -> Any:
        if node.name not in self.held:
            return self.program.constants[self.program.graph_signature.inputs_to_lifted_tensor_constants[node.name]]
        where, _, name = self.held[node.name].rpartition(".")
        return getattr(self.model.get_submodule(where), name)

    def call(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        """What a node computes; layers are called as modules."""
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        if node not in self.layer:
            return node.target(*args, **kwargs)
        module = self.model.get_submodule(self.layer[node])
        if not isinstance(module, Attend):
            return module(args[0])
        mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
        return module(*args[:3], scale=kwargs.get("scale"), bias=mask)

    def block(self, nodes: set[fx.Node]) -> Block:
        """The part of the graph between the first and the last of some layers."""
        behind = self.reach(nodes, lambda n: n.users) | nodes
        outputs = [n for n in self.nodes if n in nodes and not self.reach([n], lambda n: n.users) & nodes]
        inside = behind & (self.reach(outputs, self.before) | set(outputs))
        names = dict.fromkeys(self.layer[n] for n in self.nodes if n in nodes)
        return Block(tuple(names), tuple(n for n in self.nodes if n in inside), tuple(outputs))


class _Regions:
    """Which nodes of a flow are local and which global."""

    def __init__(self, flow: Flow) -> None:
        self.above: dict[fx.Node, fx.Node] = {}
        for node in flow.nodes:
            if node not in flow.live or operation(node) in PRODUCTS:
                continue
            for source in flow.before(node):
                same = source.meta["val"].shape == node.meta["val"].shape if _dims(source) and _dims(node) else False
                if operation(node) in LAYOUT and not same:
                    continue
                if _dims(node) == _dims(source) > 2 or 0 in (_dims(node), _dims(source)):
                    self.above[self.of(node)] = self.of(source)
        self.local = {self.of(n) for n in flow.live if _overlaps(n)}
        if self.local:  # the last map may meet no window any more, only the pooling of the head
            self.local |= {self.of(flow.before(n)[0]) for n in flow.live if _pools(n)}
        products = {n for n in flow.live if operation(n) in PRODUCTS and len(set(flow.before(n))) > 1}
        self.attention = products | {n for n in flow.live if operation(n) == "softmax" and _dims(n) > 2}
        near = flow.reach(self.attention, flow.before, flow.is_layer)
        near |= flow.reach(self.attention, lambda n: n.users, flow.is_layer)
        self.globals = {self.of(n) for n in (near & set(flow.layer)) | self.attention} - self.local

    def of(self, node: fx.Node) -> fx.Node:
        """The node that stands for its region."""
        while node in self.above and self.above[node] is not node:
            node = self.above[node]
        return node

    def is_local(self, node: fx.Node) -> bool:
        return self.of(node) in self.local and node not in self.attention

    def is_global(self, node: fx.Node) -> bool:
        return node in self.attention or self.of(node) in self.globals


def _overlaps(node: fx.Node) -> bool:
    """Whether neighbouring pixels meet: a window that is wider than its stride."""
    if operation(node) == "conv2d":
        size, stride = tuple(node.args[1].meta["val"].shape[2:]), node.args[3] if len(node.args) > 3 else 1
    elif operation(node) in ("avg_pool2d", "max_pool2d"):
        size, stride = node.args[1], node.args[2] if len(node.args) > 2 and node.args[2] else node.args[1]
    else:
        return False
    first = [x[0] if isinstance(x, (tuple, list)) else x for x in (size, stride)]
    return first[0] > max(first[1], 1)


def _pools(node: fx.Node) -> bool:
    """Whether a map is pooled whole."""
    if operation(node) == "mean" and len(node.args) > 1:
        return _dims(node.all_input_nodes[0]) == 4 and len(node.args[1]) == 2
    return operation(node) in ("adaptive_avg_pool2d", "adaptive_max_pool2d")


def find_bridges(flow: Flow) -> list[Block]:
    """The bridge blocks of a model, in the order in which they end."""
    regions = _Regions(flow)
    groups = [*_entries(flow, regions), *_exits(flow, regions)]
    found = set().union(*groups) if groups else set()
    for node in found:  # bridges that feed each other directly
        groups.append({node} | (flow.reach([node], lambda n: n.users, flow.is_layer_or_sum) & found))
    merged: list[set[fx.Node]] = []
    for group in groups:
        rest = [m for m in merged if not m & group]
        merged = [*rest, group.union(*(m for m in merged if m & group))]
    place = {n: i for i, n in enumerate(flow.nodes)}
    return sorted((flow.block(m) for m in merged if m), key=lambda b: place[b.outputs[-1]])


def _branches(flow: Flow, node: fx.Node) -> list[set[fx.Node]]:
    """The layers of each term of a sum that no other term depends on."""
    terms = flow.before(node)
    above = {t: flow.reach([t], flow.before) | {t} for t in terms}
    others = {t: set().union(*(above[o] for o in terms if o is not t)) for t in terms}
    return [(above[t] - others[t]) & set(flow.layer) for t in terms]


def _entries(flow: Flow, regions: _Regions) -> Iterator[set[fx.Node]]:
    """From a local region into a global one."""
    for node in flow.nodes:
        if node not in flow.live or operation(node) not in LAYOUT | PRODUCTS:
            continue
        for source in filter(regions.is_local, flow.before(node)):
            behind = flow.reach([node], lambda n: n.users, flow.is_layer_or_sum) | {node}
            if not any(map(regions.is_global, behind)):
                continue
            while not flow.is_layer_or_sum(source) and len(flow.before(source)) == 1:
                source = flow.before(source)[0]
            if flow.is_layer(source) and regions.is_local(source):
                yield {source}
            while flow.is_sum(source):
                branch = {n for b in _branches(flow, source) for n in b if regions.is_local(n)}
                if branch:
                    yield branch | {n for n in behind if flow.is_layer(n) and regions.is_global(n)}
                    break
                source = flow.before(source)[0]


def _exits(flow: Flow, regions: _Regions) -> Iterator[set[fx.Node]]:
    """From a global region, or from attention itself, back into a local one."""
    for layer in flow.layer:
        if not regions.is_local(layer):
            continue
        above = flow.reach([layer], flow.before, flow.is_layer)
        if not any(map(regions.is_global, above)):
            continue
        yield {layer}
        behind = flow.reach([layer], lambda n: n.users, flow.is_layer_or_sum)
        after = flow.reach([layer], lambda n: n.users) | {layer}
        for join in behind:
            if operation(join) == "cat" and not set(flow.before(join)) <= after:
                fusing = flow.reach([join], lambda n: n.users, flow.is_layer_or_sum) & set(flow.layer)
                yield {n for n in fusing if not regions.is_global(n)}
        if above & regions.attention:
            for end in filter(flow.is_sum, behind):
                yield next((b for b in _branches(flow, end) if layer in b), set())


def trace(model: nn.Module, images: Tensor) -> Flow | None:
    """The flow of a model, None where PyTorch cannot export it (then nothing is known of its bridges)."""
    try:
        return Flow(model, images)
    except Exception as error:  # torch.export raises errors of many kinds
        log.warning("No bridge blocks: %s cannot be exported (%s).", type(model).__name__, str(error).split("\n")[0])
        return None

"""Channels last to channels first: matrix products on maps written as the 1x1 convolutions they are.

PyTorch runs a perceptron on maps fastest as linear layers between two permutations, which cost nothing there. Runtimes
store maps channels first (or blocked) and copy at each permutation; on a convolution they fold activations and sums.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_TO_LAST, _TO_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]
_EACH = {"Gelu", "Relu", "Sigmoid", "HardSwish", "Clip", "Tanh", "Erf"}  # of one value each


def products_on_maps(graph: Any) -> int:
    """Rewrite, in place, each chain Transpose, products and activations, Transpose back; returns how many."""
    weights = {weight.name: weight for weight in graph.initializer}
    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    chains = [_chain(node, weights, users) for node in graph.node if _order(node) == _TO_LAST]
    for chain in filter(None, chains):
        _rewrite(graph, chain, weights)
    kept = {name for node in graph.node for name in node.input}
    for weight in [w for w in graph.initializer if w.name not in kept]:
        graph.initializer.remove(weight)
    return sum(map(bool, chains))


def _order(node: Any) -> list[int] | None:
    return [*next((a.ints for a in node.attribute), [])] if node.op_type == "Transpose" else None


def _chain(start: Any, weights: dict[str, Any], users: dict[str, list[Any]]) -> list[Any] | None:
    """The nodes from one transposition to the one that undoes it, if all between works on channels alone."""
    chain = [start]
    while True:
        readers = users.get(chain[-1].output[0], [])
        if len(readers) != 1:
            return None
        node, before = readers[0], chain[-1].output[0]
        chain.append(node)
        if _order(node) == _TO_FIRST:
            return chain if any(part.op_type == "MatMul" for part in chain) else None
        others = [name for name in node.input if name and name != before]
        ranks = [len(weights[name].dims) if name in weights else None for name in others]
        product = node.op_type == "MatMul" and node.input[0] == before and ranks == [2]
        shift = node.op_type in ("Add", "Mul") and ranks in ([0], [1])
        if not (product or shift or (node.op_type in _EACH and set(ranks) <= {0})):
            return None


def _rewrite(graph: Any, chain: list[Any], weights: dict[str, Any]) -> None:
    from onnx import helper, numpy_helper

    def constant(name: str, array: np.ndarray, suffix: str) -> str:
        made = f"{name}_{suffix}"
        if made not in weights:
            weights[made] = numpy_helper.from_array(np.ascontiguousarray(array), made)
            graph.initializer.append(weights[made])
        return made

    first, *middle, last = chain
    now = first.input[0]  # what the next node reads
    skip = None
    for node, following in zip(middle, [*middle[1:], last], strict=True):
        if node is skip:  # the convolution before adds it
            graph.node.remove(node)
            continue
        others = [name for name in node.input if name in weights]
        if node.op_type == "MatMul":
            matrix = numpy_helper.to_array(weights[others[0]])  # (in, out)
            inputs, output = [now, constant(others[0], matrix.T[..., None, None], "1x1")], node.output[0]
            shift = next((name for name in following.input if name in weights), None)
            if following.op_type == "Add" and [*weights[shift].dims] == [matrix.shape[1]]:
                inputs, output, skip = [*inputs, shift], following.output[0], following
            made = helper.make_node("Conv", inputs, [output], name=node.name, kernel_shape=[1, 1])
            graph.node.insert([*graph.node].index(node), made)
            graph.node.remove(node)
            now = output
            continue
        if node.op_type in ("Add", "Mul") and len(weights[others[0]].dims) == 1:
            array = numpy_helper.to_array(weights[others[0]])
            node.input[[*node.input].index(others[0])] = constant(others[0], array[:, None, None], "map")
        node.input[next(i for i, name in enumerate(node.input) if name not in weights)] = now
        now = node.output[0]
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name == last.output[0]:
                node.input[i] = now
    graph.node.remove(first)
    graph.node.remove(last)

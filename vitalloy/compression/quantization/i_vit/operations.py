"""Graphs of operations: a model as one, their names, which of them only move entries about."""

from __future__ import annotations

import operator
from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor, fx, nn

from vitalloy.errors import CompressionError

# entries move, or some of them are taken; the scale of the whole stays
PERMUTING = {"permute", "transpose", "movedim", "mT", "t"}
SUBSETS = {"select", "slice"}
SPLITTING = {"split", "split_with_sizes", "chunk"}  # written as slices
MOVING = {
    *(PERMUTING | SUBSETS),
    *("flatten", "unflatten", "view", "reshape", "_unsafe_view", "view_as", "squeeze", "unsqueeze"),
    *("unbind", "getitem", "expand", "expand_as", "repeat", "roll", "flip"),
    *("index_select", "pad", "constant_pad_nd", "pixel_shuffle", "pixel_unshuffle"),
}
NOTHING = {"contiguous", "clone", "detach", "alias", "to", "type_as", "dropout", "lift_fresh_copy"}  # for a value
PREPROCESSING = MOVING | {"upsample_bilinear2d", "upsample_bicubic2d", "upsample_nearest2d"}  # of the image, in float


def name_of(node: fx.Node) -> str:
    """ "add" for aten.add.Tensor and aten.add_.Tensor."""
    if node.target is operator.getitem:
        return "getitem"
    schema = getattr(node.target, "_schema", None)
    return str(node.target) if schema is None else schema.name.split("::")[-1].rstrip("_")


def along(scale: Tensor, operation: Callable, ndim: int, *args: object) -> Tensor:
    """What a permutation or a selection of a tensor of `ndim` dimensions does to its scale."""
    scale = scale.reshape(*[1] * (ndim - scale.ndim), *scale.shape)
    kind = operation._schema.name.split("::")[-1]
    if kind in SUBSETS and scale.shape[args[0]] == 1:
        return scale.select(args[0], 0) if kind == "select" else scale
    return operation(scale, *args)


def export(model: nn.Module, example: Tensor) -> fx.GraphModule:
    """The model's operations for any number of images like `example` (2, C, H, W)."""
    batch = ({0: torch.export.Dim.DYNAMIC},)
    try:
        with torch.no_grad():
            program = torch.export.export(model, (example,), dynamic_shapes=batch, strict=False)
        return _sliced(program.module(check_guards=False))
    except Exception as error:  # the exporter raises anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise CompressionError(
            f"{type(model).__name__} cannot be written as one graph for integers, because its forward pass depends on "
            f"values or the number of images ({reason}). Use another method, such as 'easyquant'."
        ) from error


def _sliced(module: fx.GraphModule) -> fx.GraphModule:
    """Parts taken one by one: ONNX Runtime splits no integers of 8 or 16 bits into a sequence."""
    graph = module.graph
    for node in [n for n in graph.nodes if n.op == "call_function" and name_of(n) in SPLITTING]:
        axis = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
        ends = list(accumulate(part.shape[axis] for part in node.meta["val"]))
        for part in list(node.users):
            i = part.args[1]
            with graph.inserting_before(part):
                bounds = (axis, ends[i] - node.meta["val"][i].shape[axis], ends[i])
                taken = graph.call_function(torch.ops.aten.slice.Tensor, (node.args[0], *bounds))
            taken.meta = part.meta
            part.replace_all_uses_with(taken)
            graph.erase_node(part)
        graph.erase_node(node)
    module.recompile()
    return module


class IntegerModel(fx.GraphModule):
    """A converted model; what it knows of itself survives copies."""

    @property
    def float_nodes(self) -> list[str]:
        """Operations that are left in floating point."""
        return self.meta["float_nodes"]

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W) of its images."""
        return self.meta["image_shape"]

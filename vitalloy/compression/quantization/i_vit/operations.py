"""Graphs of operations: a model as one, their names, which of them only move entries about."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from vitalloy.errors import CompressionError

# entries move, or some of them are taken; the scale of the whole stays
PERMUTING = {"permute", "transpose", "movedim", "mT", "t"}
SUBSETS = {"select", "slice"}
MOVING = {
    *(PERMUTING | SUBSETS),
    *("flatten", "unflatten", "view", "reshape", "_unsafe_view", "view_as", "squeeze", "unsqueeze"),
    *("unbind", "split", "split_with_sizes", "chunk", "getitem", "expand", "expand_as", "repeat", "roll", "flip"),
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
        return program.module(check_guards=False)
    except Exception as error:  # the exporter raises anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise CompressionError(
            f"{type(model).__name__} cannot be written as one graph for integers, because its forward pass depends on "
            f"values or the number of images ({reason}). Use another method, such as 'easyquant'."
        ) from error


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

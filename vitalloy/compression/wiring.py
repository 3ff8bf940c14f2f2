"""Which module made what another takes, in any model: read from the autograd graph of one pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Pick = Callable[[nn.Module], bool]
_MOVES = {  # operations of the autograd graph that move, drop or repeat values, and compute none
    *("View", "UnsafeView", "ReshapeAlias", "AsStrided", "Alias", "Clone", "ToCopy", "Transpose", "T", "Permute"),
    *("Movedim", "Unsqueeze", "Squeeze", "Expand", "Repeat", "Select", "Slice", "Index", "IndexSelect", "Unbind"),
    *("Split", "SplitWithSizes", "Chunk", "Cat", "Stack", "Roll", "Flip", "Gather", "ConstantPadNd", "Unfold"),
    *("Copy", "CopySlices", "PixelUnshuffle", "PixelShuffle"),
}


def makers(
    model: nn.Module, images: Tensor, made_by: Pick, taken_by: Pick
) -> dict[nn.Module, list[set[nn.Module | None]]]:
    """For each module that `taken_by` picks and that runs, who made its tensor arguments, one set for each of them.

    A maker is a module that `made_by` picks, whose output arrives with its values moved at most; None stands for
    anything else. A module that runs several times has the makers of all its calls.

    Args:
        model: in evaluation mode; not changed.
        images: (N, C, H, W), a few.
    """
    nodes: dict[object, nn.Module] = {}  # what made a module's output -> the module
    taken: dict[nn.Module, list[set[nn.Module | None]]] = {}
    held = []  # the graph's nodes are told apart by identity, so all must live until the end

    def left(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(output, Tensor) and output.grad_fn is not None:
            nodes[output.grad_fn] = module
            held.append(output)

    def entered(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found = [_search(arg.grad_fn, nodes) for arg in args if isinstance(arg, Tensor)]
        before = taken.setdefault(module, [set() for _ in found])
        for known, new in zip(before, found, strict=False):
            known |= new

    hooks = [m.register_forward_hook(left) for m in model.modules() if made_by(m)]
    hooks += [m.register_forward_pre_hook(entered) for m in model.modules() if taken_by(m)]
    try:
        with torch.enable_grad():
            model(images.clone().requires_grad_())
    finally:
        for hook in hooks:
            hook.remove()
    return taken


def _search(node: object, nodes: dict[object, nn.Module]) -> set[nn.Module | None]:
    found, todo, done = set(), [node], set()
    while todo:
        node = todo.pop()
        if node in done:
            continue
        done.add(node)
        if node in nodes:
            found.add(nodes[node])
        elif node is not None and node.name().partition("Backward")[0] in _MOVES:
            todo += [before for before, _ in node.next_functions]
        else:
            found.add(None)
    return found

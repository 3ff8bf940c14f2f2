"""Which layers of a backbone become binary, and the change itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitalloy.compression.quantization.bivit.layers import Binary, BinaryAttend, BinaryConv2d, BinaryLinear
from vitalloy.layers import sockets
from vitalloy.layers.attention import Attend


def called(model: nn.Module, images: Tensor) -> list[nn.Module]:
    """The plain linear layers and convolutions in the order in which a forward pass first calls them.

    A layer whose weight is read without a call, such as a projection that was folded into a table, is not among them.
    """
    order: dict[nn.Module, None] = {}
    layers = [m for m in model.modules() if type(m) in (nn.Linear, nn.Conv2d)]
    hooks = [m.register_forward_hook(lambda m, _args, _out: order.setdefault(m)) for m in layers]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return list(order)


def pointwise(layer: nn.Module) -> bool:
    """Whether a layer is a matrix with rows of two weights or more; a single weight, centred, has no sign."""
    if isinstance(layer, nn.Linear):
        return layer.in_features > 1
    return layer.kernel_size == (1, 1) and layer.groups == 1 and not any(layer.padding) and layer.in_channels > 1


def binarizable(model: nn.Module, images: Tensor) -> list[nn.Module]:
    """What becomes binary: all called linear layers and dense 1x1 convolutions but the embedding and the classifier.

    The embedding is the first layer that a forward pass calls, the classifier what `get_classifier` tells, or the last.
    """
    order = called(model, images)
    heads = getattr(model, "get_classifier", lambda: None)()
    heads = heads if isinstance(heads, (tuple, list)) else [heads]
    last = {m for head in heads if isinstance(head, nn.Module) for m in head.modules()}.intersection(order)
    spared = {*order[:1], *(last or order[-1:])}
    return [layer for layer in order if layer not in spared and pointwise(layer)]


def attention_layers(model: nn.Module) -> set[nn.Module]:
    """Every module inside one that owns an `Attend`: the projections before and behind it."""
    owners = {name.rpartition(".")[0] for name in sockets.find(model, Attend)}
    return {m for owner in owners for m in model.get_submodule(owner).modules()}


def binarize(
    model: nn.Module,
    layers: list[nn.Module] | None = None,
    *,
    mlp_activations: int = 32,
    scale: str = "learned",
    softmax: bool = True,
    sign_of_zero: int = 0,
) -> nn.Module:
    """Make attention, projections and perceptrons binary, in place; weights stay, and learned scales start from them.

    Args:
        layers: the linear layers and dense 1x1 convolutions to change; all without a list. Those inside a module that
            owns an `Attend` take signs, the others (perceptrons) inputs of `mlp_activations` bits, 1 or 32.
        scale, sign_of_zero: see `BinaryLinear`.
        softmax: see `BinaryAttend`.

    Returns:
        The model.
    """
    chosen = {m for m in model.modules() if type(m) in (nn.Linear, nn.Conv2d) and pointwise(m)}
    chosen = chosen if layers is None else chosen & set(layers)
    attention = attention_layers(model)

    def make(_name: str, layer: nn.Module) -> nn.Module:
        if type(layer) is Attend:
            return BinaryAttend(layer.dropout, softmax=softmax, sign_of_zero=sign_of_zero)
        if layer not in chosen:
            return layer
        kind = BinaryLinear if isinstance(layer, nn.Linear) else BinaryConv2d
        bits = 1 if layer in attention else mlp_activations
        return kind.of(layer, activation_bits=bits, scale=scale, sign_of_zero=sign_of_zero)

    sockets.replace(model, (nn.Linear, nn.Conv2d, Attend), make)
    return model


def perceptron_layers(model: nn.Module) -> list[nn.Module]:
    """The binary layers outside attention."""
    attention = attention_layers(model)
    return [m for m in model.modules() if isinstance(m, Binary) and m not in attention]

"""How large a model is and how much it computes for one image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitalloy.registry import create_model, entry


@dataclass(frozen=True)
class Complexity:
    """`params`: number of trained values. `macs`: multiply-accumulates for one input."""

    params: int
    macs: int


def count(model: nn.Module, input_size: Sequence[int] = (3, 224, 224)) -> Complexity:
    """Count parameters, and the multiply-accumulates of one forward pass in eval mode on a batch of one.

    Args:
        model: left as it was, training flags included.
        input_size: the shape of one input without the batch axis, such as (3, 224, 224).

    Matrix products, convolutions and both products of attention count, fused attention too. Element-wise work
    (normalisation, softmax, activations, biases) does not: this is what papers print as "FLOPs".
    """
    parameters = list(model.parameters())
    like = next((p for p in parameters if p.is_floating_point()), torch.empty(0))
    image = torch.zeros(1, *input_size, dtype=like.dtype, device=like.device)
    training = {module: module.training for module in model.modules()}
    model.eval()
    # The plain path of attention is made of matrix products, so every one of them is seen whatever the device would
    # fuse.
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(image)
    finally:
        for module, mode in training.items():
            module.training = mode
    return Complexity(sum(p.numel() for p in parameters), counter.get_total_flops() // 2)


def about_models(names: Sequence[str]) -> list[dict[str, Any]]:
    """What a reader wants to know of our models: name, params, macs, input, top1, note, checkpoints.

    Nothing is allocated: the models are built and counted on PyTorch's meta device.
    """
    rows = []
    for name in names:
        found = entry(name)
        input_size = found.cfg["input_size"]
        with torch.device("meta"):
            work = count(create_model(name), input_size)
        variant = found.variant
        rows.append(
            {
                "name": name,
                "params": work.params,
                "macs": work.macs,
                "input": list(input_size[1:]),  # height and width, behind the frames of a clip
                "top1": variant.top1,
                "note": variant.note,
                "checkpoints": list(variant.checkpoints),
            }
        )
    return rows

"""Int8 inside PyTorch without calibration: torchao's dynamic quantization of linear layers, meant for CUDA.

Weights are int8 per channel, inputs are rounded per token in every call; convolutions, attention, norms and activations
stay float. Runs on the CPU too, where it is for checking the accuracy: each call rounds in separate passes there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from vitalloy.deployment._common import at_rest, deployable, quiet, reason
from vitalloy.errors import ExportError


def quantize_dynamic(model: nn.Module, device: str | None = None) -> Callable[[Tensor], Tensor]:
    """An int8 copy of a model on a device.

    Args:
        model: takes (B, C, H, W) and returns one tensor; not changed.
        device: where the copy computes; None is CUDA where there is one, else the CPU. Compiled on CUDA, at the first
            call with each batch size.

    Returns:
        images (B, C, H, W) -> logits (B, classes) on the CPU, without gradients.

    Raises:
        ExportError: torchao is missing, the model has no linear layer, or it cannot be quantized.
    """
    try:
        with quiet():
            from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError as error:
        raise ExportError(f"torchao is not installed ({error}): pip install 'vitalloy[torchao]'.") from error
    if not any(isinstance(layer, nn.Linear) for layer in model.modules()):
        raise ExportError(f"{type(model).__name__} has no linear layer: torchao quantizes nothing else dynamically.")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        with at_rest(model), quiet():
            own = deployable(model)
            own = (copy.deepcopy(model) if own is model else own).to(place)
            quantize_(own, Int8DynamicActivationInt8WeightConfig())
            run = torch.compile(own) if place.type == "cuda" else own
    except Exception as error:  # torchao raises whatever its steps raise
        raise ExportError(f"{type(model).__name__} could not be quantized by torchao: {reason(error)}.") from error

    def call(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return run(images.to(place)).float().cpu()

    return call

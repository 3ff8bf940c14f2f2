"""I-ViT: a vision transformer, or any other backbone of this library, in integers alone.

Linear layers, convolutions and attention multiply 8-bit integers; softmax, GELU, LayerNorm, residuals, position tables
and pooling are integers too, made of shifts, sums and a few integer divisions. For chips without floating-point units,
and as the strictest form of 8 bits for any other. Between the quantized image and the scaled logits no floating-point
number is left:

    model = quantize(model, images)                      # simulation: trains, stores and loads like any model
    runtime = to_integer(model)                          # the same integers, in integer tensors
    export_integer_onnx(runtime, images, "model.onnx")   # MatMulInteger, ConvInteger, shifts

"I-ViT: Integer-only Quantization for Efficient Vision Transformer Inference", Li and Gu, ICCV 2023, arXiv 2207.01405.

Departures: any model that exports as one graph is converted, not three families. Scales are part of the state dict.
The reciprocals in softmax and GELU have 46 bits where the authors' 31 leave errors of several percent, and more where
steps are small; the trunk keeps 16 bits behind Swin's patch mergings; means are not rounded before they are requantized
(`as_published=True` gives the authors' forms of all three). A fixed attention mask is whole steps of the
logits. Softmax has 16 bits, as in the authors' DeiT; `softmax_bits=8` is their Swin. Training has label smoothing, but
neither mixup nor erasing: those belong to the images that are given. The default learning rate is for the small models
that are trained with this library; the authors take 2e-7 to 2e-6 for ImageNet models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from vitalloy.compression.finetune import finetune
from vitalloy.compression.quantization.i_vit.exporting import export_integer_onnx
from vitalloy.compression.quantization.i_vit.graph import convert
from vitalloy.compression.quantization.i_vit.integer import to_integer
from vitalloy.compression.quantization.i_vit.layers import QuantAct
from vitalloy.compression.quantization.i_vit.operations import IntegerModel
from vitalloy.errors import CompressionError

__all__ = [
    "IntegerModel",
    "calibrate",
    "convert",
    "export_integer_onnx",
    "finetune",
    "freeze",
    "quantize",
    "to_integer",
]


def quantize(
    model: nn.Module,
    images: Tensor,
    *,
    weights: int = 8,
    activations: int = 8,
    train: Iterable[tuple[Tensor, Tensor]] | None = None,
    epochs: int = 10,
    lr: float = 1e-4,
    softmax_bits: int = 16,
    as_published: bool = False,
    allow_float: bool = False,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> IntegerModel:
    """Convert a model to integers, calibrate its grids, and train it on them if there is something to train on.

    Args:
        model: images (B, C, H, W) -> logits, its batch norms folded. Its parameters are used, and trained.
        images: calibration images (N, C, H, W).
        weights, activations: bits; the method is for 8 and 8.
        train: images and labels, iterated once an epoch; without it nothing is trained.
        epochs: of training.
        lr: the largest learning rate; AdamW with a cosine to a fifteenth of it and no warm-up, as published.
        softmax_bits, as_published, allow_float: see `convert`.
        batch_size: images of a calibration step.
        progress: called with (steps done, steps in all); an epoch is a step.

    Returns:
        The simulation of the integer model; `to_integer` makes the runtime. Its `float_nodes` lists what is left in
        floating point.

    Raises:
        CompressionError: other bits, or a model that has no integer form.
    """
    for name, bits in (("weights", weights), ("activations", activations)):
        if bits != 8:
            raise CompressionError(f"{name}={bits}: I-ViT computes with 8 bits. Use 8, or another method.")
    if softmax_bits not in (8, 16):
        raise CompressionError(f"softmax_bits={softmax_bits}: attention maps of I-ViT have 8 or 16 bits.")
    made = convert(model, images, softmax_bits=softmax_bits, as_published=as_published, allow_float=allow_float)
    batches = images.split(batch_size)
    steps = len(batches) + (epochs if train is not None else 0)
    calibrate(made, batches, progress and (lambda done, _: progress(done, steps)))
    if train is not None:
        follow(made, True)  # the grids follow the training images meanwhile, and are kept afterwards
        report = progress and (lambda done, _: progress(len(batches) + done, steps))
        finetune(made, train, epochs=epochs, lr=lr, progress=report)
        freeze(made)
    return made


def follow(model: nn.Module, running: bool) -> None:
    """Whether the grids follow what passes."""
    for module in model.modules():
        if isinstance(module, QuantAct):
            module.running = running


def freeze(model: nn.Module) -> nn.Module:
    """Keep all grids as they are."""
    follow(model, False)
    return model


@torch.no_grad()
def calibrate(
    model: nn.Module, batches: Iterable[Tensor], progress: Callable[[int, int], None] | None = None
) -> nn.Module:
    """Let the grids of a converted model follow these images, then keep them."""
    batches = list(batches)
    follow(model, True)
    for done, batch in enumerate(batches, 1):
        model(batch)
        if progress is not None:
            progress(done, len(batches))
    return freeze(model)

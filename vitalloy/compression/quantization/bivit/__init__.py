"""BiViT: vision transformers with one-bit weights and one-bit attention.

For people who need a model some tens of times smaller and can train it on: the binary model without training is only a
starting point. "BiViT: Extremely Compressed Binary Vision Transformer" (He, Lou, Zhang, Liu, Wu, Zhou, Zhuang; ICCV
2023, arXiv 2211.07091). The authors published the layers; the staging and the recipe follow the paper's text.

What becomes binary, on any backbone:

- every `Attend`: q, k and v by their signs, the map as zeros and ones that follow the softmax;
- linear layers and dense 1x1 convolutions inside a module that owns an `Attend`: binary weights and inputs;
- all other ones (perceptrons, and whatever else mixes channels of one place, such as patch merging, the narrow layers
  of an excitation and the expansions of a mobile block): binary weights, float inputs or, with `mlp_activations=1`,
  signs.

Float stay the embedding (the first layer called), the classifier, convolutions larger than 1x1 or in groups, norms,
positions, attention that is not the socket's, and rows of a single weight.

Departures: the sign of 0 is -1 (`sign_of_zero=0` is the published ternary sign), because bits have no zero and the
model that is trained should be the one that runs; logits of signs are always divided by sqrt(d), as published, and not
scaled by what a backbone uses for its float queries; learned scales are set from the float weights at once and not in
the first call, which stays for checkpoints without them.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from vitalloy.compression.finetune import finetune
from vitalloy.compression.quantization.bivit.convert import binarizable, binarize, perceptron_layers
from vitalloy.compression.quantization.bivit.layers import (
    SCALES,
    BinaryAttend,
    BinaryConv2d,
    BinaryLinear,
    sign,
    softmax_aware,
    zero_one,
)
from vitalloy.compression.quantization.bivit.packed import load_packed, packed, packed_bytes, save_packed
from vitalloy.errors import CompressionError

__all__ = [
    "BinaryAttend",
    "BinaryConv2d",
    "BinaryLinear",
    "binarize",
    "load_packed",
    "packed",
    "packed_bytes",
    "quantize",
    "save_packed",
    "sign",
    "softmax_aware",
    "zero_one",
]

log = logging.getLogger("vitalloy")


def quantize(
    model: nn.Module,
    images: Tensor,
    *,
    weights: int = 1,
    activations: int = 1,
    mlp_activations: int = 32,
    scale: str = "learned",
    softmax: bool = True,
    sign_of_zero: int = -1,
    train: Iterable[tuple[Tensor, Tensor]] | None = None,
    epochs: int = 20,
    lr: float = 1e-3,
    stages: int = 2,
    distillation: float = 0.5,
    progress: Callable[[int, int], None] | None = None,
    seed: int = 0,
) -> nn.Module:
    """Make a model binary and, given training data, train it.

    Args:
        model: a float classifier, changed in place.
        images: (N, C, H, W); one is sent through the model to see which layers it calls. Nothing is calibrated.
        weights, activations: 1, of the binary layers and of attention.
        mlp_activations: bits of the inputs of perceptrons, 1 or 32 (float).
        scale: of each channel of a weight, "learned", or "mean" as in earlier binary networks.
        softmax: the softmax-aware attention map; False gives the published baseline, 1 where the logit is positive.
        sign_of_zero: -1, which packs into bits, or 0 as published, which does not.
        train: batches (images, labels), iterated once an epoch. Without it the model is only initialised.
        epochs, lr: of each stage; the rate falls to a fifteenth by a cosine.
        stages: 2 trains with float inputs of perceptrons before these become binary (only with `mlp_activations=1`);
            1 does all at once.
        distillation: share of the loss that is the distance from the float model's answer, 0 to 1.
        progress: is told (epochs done, epochs).
        seed: of dropout in training.

    Returns:
        The model, in evaluation mode. `packed` turns it into bits.

    Raises:
        CompressionError: an option out of range, or nothing to make binary.
    """
    _check(weights=(weights, (1,)), activations=(activations, (1,)), mlp_activations=(mlp_activations, (1, 32)))
    _check(scale=(scale, SCALES), sign_of_zero=(sign_of_zero, (-1, 0)), stages=(stages, (1, 2)))
    if not 0 <= distillation <= 1:
        raise CompressionError(f"bivit takes distillation from 0 to 1; it got {distillation!r}.")
    layers = binarizable(model, images[:1])
    if not layers:
        raise CompressionError(f"{type(model).__name__} has no linear layer or 1x1 convolution to make binary.")
    teacher = copy.deepcopy(model).eval().requires_grad_(False) if train is not None and distillation else None
    staged = mlp_activations == 1 and stages == 2 and train is not None
    first = 32 if staged else mlp_activations
    binarize(model, layers, mlp_activations=first, scale=scale, softmax=softmax, sign_of_zero=sign_of_zero)
    if train is None:
        log.warning("Without training data the binary model is only initialised: expect it to know little.")
        return model.eval()

    total = epochs * (2 if staged else 1)
    with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
        torch.manual_seed(seed)
        for stage in range(2 if staged else 1):
            if stage:
                for layer in perceptron_layers(model):
                    layer.activation_bits = mlp_activations
            finetune(
                model,
                train,
                epochs=epochs,
                lr=lr,
                teacher=teacher,
                alpha=distillation,
                progress=progress and (lambda done, _, before=stage * epochs: progress(before + done, total)),
            )
    return model.eval()


def _check(**options: tuple[object, tuple[object, ...]]) -> None:
    for name, (given, allowed) in options.items():
        if given not in allowed:
            choices = " or ".join(map(repr, allowed))
            raise CompressionError(f"bivit takes {name}={choices}; it got {given!r}.")

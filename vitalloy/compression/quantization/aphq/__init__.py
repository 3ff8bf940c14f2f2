"""APHQ-ViT: 3- and 4-bit post-training quantization by reconstruction with an average perturbation Hessian.

For whoever has a trained model, some unlabelled images and minutes, and needs fewer bits than a search of scales gives.

"APHQ-ViT: Post-Training Quantization with Average Perturbation Hessian Based Reconstruction for Vision Transformers",
Wu et al., CVPR 2025, arXiv 2504.02508. Code: GoatWu/APHQ-ViT, Apache-2.0, for ViT, DeiT and Swin on a GPU.

In order: perceptrons get ReLU and are refitted (`mlp`), grids are searched layer by layer, with norms absorbing the
differences between channels (`layerwise`, `search`), then the rounding of weights and the scales of activations learn
each block's float output (`reconstruction`, `adaround`), errors weighted by what matters (`hessian`).

Where this departs from the authors' code, and why:
- The Hessian comes from pushes of random signs; theirs measures rounding noise (`hessian`; perturbation="ones").
- Units and perceptrons are found by rules instead of names, so that any backbone works (`units`, `mlp`). Convolutions
  beyond the patch embedding, which their models lack, have their inputs quantized. What takes the images does not.
- A search sees samples of a layer's rows, and linear layers of more than 4 bits are searched as convolutions
  (`layerwise`). Quantiles are exact; theirs average over chunks beyond 2^24 values.
- 300 steps a unit instead of 20 000, at rates that are higher accordingly.
- One scale a tensor at every width. At 2 bits they train a scale for every token, which fixes the image size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import count

from torch import Tensor, nn

from vitalloy.compression.quantization.aphq.hessian import STEPS, perturbation_report
from vitalloy.compression.quantization.aphq.layerwise import calibrate
from vitalloy.compression.quantization.aphq.mlp import find_perceptrons, reconstruct_mlps
from vitalloy.compression.quantization.aphq.reconstruction import reconstruct
from vitalloy.compression.quantization.aphq.units import find_units
from vitalloy.compression.quantizers import Uniform
from vitalloy.compression.simulated import simulate
from vitalloy.errors import CompressionError

__all__ = ["perturbation_report", "quantize"]

BITS = range(2, 9)
RECONSTRUCTIONS = ("aphq", "mse", "none")


def quantize(
    model: nn.Module,
    images: Tensor,
    *,
    weights: int = 4,
    activations: int = 4,
    perturbation: str = "rademacher",
    mlp_reconstruction: bool = True,
    reconstruction: str = "aphq",
    iterations: int = 300,
    mlp_iterations: int = 300,
    rounding_rate: float = 1e-2,
    scale_rate: float = 4e-4,
    mlp_rate: float = 4e-4,
    calibration_images: int = 128,
    batch_size: int = 32,
    qdrop: float = 0.5,
    rounds: int = 3,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """Quantize a classifier in place and return it.

    Args:
        model: evaluation mode, batch norms folded.
        images: (N, C, H, W), unlabelled; published: 1024.
        weights, activations: bits, 2 to 8.
        perturbation: the push behind the Hessian: "rademacher" (random signs) or "ones" (as published).
        mlp_reconstruction: swap GELU for ReLU in perceptrons and refit them, weighted by the Hessian.
        reconstruction: learn the rounding unit by unit, weighted by the Hessian ("aphq") or not ("mse"); or stop
            after the search of grids, weights rounded to nearest ("none").
        iterations, mlp_iterations: steps for each unit and for each perceptron; published: 20000.
        rounding_rate, scale_rate, mlp_rate: learning rates of the rounding (published 1e-3), of activation scales and
            of perceptrons (4e-5, both falling to 0 along a cosine).
        calibration_images: how many of the images the search and the Hessian see.
        qdrop: probability that a value is quantized during reconstruction.
        rounds: of the search of a layer's weight and input in turns.
        progress: is told (steps done, all steps).

    Raises:
        CompressionError: bits out of range, or an unknown perturbation or reconstruction.
    """
    for name, bits in (("weights", weights), ("activations", activations)):
        if bits not in BITS:
            raise CompressionError(f"{name}={bits}: aphq takes {BITS[0]} to {BITS[-1]} bits.")
    if perturbation not in STEPS:
        raise CompressionError(f"perturbation={perturbation!r}: use {' or '.join(map(repr, STEPS))}.")
    if reconstruction not in RECONSTRUCTIONS:
        raise CompressionError(f"reconstruction={reconstruction!r}: use {', '.join(map(repr, RECONSTRUCTIONS))}.")
    model.eval().requires_grad_(False)
    layers = simulate(model)
    units = find_units(model, images) if reconstruction != "none" else []
    perceptrons = find_perceptrons(model, images) if mlp_reconstruction else []
    total = len(perceptrons) * mlp_iterations + len(layers) + len(units) * iterations
    done = count(1)

    def step() -> None:
        if progress:
            progress(next(done), total)

    shared = {"batch_size": batch_size, "seed": seed, "progress": step}
    reconstruct_mlps(
        model,
        perceptrons,
        images,
        activations,
        iterations=mlp_iterations,
        learning_rate=mlp_rate,
        perturbation=perturbation,
        hessian_images=calibration_images,
        **shared,
    )
    calibrate(model, layers, images[:calibration_images], weights, activations, rounds=rounds, **shared)
    reconstruct(
        model,
        _float_twin(model),
        units,
        images,
        iterations=iterations,
        rounding_rate=rounding_rate,
        scale_rate=scale_rate,
        perturbation=perturbation if reconstruction == "aphq" else None,
        hessian_images=calibration_images,
        qdrop=qdrop,
        **shared,
    )
    return model


def _float_twin(model: nn.Module) -> nn.Module:
    """A copy whose quantizers do nothing."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        for place, child in module.named_children():
            if isinstance(child, Uniform):
                setattr(module, place, nn.Identity())
    return twin

"""The average perturbation Hessian: how much a push at a layer's output changes the gradient that comes back.

The loss is the divergence from the model's own answer, softened by a temperature. Its gradient g at a layer's output is
taken with the output pushed by +step * v and by -step * v; |g+ - g-|, averaged over the images, estimates how much an
error of each value matters.

The authors push every value alike (v = 1, step 1e-6). A layer norm subtracts the mean over channels, so in a model with
norms before each part the answer does not depend on such a push at all: in exact arithmetic the estimate is zero, and
what is used in float32 is rounding noise, which merely happens to be larger where gradients are. `perturbation_report`
measures this on any model. The default here is a push of random signs, in proportion to the output, for which
|g+ - g-| is a product of the Hessian with v as it is meant to be.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitalloy.errors import CompressionError

STEPS = {"rademacher": 1e-2, "ones": 1e-6}  # of the output's root mean square; as it is
TEMPERATURE = 20.0


def perturbation_hessian(
    model: nn.Module,
    layer: nn.Module,
    images: Tensor,
    perturbation: str = "rademacher",
    *,
    batch_size: int = 32,
    temperature: float = TEMPERATURE,
    seed: int = 0,
) -> Tensor:
    """mean over images of |g+ - g-| at the output of a layer that runs once in a pass: (1, ...).

    The loss is the mean over a batch, so the values scale with 1 / batch_size.

    Raises:
        CompressionError: an unknown perturbation.
    """
    if perturbation not in STEPS:
        raise CompressionError(f"perturbation={perturbation!r}: use {' or '.join(map(repr, STEPS))}.")
    generator = torch.Generator().manual_seed(seed)
    total: Tensor | float = 0.0
    for batch in images.split(batch_size):
        with torch.no_grad():
            answer = (model(batch) / temperature).softmax(-1)
        state = generator.get_state()
        gradients = []
        for sign in (1, -1):
            generator.set_state(state)  # both pushes along the same direction
            gradients.append(_gradient(model, layer, batch, answer, sign, perturbation, temperature, generator))
        total = total + (gradients[0] - gradients[1]).abs().sum(0, keepdim=True)
    return total / len(images)


def _gradient(
    model: nn.Module,
    layer: nn.Module,
    batch: Tensor,
    answer: Tensor,
    sign: int,
    perturbation: str,
    temperature: float,
    generator: torch.Generator,
) -> Tensor:
    outputs = []

    def push(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
        outputs.append(output.detach().requires_grad_())
        if perturbation == "ones":
            return outputs[0] + sign * STEPS["ones"]
        signs = torch.randint(0, 2, output.shape, generator=generator).to(output) * 2 - 1
        return outputs[0] + sign * STEPS["rademacher"] * output.square().mean().sqrt() * signs

    hook = layer.register_forward_hook(push)
    try:
        with torch.enable_grad():
            soft = (model(batch) / temperature).log_softmax(-1)
            loss = F.kl_div(soft, answer, reduction="batchmean")
            return torch.autograd.grad(loss, outputs[0], allow_unused=True, materialize_grads=True)[0]
    finally:
        hook.remove()


def unit_mean_square(hessian: Tensor) -> Tensor:
    """Scaled to a mean square of 1, as the reconstruction of perceptrons takes it; zeros stay zeros."""
    return hessian * (hessian.numel() / hessian.square().sum().clamp_min(torch.finfo(hessian.dtype).tiny)).sqrt()


def perturbation_report(
    model: nn.Module, images: Tensor, layers: Iterable[str] | None = None, *, batch_size: int = 32, seed: int = 0
) -> dict[str, dict[str, float]]:
    """What both perturbations measure on a float model, in float32 and in float64, by layer.

    Args:
        images: (N, C, H, W), 8 or more.
        layers: names of the layers; the units of reconstruction when None.

    Returns:
        By name: "ones" and "rademacher", mean |g+ - g-| in float32; "<which>_survives", the share of it that float64
        gives, near 0 for rounding noise and near 1 for a measurement; "noise_likeness", the correlation of the float32
        map of "ones" with the float64 map of "rademacher".
    """
    from vitalloy.compression.quantization.aphq.units import find_units

    single = copy.deepcopy(model).float().eval().requires_grad_(False)
    names = [unit.name for unit in find_units(single, images.float())] if layers is None else list(layers)
    double = copy.deepcopy(single).double()
    report = {}
    for name in names:
        row, maps = {}, {}
        for kind in STEPS:
            for net, dtype in ((single, torch.float32), (double, torch.float64)):
                layer = net.get_submodule(name)
                maps[kind, dtype] = perturbation_hessian(
                    net, layer, images.to(dtype), kind, batch_size=batch_size, seed=seed
                ).double()
            row[kind] = maps[kind, torch.float32].mean().item()
            row[f"{kind}_survives"] = maps[kind, torch.float64].mean().item() / max(row[kind], 1e-300)
        pair = torch.stack([maps["ones", torch.float32].flatten(), maps["rademacher", torch.float64].flatten()])
        row["noise_likeness"] = torch.corrcoef(pair)[0, 1].item()
        report[name] = row
    return report

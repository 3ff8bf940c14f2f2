"""Reconstruction of perceptrons: GELU becomes ReLU, and the two layers around it learn to give the old output.

What enters the second layer is then one-sided and, by a penalty on what exceeds a percentile, small: easier to
quantize. Perceptrons are found by what flows: a linear layer or 1x1 convolution whose output goes, unchanged, through
one GELU into another. Those with anything between (a depth-wise convolution, a norm) are left as they are.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vitalloy.compression.calibration import record
from vitalloy.compression.quantization.aphq.hessian import perturbation_hessian, unit_mean_square

PERCENTILES = {3: 0.99}  # by activation bits, as published
PERCENTILE = 0.98
HIDDEN_VALUES = 2**25  # that the percentile is taken over at most


def find_perceptrons(model: nn.Module, images: Tensor) -> list[tuple[str, str, str]]:
    """Names of (first layer, GELU, second layer), each called once in a pass, in the order of the model's modules."""
    made: dict[nn.Module, list[Tensor]] = {}
    taken: dict[nn.Module, list[Tensor]] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        made.setdefault(module, []).append(output)
        taken.setdefault(module, []).append(args[0])

    names = {module: name for name, module in model.named_modules()}
    layers = [module for module in names if _is_linear(module)]
    acts = [module for module in names if isinstance(module, nn.GELU)]
    hooks = [module.register_forward_hook(keep) for module in layers + acts]
    with torch.no_grad():
        model(images[:2])
    for hook in hooks:
        hook.remove()
    once = [module for module in layers if len(made.get(module, ())) == 1]
    found = []
    for act in acts:
        if len(made.get(act, ())) == 1:
            first = [layer for layer in once if made[layer][0] is taken[act][0]]
            second = [layer for layer in layers if any(x is made[act][0] for x in taken.get(layer, ()))]
            if len(first) == len(second) == 1 and second[0] in once:
                found.append((names[first[0]], names[act], names[second[0]]))
    return found


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1 and module.stride == (1, 1)
    return isinstance(module, nn.Linear)


def positive_percentile(x: Tensor, share: float) -> Tensor:
    """The least positive value that `share` of the positive values do not exceed; 0 where none is positive."""
    positive = x[x > 0]
    if not len(positive):
        return x.new_zeros(())
    return positive.sort().values[math.ceil(len(positive) * share) - 1]


def mlp_loss(output: Tensor, clamped: Tensor, target: Tensor, hessian: Tensor | None = None) -> Tensor:
    """Distance of a perceptron's output, and twice that with its hidden values clamped, from the target.

    Squares are weighted by |Hessian| (1, ...) where it is given, summed over axis 1 and averaged, and divided by 10.
    """
    weight = 1.0 if hessian is None else hessian.abs()
    far, far_clamped = ((y - target).square().mul(weight).sum(1).mean() for y in (output, clamped))
    return (far + 2 * far_clamped) / 10


def reconstruct_mlps(
    model: nn.Module,
    perceptrons: list[tuple[str, str, str]],
    images: Tensor,
    activations: int,
    *,
    iterations: int,
    learning_rate: float,
    perturbation: str | None = "rademacher",
    hessian_images: int = 128,
    batch_size: int = 32,
    seed: int = 0,
    progress: Callable[[], None] | None = None,
) -> None:
    """Put ReLU in the place of the GELU of every perceptron, in place, and fit its layers.

    Args:
        model: float; without gradients.
        perceptrons: as `find_perceptrons` gives them.
        activations: bits, which choose the percentile.
        perturbation: of the Hessian that weights errors; None: plain squares.
        progress: is called after every iteration.
    """
    teacher = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for first, act, second in perceptrons:
        model.set_submodule(act, nn.ReLU())
        ends = [teacher.get_submodule(name) for name in (first, second)]
        seen = record(teacher, ends, images, batch_size=batch_size)
        x, target = seen[ends[0]].inputs[0], seen[ends[1]].output
        fitting = max(HIDDEN_VALUES // seen[ends[1]].inputs[0][0].numel(), 1)
        top = positive_percentile(seen[ends[1]].inputs[0][:fitting], PERCENTILES.get(activations, PERCENTILE))
        del seen
        hessian = None
        if perturbation:
            some = images[:hessian_images]
            hessian = perturbation_hessian(teacher, ends[1], some, perturbation, batch_size=batch_size, seed=seed)
            hessian = unit_mean_square(hessian)
        layers = [model.get_submodule(name).requires_grad_(True) for name in (first, second)]
        parameters = [p for layer in layers for p in layer.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(iterations, 1))
        for _ in range(iterations):
            at = torch.randperm(len(x), generator=generator)[:batch_size]
            with torch.enable_grad():
                hidden = layers[0](x[at]).relu()
                loss = mlp_loss(layers[1](hidden), layers[1](hidden.clamp(max=top)), target[at], hessian)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            if progress:
                progress()
        for layer in layers:
            layer.requires_grad_(False)

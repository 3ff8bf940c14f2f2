"""Block reconstruction: unit by unit, the rounding of weights and the scales of activations learn the float output."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from vitalloy.compression.quantization.aphq.adaround import AdaRound, BlockLoss, Drop, mixed
from vitalloy.compression.quantization.aphq.hessian import perturbation_hessian
from vitalloy.compression.quantization.aphq.units import Unit, in_batches, unit_inputs
from vitalloy.compression.quantizers import Uniform

log = logging.getLogger("vitalloy")


def reconstruct(
    model: nn.Module,
    teacher: nn.Module,
    units: list[Unit],
    images: Tensor,
    *,
    iterations: int,
    rounding_rate: float,
    scale_rate: float,
    perturbation: str | None,
    hessian_images: int = 128,
    batch_size: int = 32,
    qdrop: float = 0.5,
    seed: int = 0,
    progress: Callable[[], None] | None = None,
) -> None:
    """Reconstruct the units of a calibrated model in order, in place; every weight ends rounded.

    A unit takes a mixture of what reaches it in the float model and in the model quantized so far. One that returns
    logits learns by the divergence of its answer, the others by squares, weighted by the perturbation Hessian.

    Args:
        model: calibrated and without gradients; `teacher` is its float twin.
        rounding_rate, scale_rate: learning rates of the rounding and of the activation scales.
        perturbation: of the Hessian; None: plain squares.
        qdrop: probability that a value is quantized, of inputs and activations.
        progress: is called after every iteration.
    """
    with torch.no_grad():
        classes = teacher(images[:1]).shape[1:]
    generator = torch.Generator(images.device).manual_seed(seed)
    for unit in units:
        given = unit_inputs(teacher, unit, images, batch_size)
        target = torch.cat([*in_batches(unit, teacher, given, batch_size)])
        hessian, distance = None, "kl" if target.shape[2:] == classes else "mse"
        if perturbation and distance == "mse":
            layer, some = teacher.get_submodule(unit.name), images[:hessian_images]
            hessian = perturbation_hessian(teacher, layer, some, perturbation, batch_size=batch_size, seed=seed)
            if hessian.any():
                distance, hessian = "hessian", hessian / hessian.mean()
            else:
                log.warning("No push at %s changes the answer: it is reconstructed by plain squares.", unit.name)
        _reconstruct_unit(
            model,
            unit,
            unit_inputs(model, unit, images, batch_size),
            given,
            target,
            hessian,
            BlockLoss(iterations, distance),
            rates=(rounding_rate, scale_rate),
            batch_size=batch_size,
            qdrop=qdrop,
            generator=generator,
            progress=progress,
        )


def _reconstruct_unit(
    model: nn.Module,
    unit: Unit,
    quantized: list[Tensor],
    given: list[Tensor],
    target: Tensor,
    hessian: Tensor | None,
    loss: BlockLoss,
    *,
    rates: tuple[float, float],
    batch_size: int,
    qdrop: float,
    generator: torch.Generator,
    progress: Callable[[], None] | None,
) -> None:
    part = model.get_submodule(unit.name)
    sockets = [(m, place, q) for m in part.modules() for place, q in m.named_children() if isinstance(q, Uniform)]
    rounding: dict[nn.Module, AdaRound] = {}
    scales = []
    for layer, place, quantizer in sockets:
        if place == "weight_quantizer":
            rounding[layer] = AdaRound(quantizer, layer.weight)
            setattr(layer, place, rounding[layer])
        else:
            scales.append(quantizer.scale.requires_grad_(True))
            setattr(layer, place, Drop(quantizer, qdrop, generator))
    steps = [torch.optim.Adam([r.alpha for r in rounding.values()], lr=rates[0])]
    schedules = []
    if scales:
        steps.append(torch.optim.Adam(scales, lr=rates[1]))
        schedules.append(torch.optim.lr_scheduler.CosineAnnealingLR(steps[1], loss.calls))
    for _ in range(loss.calls):
        at = torch.randperm(len(target), generator=generator, device=target.device)[:batch_size]
        inputs = [mixed(q[at], x[at], qdrop, generator) for q, x in zip(quantized, given, strict=True)]
        with torch.enable_grad():
            output = unit.run(model, inputs)
            value = loss(
                output.flatten(0, 1), target[at].flatten(0, 1), hessian, [r.shares() for r in rounding.values()]
            )
        for step in steps:
            step.zero_grad(set_to_none=True)
        value.backward()
        for step in steps:
            step.step()
        for schedule in schedules:
            schedule.step()
        if progress:
            progress()
    with torch.no_grad():
        for layer, place, quantizer in sockets:
            if layer in rounding and place == "weight_quantizer":
                layer.weight.copy_(rounding[layer].value())
            else:
                quantizer.scale.requires_grad_(False)
            setattr(layer, place, quantizer)

"""Calibration: the images that a method may look at, checked; and what each layer sees of them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitalloy.errors import CompressionError
from vitalloy.layers.fusion import fuse

log = logging.getLogger("vitalloy")
LEAST, ADVISED, MOST = 8, 32, 1024  # images


def copied(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose parameters are open to training.

    Raises:
        CompressionError: a weight is not a number.
    """
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise CompressionError(f"{name} holds values that are not finite: the model cannot be compressed.")
    return copy.deepcopy(model).eval().requires_grad_(True)


def prepared(model: nn.Module) -> nn.Module:
    """A copy to compress: eval mode, batch norms and scales folded, parameters open to training.

    Raises:
        CompressionError: a weight is not a number.
    """
    own = copied(model)
    own = own.fuse() if callable(getattr(own, "fuse", None)) else fuse(own)
    return own.requires_grad_(True)


def images_for(model: nn.Module, calibration: Any, limit: int = MOST) -> Tensor:
    """Calibration images (N, C, H, W), at most `limit`, checked against the model.

    Args:
        calibration: a tensor (N, C, H, W) of images as the model takes them, or an iterable of such batches or of
            tuples that start with one (a loader).

    Raises:
        CompressionError: none, too few, constant, not finite, or of a shape that the model does not take.
    """
    parts, count = [], 0
    batches = [calibration] if isinstance(calibration, Tensor) else calibration or []
    for batch in batches:
        batch = batch[0] if isinstance(batch, (tuple, list)) else batch
        if not isinstance(batch, Tensor) or batch.ndim != 4:
            got = tuple(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
            raise CompressionError(f"calibration takes batches of images, tensors (B, C, H, W); it got {got}.")
        parts.append(batch.detach())
        count += len(batch)
        if count >= limit:
            break
    if count < LEAST:
        had = "no images" if not count else f"{count} image{'s' * (count > 1)}"
        raise CompressionError(f"the calibration set has {had}: give at least {LEAST}, better {ADVISED} or more.")
    if len({part.shape[1:] for part in parts}) > 1:
        shapes = sorted({tuple(part.shape[1:]) for part in parts})
        raise CompressionError(f"calibration images differ in shape: {', '.join(map(str, shapes))}.")
    like = next(model.parameters())
    images = torch.cat(parts)[:limit].to(like)
    if not images.isfinite().all():
        raise CompressionError("calibration images hold values that are not finite.")
    if (images == images[:1]).all():
        raise CompressionError("all calibration images are the same: they say nothing about the ranges of real ones.")
    if count < ADVISED:
        log.warning("Only %d calibration images: ranges are uncertain below %d.", count, ADVISED)
    _try(model, images)
    return images


def _try(model: nn.Module, images: Tensor) -> None:
    wanted = getattr(model, "default_cfg", None) or {}
    size = tuple(wanted.get("input_size") or ())
    if size and size[1:] != tuple(images.shape[2:]):
        log.warning("Calibration images of %dx%d for a model of %dx%d.", *images.shape[2:], *size[1:])
    try:
        with torch.no_grad():
            answer = model(images[:1])
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        takes = f", which takes {size}" if size else ""
        raise CompressionError(
            f"calibration images of shape {tuple(images.shape[1:])} do not fit {type(model).__name__}{takes}."
        ) from error
    if not isinstance(answer, Tensor) or answer.ndim != 2:
        raise CompressionError(f"{type(model).__name__} does not return logits (B, classes): compress a classifier.")
    if not answer.isfinite().all():
        raise CompressionError(f"{type(model).__name__} answers a calibration image with values that are not finite.")


@dataclass
class Seen:
    """What one layer saw of the calibration images, batches joined along the first axis.

    `inputs` are its tensor arguments by position, `options` its other arguments in the last call, `output` what it
    returned, and `gradient` the gradient of the loss with respect to that, where it was asked for.
    """

    inputs: list[Tensor] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    output: Tensor | None = None
    gradient: Tensor | None = None


def fisher_loss(logits: Tensor, generator: torch.Generator) -> Tensor:
    """The summed loss against labels drawn from the model's own answer.

    The squares of its gradients estimate the diagonal of the Fisher information, and so the curvature of the KL
    divergence from the model's answer. (The gradient of that divergence itself is zero at the model's own answer.)
    """
    labels = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
    return F.cross_entropy(logits, labels.to(logits.device), reduction="sum")


def record(
    model: nn.Module,
    layers: Iterable[nn.Module],
    images: Tensor,
    *,
    batch_size: int = 32,
    loss: Callable[[Tensor], Tensor] | None = None,
) -> dict[nn.Module, Seen]:
    """Run the images through the model and keep what each of `layers` saw, on the model's device.

    Args:
        loss: of the logits; its gradients with respect to the layers' outputs are kept too.

    A layer that runs several times in a pass keeps the calls whose inputs have the shapes of its first.
    """
    seen = {layer: _Calls() for layer in layers}

    def keep(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        seen[layer].add(args, kwargs, output, loss is not None)

    hooks = [layer.register_forward_hook(keep, with_kwargs=True) for layer in seen]
    try:
        with torch.set_grad_enabled(loss is not None):
            for batch in images.split(batch_size):
                if loss is not None:
                    batch = batch.clone().requires_grad_()  # so that every output has a gradient
                logits = model(batch)
                if loss is not None:
                    loss(logits).backward()
                    model.zero_grad(set_to_none=True)
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: calls.joined() for layer, calls in seen.items() if calls.inputs}


class _Calls:
    """The calls of one layer as they come."""

    def __init__(self) -> None:
        self.inputs: list[list[Tensor]] = []
        self.options: dict[str, Any] = {}
        self.outputs: list[Tensor] = []
        self.gradients: list[Tensor] = []

    def add(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, gradients: bool) -> None:
        output = output[0] if isinstance(output, tuple) else output  # a value and its scale
        inputs = [a.detach() for a in args if isinstance(a, Tensor)]
        if self.inputs and [a.shape[1:] for a in inputs] != [a.shape[1:] for a in self.inputs[0]]:
            return
        self.inputs.append(inputs)
        self.options = kwargs | {f"arg{i}": a for i, a in enumerate(args) if not isinstance(a, Tensor)}
        self.outputs.append(output.detach())
        if gradients:
            place = len(self.gradients)
            self.gradients.append(torch.zeros_like(output))  # stays where the loss does not depend on this call
            output.register_hook(lambda g: self.gradients.__setitem__(place, g.detach()))

    def joined(self) -> Seen:
        inputs = [torch.cat(parts) for parts in zip(*self.inputs, strict=True)]
        gradient = torch.cat(self.gradients) if self.gradients else None
        return Seen(inputs, self.options, torch.cat(self.outputs), gradient)


def some(images: Tensor, count: int) -> Tensor:
    """`count` of the images, evenly spread; all where there are fewer."""
    step = max(len(images) // count, 1)
    return torch.stack([*islice(images[::step], count)])

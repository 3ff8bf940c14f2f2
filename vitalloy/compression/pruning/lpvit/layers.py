"""The layers that can be pruned, what each costs, and the gradients that say what it is worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitalloy.compression.pruning.lpvit.masks import is_prunable
from vitalloy.compression.trunk import evaluating
from vitalloy.errors import CompressionError

BATCH = 64


@dataclass(frozen=True)
class Layer:
    """A prunable layer that runs.

    Attributes:
        name: in the model.
        module: the layer.
        positions: how often its weight is applied to one image (tokens, pixels).
        published_positions: the same as the published count has it: the second axis of a linear layer's output, so the
            number of classes for the classifier.
        outputs: values it returns for one image.
        in_channels: of the power curve as published: an image's height for a convolution.
    """

    name: str
    module: nn.Module
    positions: int
    published_positions: int
    outputs: int
    in_channels: int

    def flops(self, density: float = 1.0, published: bool = True) -> float:
        """Multiply-adds for one image with this share of the weights; the published count adds those of the bias."""
        weights = self.module.weight.numel() * density
        if not published:
            return weights * self.positions
        bias = self.outputs if self.module.bias is not None or isinstance(self.module, nn.Conv2d) else 0
        return weights * self.published_positions + bias


@torch.no_grad()
def layers_of(model: nn.Module, image: Tensor, pick: Callable[[nn.Module], bool] = is_prunable) -> list[Layer]:
    """The prunable layers that a pass of one image (1, C, H, W) reaches, in module order.

    Raises:
        CompressionError: there are none.
    """
    seen: dict[nn.Module, tuple[torch.Size, torch.Size, int]] = {}

    def look(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        positions = output.numel() // module.weight.shape[0]
        before = seen[module][2] if module in seen else 0
        seen[module] = (args[0].shape, output.shape, before + positions)

    named = {name: module for name, module in model.named_modules() if pick(module)}
    hooks = [module.register_forward_hook(look) for module in named.values()]
    try:
        with evaluating(model):
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    layers = []
    for name, module in named.items():
        if module in seen:
            taken, made, positions = seen[module]
            linear = isinstance(module, nn.Linear)
            published = made[1] if linear else made[2:].numel()
            channels = taken[-1] if linear else taken[2]
            layers.append(Layer(name, module, positions, published, made[1:].numel(), channels))
    if not layers:
        raise CompressionError(
            f"{type(model).__name__} has no linear layer and no full convolution: there is nothing to prune."
        )
    return layers


def gradients(
    model: nn.Module,
    images: Tensor,
    weights: Sequence[nn.Parameter],
    *,
    batch_size: int = BATCH,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Tensor]:
    """Gradients of mean(logits ** 2) in training mode, averaged over batches; one for each weight.

    Batch norms stay in evaluation mode, so that their statistics, and the answer to a single image, stay what they are.
    Dropout draws from `seed`; PyTorch's own state is left as it was.

    Raises:
        CompressionError: a gradient is not finite.
    """
    training = {module: module.training for module in model.modules()}
    wanted = [weight.requires_grad for weight in weights]
    for module in model.modules():
        module.train(not isinstance(module, nn.modules.batchnorm._BatchNorm))
    for weight in weights:
        weight.requires_grad_(True)
    totals = [torch.zeros_like(weight) for weight in weights]
    batches = images.split(batch_size)
    try:
        with torch.random.fork_rng([images.device] if images.is_cuda else []), torch.enable_grad():
            torch.manual_seed(seed)
            for done, batch in enumerate(batches, start=1):
                logits = model(batch)
                logits = torch.stack(logits).mean(0) if isinstance(logits, tuple) else logits
                found = torch.autograd.grad(logits.square().mean(), weights, allow_unused=True)
                for total, gradient in zip(totals, found, strict=True):
                    if gradient is not None:
                        total += gradient / len(batches)
                if progress:
                    progress(done, len(batches))
    finally:
        for module, mode in training.items():
            module.training = mode
        for weight, flag in zip(weights, wanted, strict=True):
            weight.requires_grad_(flag)
    if not all(total.isfinite().all() for total in totals):
        raise CompressionError("the gradients on the calibration images are not finite: check the images and weights.")
    return totals

"""The small loop of quantization-aware training: a compressed model is trained on for some epochs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitalloy.errors import CompressionError

Batches = Iterable[tuple[Tensor, Tensor]]
Progress = Callable[[int, int], None]


def finetune(
    model: nn.Module,
    train: Batches,
    *,
    epochs: int,
    lr: float,
    weight_decay: float = 1e-4,
    last_lr: float = 1 / 15,
    label_smoothing: float = 0.1,
    teacher: nn.Module | None = None,
    alpha: float = 0.5,
    parameters: Sequence[nn.Parameter] | None = None,
    before_step: Callable[[int], None] | None = None,
    progress: Progress | None = None,
) -> list[float]:
    """Train with AdamW and a cosine without warm-up; the model is left in evaluation mode.

    Args:
        train: batches (images, labels), iterated once an epoch.
        last_lr: the final rate as a share of `lr`.
        teacher: a float model; `alpha` of the loss is then the KL divergence from its answer.
        parameters: what is trained; all that require gradients when None.
        before_step: is told the number of each step before it.
        progress: is told (epochs done, epochs).

    Returns:
        The mean loss of each epoch.

    Raises:
        CompressionError: no batches, or a loss that is not a number.
    """
    trained = [p for p in model.parameters() if p.requires_grad] if parameters is None else list(parameters)
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay)
    device = trained[0].device
    losses, step = [], 0
    for epoch in range(epochs):
        model.train()
        total, count = 0.0, 0
        rate = lr * (last_lr + (1 - last_lr) * (1 + math.cos(math.pi * epoch / epochs)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        for images, labels, *_ in train:
            if before_step:
                before_step(step)
            images, labels = images.to(device), labels.to(device)
            logits = model(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
            if teacher is not None:
                with torch.no_grad():
                    answer = teacher(images).log_softmax(-1)
                distance = F.kl_div(logits.log_softmax(-1), answer, reduction="batchmean", log_target=True)
                loss = (1 - alpha) * loss + alpha * distance
            if not loss.isfinite():
                raise CompressionError(f"the loss is {loss.item()} in step {step + 1}: use a smaller learning rate.")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total, count, step = total + loss.item() * len(images), count + len(images), step + 1
        if not count:
            raise CompressionError("there are no training images: `train` gave no batch.")
        losses.append(total / count)
        if progress:
            progress(epoch + 1, epochs)
    model.eval()
    return losses

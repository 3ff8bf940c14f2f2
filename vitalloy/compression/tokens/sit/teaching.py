"""Training a slimmed model with the full one as its teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitalloy.compression.tokens.sit.recalibration import Recalibration, logit_distance, tapped, token_distance
from vitalloy.compression.trunk import Point
from vitalloy.errors import CompressionError

Batches = Iterable[tuple[Tensor, Tensor]]
REVERSE_RATE = 5.0  # times the learning rate, as published
LEAST_RATE = 0.05  # share of the learning rate that the last epoch keeps: 1e-5 of 2e-4, as published


@dataclass(frozen=True)
class Lesson:
    """What training was: parameters of the reverse modules, and the mean of each term of the loss in each epoch."""

    reverse_parameters: int
    by_class: list[float]
    by_token: list[float]
    by_logit: list[float]


def teach(
    student: nn.Module,
    teacher: nn.Module,
    train: Batches,
    taps: Sequence[Point],
    *,
    epochs: int,
    lr: float,
    token_weight: float,
    logit_weight: float,
    temperature: float,
    labelled: bool,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> Lesson:
    """Train in place; the student is left in evaluation mode, without the reverse modules.

    Args:
        taps: where tokens are compared.
        labelled: whether the labels of `train` mean anything.
    """
    device = next(student.parameters()).device
    teacher = teacher.to(device).eval().requires_grad_(False)
    reverse: Recalibration | None = None
    optimizer: torch.optim.Optimizer | None = None
    history: list[list[float]] = []
    steps = len(train) if isinstance(train, Sized) else 0
    for epoch in range(epochs):
        student.train()
        sums, count = [0.0, 0.0, 0.0], 0
        for step, (images, labels, *_) in enumerate(train):
            images, labels = images.to(device), labels.to(device)
            with tapped(student, taps) as few, tapped(teacher, taps) as many:
                with torch.no_grad():
                    wanted = teacher(images)
                logits = student(images)
                if optimizer is None:
                    reverse = _reverse_modules(few, many, seed) if token_weight and taps else None
                    optimizer = _optimizer(student, reverse, lr)
                terms = [logits.new_zeros(()), logits.new_zeros(()), logit_distance(logits, wanted, temperature)]
                if labelled:
                    terms[0] = F.cross_entropy(logits, labels)
                if reverse is not None:
                    terms[1] = token_distance(reverse(few), many, relative=True)
            _set_rates(optimizer, (epoch + (step / steps if steps else 0)) / epochs)
            loss = terms[0] + token_weight * terms[1] + logit_weight * terms[2]
            if not loss.isfinite():
                raise CompressionError(f"the loss is {loss.item()} in epoch {epoch + 1}: use a smaller lr than {lr:g}.")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            sums = [total + term.item() * len(images) for total, term in zip(sums, terms, strict=True)]
            count += len(images)
        steps = step + 1 if count else 0
        if not count:
            raise CompressionError("there are no training images: `train` gave no batch.")
        history.append([total / count for total in sums])
        if progress:
            progress(epoch + 1, epochs)
    student.eval()
    parameters = sum(p.numel() for p in reverse.parameters()) if reverse is not None else 0
    return Lesson(parameters, *([row[i] for row in history] for i in range(3)))


def _reverse_modules(few: Sequence[Tensor], many: Sequence[Tensor], seed: int) -> Recalibration:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Recalibration(few, many).to(many[0])


def _optimizer(student: nn.Module, reverse: nn.Module | None, lr: float) -> torch.optim.Optimizer:
    """AdamW; decay spares vectors, tables of tokens and positions, but nothing of the reverse modules, as published."""
    spared = set(student.no_weight_decay()) if callable(getattr(student, "no_weight_decay", None)) else set()
    decayed, plain = [], []
    for name, p in student.named_parameters():
        if p.requires_grad:
            (plain if p.ndim < 2 or name in spared or name.endswith((".position", ".scale")) else decayed).append(p)
    groups = [{"params": decayed, "weight_decay": 0.05, "rate": lr}, {"params": plain, "weight_decay": 0.0, "rate": lr}]
    if reverse is not None:
        groups.append({"params": [*reverse.parameters()], "weight_decay": 0.05, "rate": REVERSE_RATE * lr})
    return torch.optim.AdamW(groups)


def _set_rates(optimizer: torch.optim.Optimizer, done: float) -> None:
    """The published cosine, for the share of the training that is done; in steps, as there may be few epochs."""
    for group in optimizer.param_groups:
        least = LEAST_RATE * group["rate"]
        group["lr"] = least + (group["rate"] - least) * (1 + math.cos(math.pi * done)) / 2

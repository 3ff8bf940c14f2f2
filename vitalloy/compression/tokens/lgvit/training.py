"""The two stages: exits and classifier together, then the exits alone with the classifier as their teacher."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from vitalloy.compression.tokens.lgvit import losses
from vitalloy.compression.tokens.lgvit.heads import GlobalAggregation
from vitalloy.compression.tokens.lgvit.losses import ALPHA, BETA, GAMMA, TEMPERATURE
from vitalloy.compression.tokens.lgvit.model import Answers, EarlyExit
from vitalloy.errors import CompressionError

Batches = Iterable[tuple[Tensor, Tensor]]
Progress = Callable[[int, int], None]
LAST_RATE = 0.05  # of the cosine, as a share of the first
STRATEGIES = ("alternating_weighted", "weighted", "alternating", "normal")


def stage1_loss(
    model: EarlyExit, images: Tensor, labels: Tensor, step: int, strategy: str = "alternating_weighted"
) -> Tensor:
    """The loss of one step of stage 1.

    Args:
        labels: classes (B,), or probabilities (B, classes).
        step: counted from 0. Even steps of the alternating strategies train the end alone.
        strategy: "alternating_weighted" (exits count by their depth), "alternating" (all count the same), or
            "weighted" and "normal", which do so in every step.
    """
    if strategy not in STRATEGIES:
        raise CompressionError(f"there is no strategy {strategy!r} of stage 1: use {', '.join(STRATEGIES)}.")
    if step % 2 == 0 and strategy.startswith("alternating"):
        return nn.functional.cross_entropy(model.model(images), labels)
    said = model.answers(images)
    layers, depth = layers_of(model) if strategy.endswith("weighted") else ([1] * len(said.exits), 1)
    return losses.weighted_loss(said.final, said.exits, labels, layers, depth)


def stage2_loss(
    model: EarlyExit,
    images: Tensor,
    labels: Tensor,
    *,
    alpha: float = ALPHA,
    beta: float = BETA,
    gamma: float = GAMMA,
    temperature: float = TEMPERATURE,
    as_published: bool = False,
) -> Tensor:
    """The loss of one step of stage 2, in which the heads alone learn.

    Args:
        alpha: share of the teacher's answers in what the exits learn to say.
        beta: weight of what the heads learn from the last layer (heterogeneous).
        gamma: weight of what they learn from each other (homogeneous).
        as_published: the teacher is the classifier without the final norm, which it was trained with.
    """
    said = model.answers(images, backbone=False)
    teacher = _unnormed(model, said) if as_published else said.final
    terms = stage2_terms(model, said, labels, teacher, alpha, temperature)
    return terms["prediction"] + beta * terms["heterogeneous"] + gamma * terms["homogeneous"]


def stage2_terms(
    model: EarlyExit, said: Answers, labels: Tensor, teacher: Tensor, alpha: float, temperature: float
) -> dict[str, Tensor]:
    """The three terms of stage 2, without their weights."""
    heads = list(zip(model.heads, said.features, strict=True))
    attentive = [(head.mlp.step, f) for head, f in heads if isinstance(head.mlp, GlobalAggregation)]
    local = [f for head, f in heads if head.local]
    steps, aggregated = [s for s, _ in attentive], [f for _, f in attentive]
    zero = said.final.new_zeros(())
    return {
        "prediction": losses.prediction_loss(said.exits, labels, teacher, alpha, temperature),
        "heterogeneous": sum(losses.heterogeneous_losses(local, aggregated, said.last, steps), zero),
        "homogeneous": sum(losses.homogeneous_losses(local, aggregated), zero),
    }


def layers_of(model: EarlyExit) -> tuple[list[int], int]:
    """The layer behind which each exit is, counted from 1, and how many there are.

    Where exits are at numbered blocks of one list, those numbers; otherwise the share of the work that is done there,
    in twelfths.
    """
    names = [point.name.rpartition(".") for point in (*model.points, model.last)]
    if all(dot and number.isdigit() and parent == names[-1][0] for parent, dot, number in names):
        *layers, depth = [int(number) + 1 for _, _, number in names]
        return layers, depth
    return [max(round(12 * point.macs), 1) for point in model.points], 12


def _unnormed(model: EarlyExit, said: Answers) -> Tensor:
    """The classifier's answer to the last layer's tokens as they are."""
    if not hasattr(model.model, "forward_head") or said.last.prefix is None:
        raise CompressionError("as_published needs a ViT or DeiT, whose classifier reads class tokens.")
    with torch.no_grad():
        return model.model.forward_head(torch.cat([said.last.prefix, said.last.patches], 1))


def train_exits(
    model: EarlyExit,
    train: Batches | None,
    images: Tensor,
    *,
    epochs: tuple[int, int],
    lr: float,
    backbone_lr: float,
    strategy: str = "alternating_weighted",
    alpha: float = ALPHA,
    beta: float = BETA,
    gamma: float = GAMMA,
    temperature: float = TEMPERATURE,
    weight_decay: float = 0.01,
    batch_size: int = 64,
    as_published: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[float]:
    """Both stages, with AdamW and a cosine for each; the model is left in evaluation mode.

    Args:
        train: batches (images, labels), iterated once an epoch; None takes `images` in random order, with the answers
            of the model as it came in the place of labels.
        epochs: of stage 1 and of stage 2.
        lr, backbone_lr: of the heads, and of the classifier in stage 1.

    Returns:
        The mean loss of each epoch.

    Raises:
        CompressionError: no batches, or a loss that is not a number.
    """
    teacher = copy.deepcopy(model.model).eval() if train is None else None
    generator = torch.Generator().manual_seed(seed)
    heads, backbone = list(model.heads.parameters()), list(model.model.parameters())
    history: list[float] = []

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        if train is not None:
            yield from ((batch[0].to(images.device), batch[1].to(images.device)) for batch in train)
            return
        for chosen in torch.randperm(len(images), generator=generator).to(images.device).split(batch_size):
            with torch.no_grad():
                wanted = teacher(images[chosen]).softmax(-1)
            yield images[chosen], wanted

    steps = math.ceil(len(images) / batch_size) if train is None else len(train) if hasattr(train, "__len__") else None
    done = 0
    for stage, count in enumerate(epochs):
        groups = [{"params": heads, "lr": lr}, *([{"params": backbone, "lr": backbone_lr}] if stage == 0 else [])]
        optimizer = torch.optim.AdamW(groups, weight_decay=weight_decay)
        first = [group["lr"] for group in groups]
        step = 0
        for epoch in range(count):
            model.train()
            if stage == 1:
                model.model.eval()  # a teacher at rest
            total = seen = 0
            for x, labels in batches():
                share = min(step / (count * steps), 1) if steps else epoch / count
                for group, rate in zip(optimizer.param_groups, first, strict=True):
                    group["lr"] = rate * (LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * share)) / 2)
                if stage == 0:
                    loss = stage1_loss(model, x, labels, step, strategy)
                else:
                    loss = stage2_loss(
                        model,
                        x,
                        labels,
                        alpha=alpha,
                        beta=beta,
                        gamma=gamma,
                        temperature=temperature,
                        as_published=as_published,
                    )
                if not loss.isfinite():
                    raise CompressionError(
                        f"the loss is {loss.item()} in step {step + 1} of stage {stage + 1}: use a smaller lr."
                    )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                total, seen, step = total + loss.item() * len(x), seen + len(x), step + 1
            if not seen:
                raise CompressionError("there are no training images: `train` gave no batch.")
            history.append(total / seen)
            steps, done = step // (epoch + 1), done + 1
            if progress:
                progress(done, sum(epochs))
    model.eval()
    return history

"""The two published phases: predictors learn to reconstruct attention, then the rest learns under their masks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from vitalloy.compression.calibration import Seen, record
from vitalloy.compression.scale_search import attention_map, attention_of
from vitalloy.compression.tokens.sparsifiner.attend import SparseAttend, reconstructing
from vitalloy.compression.tokens.sparsifiner.losses import (
    Weights,
    answer_distance,
    cross_entropy,
    reconstruction,
    token_distance,
)
from vitalloy.compression.tokens.sparsifiner.predictor import MaskPredictor
from vitalloy.errors import CompressionError
from vitalloy.layers.sockets import find

Batch = tuple[Tensor, Tensor | None]
BATCH_SIZE, RECONSTRUCTION, WARM_UP = 32, 0.01, 0.1
FLOOR = 1e-4  # of a predicted weight, whose logarithm is taken


def batches(
    images: Tensor, train: Iterable[tuple[Tensor, Tensor]] | None, generator: torch.Generator
) -> Iterator[Batch]:
    """One epoch: the training data on the images' device, or the images in another order and without labels."""
    if train is None:
        order = torch.randperm(len(images), generator=generator)
        yield from ((images[part.to(images.device)], None) for part in order.split(BATCH_SIZE))
        return
    count = 0
    for batch, labels, *_ in train:
        count += 1
        yield batch.to(images), labels.to(images.device)
    if not count:
        raise CompressionError("there are no training images: `train` gave no batch.")


def learn_predictors(
    model: nn.Module,
    epoch: Callable[[], Iterable[Batch]],
    *,
    epochs: int,
    lr: float,
    as_published: bool = False,
    progress: Callable[[int], None] | None = None,
) -> list[float]:
    """The first phase: every predictor learns its layer's full attention; nothing else changes.

    The published loss is the squared error of the raw map, whose basis may be negative, while masks are made from the
    absolute basis. By default what will be used is what learns: the map of absolute values, as a distribution over the
    keys, by its cross-entropy with the attention.

    Returns:
        The mean loss of each epoch.
    """
    layers = list(dict.fromkeys(find(model, SparseAttend).values()))
    trained = [p for layer in layers for p in layer.predictor.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    model.eval()
    history, started = [], False
    for number in range(epochs):
        _set_rate(optimizer, lr * (1 + 0.5 * math.cos(math.pi * number / epochs)) / 1.5)  # to about two thirds
        total = images = 0
        for batch, _ in epoch():
            with reconstructing(model):
                seen = record(model, layers, batch, batch_size=len(batch))
            if not started:
                for layer in layers:
                    _start(layer.predictor, *seen[layer].inputs[:2])
                started = True
            loss = _distance(seen, as_published)
            _step(optimizer, loss, "predictors")
            total, images = total + loss.item() * len(batch), images + len(batch)
        history.append(total / images)
        if progress:
            progress(number + 1)
    return history


def distill(
    model: nn.Module,
    teacher: nn.Module,
    epoch: Callable[[], Iterable[Batch]],
    *,
    epochs: int,
    lr: float,
    weights: Weights = Weights(),  # noqa: B008 - frozen
    progress: Callable[[int], None] | None = None,
) -> list[float]:
    """The second phase: all but the predictors learn from the labels, and from the dense model's answers and tokens.

    Batches without labels train in evaluation mode (no dropout, batch norms as they are). The rate is warmed up for a
    tenth of the steps' epochs and falls by a cosine.
    """
    fixed = {id(p) for layer in find(model, SparseAttend).values() for p in layer.predictor.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad and id(p) not in fixed]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.05)
    history = []
    for number in range(epochs):
        done = number / epochs
        _set_rate(
            optimizer, lr * (done / WARM_UP if 0 < done < WARM_UP else 0.5 * (1 + math.cos(math.pi * done)) + 0.02)
        )
        total = images = 0
        for batch, labels in epoch():
            model.train(labels is not None)
            logits, tokens, alive = _answer(model, batch)
            with torch.no_grad():
                taught, taught_tokens, _ = _answer(teacher, batch)
            loss = weights.answers * answer_distance(logits, taught)
            if labels is not None:
                loss = loss + weights.classes * cross_entropy(logits, labels)
            if tokens is not None:
                if alive is not None:
                    taught_tokens = taught_tokens.gather(1, alive[..., None].expand(-1, -1, taught_tokens.shape[2]))
                loss = loss + weights.tokens * token_distance(tokens, taught_tokens)
            _step(optimizer, loss, "model")
            total, images = total + loss.item() * len(batch), images + len(batch)
        history.append(total / images)
        if progress:
            progress(number + 1)
    model.eval()
    return history


def _answer(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Logits, the patch tokens before the head where they can be told, and which of the patches they are."""
    if not (hasattr(model, "forward_features") and hasattr(model, "forward_head")):
        return model(images), None, None
    tokens = model.forward_features(images)
    logits = model.forward_head(tokens)
    if not isinstance(tokens, Tensor):
        return logits, None, None
    prefix = int(getattr(model, "num_prefix_tokens", 0) or 0) if tokens.ndim == 3 else 0
    states = [layer.tokens for layer in find(model, SparseAttend).values() if layer.tokens is not None]
    alive = states[0].alive if states else None
    if tokens.ndim != 3:
        return logits, tokens.flatten(1).unsqueeze(1), None
    return logits, tokens[:, prefix:], None if alive is None else alive[:, prefix:] - prefix


def _distance(seen: dict[SparseAttend, Seen], as_published: bool) -> Tensor:
    guesses, wanted = [], []
    for layer, calls in seen.items():
        q, k, *_ = attention_of(calls)
        maps = layer.predictor.maps if as_published else layer.predictor.maps.abs()
        guesses.append(layer.predictor.mixture(q[:, :, layer.prefix :], k) @ maps.mT)
        wanted.append(attention_map(calls)[:, :, layer.prefix :])
    if as_published:
        return RECONSTRUCTION * reconstruction(guesses, wanted)
    rows = [(guess + FLOOR).log() - (guess + FLOOR).sum(-1, keepdim=True).log() for guess in guesses]
    return -torch.stack([(true * row).sum(-1).mean() for true, row in zip(wanted, rows, strict=True)]).sum()


@torch.no_grad()
def _start(predictor: MaskPredictor, q: Tensor, k: Tensor) -> None:
    """Compare queries and keys along the directions in which they vary most."""
    rows = torch.cat([q.flatten(0, 2), k.flatten(0, 2)])
    vectors = torch.linalg.eigh((rows.mT @ rows).double()).eigenvectors.to(rows)
    predictor.set_directions(vectors[:, -predictor.query_weight.shape[0] :].mT)


def _set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def _step(optimizer: torch.optim.Optimizer, loss: Tensor, what: str) -> None:
    if not loss.isfinite():
        raise CompressionError(f"the loss of the {what} is {loss.item()}: use a smaller learning rate.")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()

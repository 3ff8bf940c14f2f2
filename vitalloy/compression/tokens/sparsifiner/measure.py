"""How well the predicted masks find the pairs that matter, and where they are zero."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vitalloy.compression.tokens.sparsifiner.attend import SparseAttend, watched
from vitalloy.compression.trunk import evaluating
from vitalloy.layers.sockets import find


@torch.no_grad()
def links(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Which attention links stayed: for each sparse layer a mask (B, heads, queries, keys) bool.

    Pairs with a token that was dropped before are False. Layers on windows have an entry for each window.
    """
    with evaluating(model), watched(model) as seen:
        model(images)
    found = {}
    for name, layer in find(model, SparseAttend).items():
        if not seen[name]:
            continue
        maps = seen[name][-1]
        mask = maps.mask.bool()
        if maps.alive is not None:
            full = layer.predictor.keys
            where = maps.alive[:, None, :, None] * full + maps.alive[:, None, None, :]
            empty = mask.new_zeros(*mask.shape[:2], full * full)
            mask = empty.scatter(2, where.flatten(2).expand(-1, mask.shape[1], -1), mask.flatten(2))
            mask = mask.unflatten(2, (full, full))
        found[name] = mask
    return found


@torch.no_grad()
def sparsity(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Shares of exact zeros in the basis maps, their coefficients and the masks, averaged over the layers."""
    with evaluating(model), watched(model) as seen:
        model(images)
    layers = {name: layer for name, layer in find(model, SparseAttend).items() if seen[name]}
    shares = {
        "basis": [(layer.predictor.basis() == 0).double().mean() for layer in layers.values()],
        "coefficients": [(seen[name][-1].coefficients == 0).double().mean() for name in layers],
        "mask": [(seen[name][-1].mask == 0).double().mean() for name in layers],
    }
    return {name: torch.stack(values).mean().item() for name, values in shares.items()}


@torch.no_grad()
def recall(model: nn.Module, images: Tensor, seed: int = 0) -> dict[str, float]:
    """Which share of each query's strongest pairs a mask of as many pairs finds, mean of the sparse layers.

    Strongest in the full attention of the sparse model itself. Keys: "predicted"; "random"; "window", the nearest
    patches of each, and the class token (only where queries and keys are the same patches of a square). Class tokens,
    which keep all, do not count.
    """
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[float]] = {"predicted": [], "random": [], "window": []}
    with evaluating(model), watched(model) as seen:
        model(images)
    for name, layer in find(model, SparseAttend).items():
        for maps in seen[name]:
            if maps.alive is not None:
                continue
            attention, mask = (x[:, :, layer.prefix :] for x in (maps.unmasked, maps.mask.bool()))
            kept = layer.budget(attention.mT)
            guesses = {"predicted": mask}
            noise = torch.rand(attention.shape, generator=generator).to(attention)
            guesses["random"] = _top(noise, kept)
            near = _nearness(attention.shape[2], attention.shape[3])
            if near is not None:
                guesses["window"] = _top(near.to(attention).expand_as(attention), kept)
            strongest = _top(attention, kept)
            for kind, guess in guesses.items():
                found[kind].append((guess & strongest).sum().item() / strongest.sum().item())
    return {kind: sum(values) / len(values) for kind, values in found.items() if values}


def _top(scores: Tensor, count: int) -> Tensor:
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(count, dim=-1).indices, True)


def _nearness(queries: int, keys: int) -> Tensor | None:
    side = math.isqrt(queries)
    if side * side != queries or keys < queries:
        return None
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).double()
    near = -torch.cdist(places, places)
    return torch.cat([near.new_zeros(queries, keys - queries), near], dim=1)

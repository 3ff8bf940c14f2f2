"""LPViT: pruning in blocks, shared out over all layers by what it costs and what it destroys.

For those who want a trained model cheaper by a given share: of multiply-adds, of the time measured on this machine, or
of power. Xu, Wang, Cheng, Aly, Wang, Wu, Yin and others: "LPViT: Low-Power Semi-structured Pruning for Vision
Transformers", ECCV 2024, arXiv 2407.02068.

    small = compress(model, images, macs=0.5, train=loader)
    table(small)   # what every layer kept

`pattern="blocks"` is the paper's: rectangles of every weight become zero. On hardware without block-sparse products
that saves no time, and `crossover` measures whether there are any here. `pattern="aligned"` is ours: a block is a set
of whole channels, taken out of the layer that makes them and the one that reads them: smaller dense layers are left. It
is the default, as it saves time.

Departures. The published curves add a step where the exact form subtracts it, and their power grows with pruning;
`as_published=False` is the exact form, and minimises damage + price * cost where the published search looks for one
slope of all curves, which can end far from the budget. `compare` gives both. Aligned pruning is always exact. Batch
norms stay in evaluation mode when gradients are taken. Embedding and classifier are pruned in blocks, as published;
aligned pruning leaves them whole.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vitalloy.compression.finetune import finetune
from vitalloy.compression.pruning.lpvit.aligned import allocate_groups, parameters_of, rank, remove
from vitalloy.compression.pruning.lpvit.allocation import TOLERANCE, Allocation, allocate, least_density
from vitalloy.compression.pruning.lpvit.costs import CostTable, checked, counted_layers, measure_costs
from vitalloy.compression.pruning.lpvit.cutting import to_sizes
from vitalloy.compression.pruning.lpvit.execution import crossover
from vitalloy.compression.pruning.lpvit.frozen import empty_channels, keep_zeros
from vitalloy.compression.pruning.lpvit.groups import find_groups
from vitalloy.compression.pruning.lpvit.layers import gradients, layers_of
from vitalloy.compression.pruning.lpvit.masks import Block, block_mask, block_sums
from vitalloy.compression.trunk import macs as count_macs
from vitalloy.errors import CompressionError

__all__ = [
    "Allocation",
    "CostTable",
    "allocate",
    "block_mask",
    "compare",
    "compress",
    "crossover",
    "find_groups",
    "measure_costs",
    "rebuild",
    "table",
]

log = logging.getLogger("vitalloy")
BATCH, LEAST = 64, 8  # images in a batch of distillation, and how many it needs
RUNS = {"blocks": "dense products with zeros: not faster", "aligned": "smaller dense products"}  # how each executes
Batches = Iterable[tuple[Tensor, Tensor]]
Progress = Callable[[int, int], None]


def compress(
    model: nn.Module,
    images: Tensor,
    *,
    macs: float = 0.5,
    pattern: str = "aligned",
    block: Block = (16, 16),
    cost: str = "flops",
    second_order: bool = True,
    power: float = 0.0,
    as_published: bool | None = None,
    smooth: float = 0.5,
    h: int = 4,
    points: int = 100,
    min_density: float | None = None,
    batch_size: int = 16,
    train: Batches | None = None,
    epochs: int = 1,
    lr: float | None = None,
    distill: float = 0.5,
    seed: int = 0,
    progress: Progress | None = None,
) -> nn.Module:
    """Prune a classifier, in place, to a share of its cost, and train what is left on.

    Args:
        images: calibration images (N, C, H, W).
        macs: share of the cost that stays. With pattern="blocks" that of the pruned layers, without attention's
            products, as published; with "aligned" that of the whole model.
        pattern: "blocks" (zeros in rectangles) or "aligned" (whole channels go, layers become smaller).
        block: rows and columns; "aligned" takes `block[0]` hidden channels, and half as many of each head, at a time.
        cost: what `macs` is a share of: "flops", "latency" (measured here with `batch_size` images; "aligned" alone) or
            "energy" (the paper's power model with surviving blocks).
        second_order: the second term of the damage.
        power: adds power to the damage, this many times the paper's weight. The paper has 0 and 1, True.
        as_published: for "blocks" with cost="flops", and then the default: the published curves and search.
        smooth, h, points: of the published curves: smoothing, reach of the derivative, and how many shares.
        min_density: least share of its blocks that a layer keeps; min(0.05, (1 - macs) / 2) when None. "aligned" keeps
            one block at least.
        train: batches (images, labels), iterated once an epoch. Without them the model learns the dense one's answers
            to the calibration images. Pruned weights stay exactly zero.
        epochs: of training; 0 leaves the weights alone.
        lr: of AdamW; 5e-4 with `train`, 1e-4 without, when None.
        distill: weight of the dense model's answer in the loss.
        progress: is told (percents done, 100).

    Returns:
        The model, with `settings` and, under `table(model)`, what each layer kept.

    Raises:
        CompressionError: contradictory options, nothing to prune, scores that are not finite, a budget out of reach.
    """
    published = (pattern == "blocks" and checked(cost) == "flops") if as_published is None else as_published
    _check(macs, pattern, block, checked(cost), published, min_density, h, points)
    dense = copy.deepcopy(model).eval().requires_grad_(False) if epochs else None
    before = {layer.name: layer.flops(published=False) for layer in counted_layers(model, images[:1])}
    whole = count_macs(model, images[:1])
    options = {"second_order": second_order, "power": power, "seed": seed, "progress": _part(progress, 0, 60)}
    if pattern == "aligned":
        settings = _align(model, images, macs, block, cost, batch_size, **options)
    else:
        curves = {"smooth": smooth, "h": h, "points": points, "min_density": min_density}
        settings = _mask(model, images, macs, block, cost == "energy", published, **curves, **options)
    settings = {"pattern": pattern, "runs": RUNS[pattern], "cost": cost, "macs": macs, "block": list(block), **settings}
    rebuild(model, **settings)
    after = {layer.name: layer.flops(_density(layer.module), False) for layer in counted_layers(model, images[:1])}
    settings["model_macs"] = [whole, count_macs(model, images[:1])]
    settings["layers"] = [
        {"layer": n, "kept": after[n] / before[n], "macs_before": int(before[n]), "macs_after": int(after[n])}
        for n in before
    ]
    model.settings = settings
    if dense is not None:
        _train(model, dense, images, train, epochs, lr, distill, _part(progress, 60, 100))
    return model.eval()


def rebuild(model: nn.Module, **settings: Any) -> nn.Module:
    """Give a plain model the structure of a pruned one, in place: the state dict of that then fits.

    Args:
        settings: of the pruned model, its attribute of that name.
    """
    to_sizes(model, settings.get("sizes", {}))
    keep_zeros(model, settings.get("masked", []))
    model.settings = settings
    return model


def table(model: nn.Module) -> list[dict[str, Any]]:
    """What each layer kept: rows of layer, kept (share of its multiply-adds), macs_before and macs_after.

    Raises:
        CompressionError: the model was not pruned by this method.
    """
    try:
        return model.settings["layers"]
    except (AttributeError, KeyError) as error:
        raise CompressionError(
            f"{type(model).__name__} holds no record of pruning: it is no result of lpvit."
        ) from error


def compare(model: nn.Module, images: Tensor, *, macs: float = 0.5, **options: Any) -> dict[str, Allocation]:
    """The published allocation over blocks and the corrected one, for the same model, images and budget.

    Args:
        model: left as it was.
        options: of `allocate`, but `corrected`.

    Returns:
        "published" and "corrected".
    """
    layers = layers_of(model, images[:1])
    found = gradients(model, images, [layer.module.weight for layer in layers])
    return {
        name: allocate(layers, found, macs=macs, corrected=name == "corrected", **options)
        for name in ("published", "corrected")
    }


def _check(
    macs: float,
    pattern: str,
    block: Block,
    cost: str,
    published: bool,
    min_density: float | None,
    h: int,
    points: int,
) -> None:
    if pattern not in RUNS:
        raise CompressionError(f"pattern={pattern!r}: use 'blocks' or 'aligned'.")
    if not 0 < macs <= 1:
        raise CompressionError(f"macs={macs:g}: give the share of the cost that stays, above 0 and at most 1.")
    if len(block) != 2 or min(block) < 1:
        raise CompressionError(f"block={tuple(block)}: give rows and columns, such as (16, 16).")
    if published and (pattern, cost) != ("blocks", "flops"):
        raise CompressionError(
            "the published allocation is for pattern='blocks' and cost='flops': leave as_published out."
        )
    if cost == "latency" and pattern == "blocks":
        raise CompressionError("zeros in blocks save no time here (see `crossover`): for cost='latency' use 'aligned'.")
    if min_density is not None and (pattern == "aligned" or not 0 < min_density < 1):
        raise CompressionError(f"min_density={min_density:g} is a share between 0 and 1, for pattern='blocks'.")
    if h < 2 or points < 2:
        raise CompressionError(f"h={h} and points={points}: curves and their slopes need at least 2 points.")


def _mask(
    model: nn.Module,
    images: Tensor,
    macs: float,
    block: Block,
    energy: bool,
    published: bool,
    *,
    seed: int,
    progress: Progress | None,
    **options: Any,
) -> dict[str, Any]:
    layers = layers_of(model, images[:1])
    found = gradients(model, images, [layer.module.weight for layer in layers], seed=seed, progress=progress)
    density = least_density(macs) if options["min_density"] is None else options["min_density"]
    options |= {"block": block, "energy": energy, "corrected": not published, "min_density": density}
    chosen = allocate(layers, found, macs=macs, **options)
    if chosen.least > macs + TOLERANCE:
        raise CompressionError(
            f"a share of {macs:g} is out of reach: with at least {density:g} of its blocks in every layer, "
            f"{chosen.least:.3f} is left. Ask for more, or give a smaller min_density."
        )
    if abs(chosen.share - macs) > 2 * TOLERANCE:
        log.warning(
            "The %s allocation ended at a share of %.3f where %.3f was asked for%s.",
            *("published" if published else "corrected", chosen.share, macs),
            ": its curves are not monotone, and as_published=False meets the budget" if published else "",
        )
    masked = []
    with torch.no_grad():
        for layer, gradient, amount in zip(layers, found, chosen.amounts, strict=True):
            amount = min(amount, 1 - 1.5 / block_sums(gradient, block).numel())  # one block at least
            layer.module.weight.mul_(block_mask(layer.module.weight, gradient, amount, block))
            masked += [layer.name] if amount > 0 else []
    unread = any((m.weight == 0).transpose(0, 1).flatten(1).all(1).any() for m in (a.module for a in layers))
    sizes = empty_channels(model, find_groups(model, images[:1], block[0])) if unread else {}
    return {"masked": masked, "sizes": sizes, "share": chosen.share, "as_published": published}


def _align(
    model: nn.Module,
    images: Tensor,
    macs: float,
    block: Block,
    cost: str,
    batch_size: int,
    *,
    second_order: bool,
    power: float,
    seed: int,
    progress: Progress | None,
) -> dict[str, Any]:
    groups = find_groups(model, images[:1], block[0], _part(progress, 0, 40))
    if not groups:
        raise CompressionError(
            f"{type(model).__name__} has no channels that can go as a whole: use pattern='blocks', or another model."
        )
    named = parameters_of(model, groups)
    own = gradients(model, images, list(named.values()), seed=seed, progress=_part(progress, 40, 70))
    found = dict(zip(named, own, strict=True))
    ranked = [rank(model, group, found) for group in groups]
    repeated = images[torch.arange(batch_size) % len(images)]
    gone, share = allocate_groups(
        model,
        images[:1],
        ranked,
        share=macs,
        cost=cost,
        batch=repeated,
        block=block,
        second_order=second_order,
        power=power,
        progress=_part(progress, 70, 100),
    )
    return {"sizes": remove(model, ranked, gone), "share": share}


def _train(
    model: nn.Module,
    dense: nn.Module,
    images: Tensor,
    train: Batches | None,
    epochs: int,
    lr: float | None,
    distill: float,
    progress: Progress | None,
) -> None:
    options = {"epochs": epochs, "weight_decay": 0.05, "teacher": dense, "progress": progress}
    if train is not None:
        finetune(model, train, lr=5e-4 if lr is None else lr, alpha=distill, **options)
    elif len(images) >= LEAST:
        batches = images.tensor_split(-(-len(images) // BATCH))
        own = [(batch, torch.zeros(len(batch), dtype=torch.long)) for batch in batches]
        finetune(model, own, lr=1e-4 if lr is None else lr, alpha=1.0, **options)
    else:
        log.warning("Only %d images: the pruned model is not trained on; give `train`, or more images.", len(images))


def _part(progress: Progress | None, start: int, end: int) -> Progress | None:
    """Tells of a part of the work as percents of the whole."""
    if progress is None:
        return None
    return lambda done, total: progress(start + (end - start) * done // max(total, 1), 100)


def _density(module: nn.Module) -> float:
    return float((module.weight != 0).float().mean())

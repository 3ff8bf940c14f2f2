"""Sparsifiner: attention between the pairs of tokens that a small predictor keeps.

For people who want less attention work without dropping tokens, on any backbone with our attention socket; tokens can
be dropped beside it. "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers"
(Wei, Duke, Jiang, Aarabi, Taylor, Shkurti; CVPR 2023, arXiv 2303.13755). No weights are published; the authors' keys
load through `from_published`.

Each layer predicts its attention from a low-rank form, keeps the largest part of every row, and computes the softmax
between those pairs. The predictors learn first, from the full attention; then the rest learns under their masks.

Departures, each with its reason:

- The authors mask a dense attention, which saves counted operations and no time. Here kept keys are gathered and the
  rest is skipped (`kernels`), where that is faster on this machine than dense attention (`crossover`). Skipping never
  pays with a list of keys for each query: choosing them takes longer than dense attention. So where it can pay,
  neighbouring queries share a list (`group`), predicted from their mean; with `group=1` masks are as published.
- Dropped tokens leave the sequence instead of becoming zeros, with the same answers; `drop=False` in `plan` keeps them.
- The predictors learn the map that masks are made of, as a distribution; `as_published=True` gives the squared error of
  the raw map, whose basis may be negative where the masks take its absolute values. They start as attention to blocks
  of neighbouring keys.
- The number of keys that token pruning lowers is set anew in every pass.
- Pyramids have fewer keys than queries, or none of the class tokens: the predictor is tied to the keys alone.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitalloy.compression.tokens.sparsifiner import training
from vitalloy.compression.tokens.sparsifiner.attend import Maps, SparseAttend, reconstructing, watched
from vitalloy.compression.tokens.sparsifiner.budget import choose_kernels, sparse_macs, within
from vitalloy.compression.tokens.sparsifiner.convert import LEAST_KEYS, from_published, plan, rebuild
from vitalloy.compression.tokens.sparsifiner.crossover import GROUP, crossover, pays_below
from vitalloy.compression.tokens.sparsifiner.measure import links, recall, sparsity
from vitalloy.compression.tokens.sparsifiner.predictor import MaskPredictor
from vitalloy.errors import CompressionError
from vitalloy.layers.sockets import find

__all__ = [
    "Maps",
    "MaskPredictor",
    "SparseAttend",
    "compress",
    "crossover",
    "from_published",
    "links",
    "pays_below",
    "plan",
    "rebuild",
    "recall",
    "reconstructing",
    "sparse_macs",
    "sparsity",
    "watched",
]

log = logging.getLogger("vitalloy")


def compress(
    model: nn.Module,
    images: Tensor,
    *,
    keep: float = 0.25,
    coefficients: int = 8,
    basis_threshold: float = 0.02,
    coefficient_threshold: float | None = None,
    score_threshold: float | None = None,
    n_factor: float = 6,
    c_factor: float = 2,
    tokens: float | Sequence[float] | None = None,
    locations: Sequence[int] | None = None,
    macs: float | None = None,
    kernel: str = "auto",
    group: int | None = None,
    least_keys: int = LEAST_KEYS,
    as_published: bool = False,
    train: Iterable[tuple[Tensor, Tensor]] | None = None,
    predictor_epochs: int = 3,
    epochs: int = 3,
    predictor_lr: float = 2e-2,
    lr: float = 2e-4,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """Make the attention of a model sparse, and teach it.

    Args:
        model: a float classifier in evaluation mode, changed in place.
        images: (N, C, H, W).
        keep: share of the keys that a query attends to, above 0 and up to 1.
        coefficients: basis maps that a query may mix.
        basis_threshold, coefficient_threshold: what counts as nothing in the basis, and instead of `coefficients`.
        score_threshold: keep the pairs that are predicted above it instead of a share.
        n_factor: keys per basis map. c_factor: channels of a head per channel of the predictor.
        tokens: share of the patch tokens that live on at each of `locations` (blocks, counted from 0); one number r
            stands for r, r^2, r^3. For plain transformers that answer from a class token.
        macs: share of the multiply-accumulates of an image that may stay; `keep` is then found. Counted as if all
            that is masked were skipped, predictors included.
        kernel: "gather" (skip), "dense" (mask), "flex" (FlexAttention, for CUDA) or "auto": gather in the layers where
            it was measured to be faster here than dense attention.
        group: neighbouring queries that share their keys. When None, 128 in layers that gather and 1, as published, in
            the others.
        least_keys: layers with fewer keys, such as those on small windows, stay as they are.
        as_published: let the predictors learn the raw map by its squared error.
        train: batches (images, labels), iterated once an epoch; the calibration images without labels when None.
        predictor_epochs, predictor_lr: of the first phase. epochs, lr: of the second.
        seed: of the order of images, and of dropout.
        progress: is told (epochs done, epochs of both phases).

    Returns:
        The model with `settings` for `rebuild`; `choices`, a row for each layer with the kernel and what was measured;
        and `left_alone`, attention that stayed dense, by name, with the reason.

    Raises:
        CompressionError: an option out of range, no attention that could be sparse, a budget out of reach (the nearest
            that is not is named), or tokens that cannot be dropped from this model.
    """
    options: dict[str, Any] = {
        "coefficients": coefficients,
        "basis_threshold": basis_threshold,
        "coefficient_threshold": coefficient_threshold,
        "score_threshold": score_threshold,
        "n_factor": n_factor,
        "c_factor": c_factor,
        "tokens": tokens,
        "locations": locations,
        "least_keys": least_keys,
        "kernel": "dense" if kernel == "auto" else kernel,
        "group": (GROUP if kernel == "gather" else 1) if group is None else group,
    }
    for name, rate in (("predictor_lr", predictor_lr), ("lr", lr)):
        if not 0 < rate < float("inf"):
            raise CompressionError(f"sparsifiner takes a learning rate above 0; it got {name}={rate!r}.")
    if group is not None and group < 1:
        raise CompressionError(f"sparsifiner takes group of 1 or more; it got {group!r}.")
    settings, left = plan(model, images, keep=keep, **options)
    if tokens is not None:
        _check_dropping(model, images[:2], settings)
    if macs is not None:
        if score_threshold is not None:
            raise CompressionError("macs needs a share of the keys: leave score_threshold out.")
        settings = within(model, images[:1], macs, lambda share: plan(model, images, keep=share, **options)[0])
    choices = choose_kernels(model, images[:1], settings, kernel, group)

    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    rebuild(model, **settings)
    total = predictor_epochs + epochs
    generator = torch.Generator().manual_seed(seed)

    def epoch() -> Iterable[training.Batch]:
        return training.batches(images, train, generator)

    with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
        torch.manual_seed(seed)
        training.learn_predictors(
            model,
            epoch,
            epochs=predictor_epochs,
            lr=predictor_lr,
            as_published=as_published,
            progress=progress and (lambda done: progress(done, total)),
        )
        _check_basis(model)
        training.distill(
            model,
            teacher,
            epoch,
            epochs=epochs,
            lr=lr,
            progress=progress and (lambda done: progress(predictor_epochs + done, total)),
        )
    model.choices, model.left_alone = choices, left
    for name, reason in left.items():
        log.info("%s stays dense: %s.", name, reason)
    return model.eval()


@torch.no_grad()
def _check_dropping(model: nn.Module, images: Tensor, settings: dict[str, Any]) -> None:
    """Dropping tokens must give the answers that setting them to zero gives; all links are kept for the comparison."""
    answers = []
    layers = {name: {**layer, "group": 1, "kernel": "dense"} for name, layer in settings["layers"].items()}
    blocks = settings["tokens"]["blocks"]
    try:
        for drop in (True, False):
            tokens = {**settings["tokens"], "drop": drop, "blocks": blocks}
            own = {**settings, "layers": layers, "tokens": tokens, "score_threshold": -1.0}
            answers.append(rebuild(copy.deepcopy(model), **own)(images))
        plain = model(images)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise CompressionError(f"{type(model).__name__} does not run with fewer tokens: leave tokens out.") from error
    dropped, zeroed = answers
    if (dropped - zeroed).abs().max() > 0.01 * (dropped - plain).abs().max() + 1e-5:
        raise CompressionError(
            f"{type(model).__name__} reads more than its class token, so dropping tokens changes its answers: leave "
            "tokens out."
        )


def _check_basis(model: nn.Module) -> None:
    for name, layer in find(model, SparseAttend).items():
        if not layer.predictor.basis().any():
            raise CompressionError(
                f"all basis maps of {name} lie below basis_threshold={layer.predictor.basis_threshold:g}: lower it."
            )

"""Thresholds for a wanted accuracy, time or work, found in one pass over labelled images.

Every exit answers every image once; what any thresholds would give is then a matter of counting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from vitalloy.compression.tokens.lgvit.policies import ALWAYS, NEVER, Policy, policy_of, totals
from vitalloy.compression.trunk import nearest
from vitalloy.errors import CompressionError

STEPS = 64  # thresholds tried, at even quantiles of what the exits say
ROUNDS = 2  # through the exits, in the search for a threshold each
DEFAULT_LOSS = 0.01
EXACT = 1e-9  # rounding
Costs = Sequence[Sequence[float]]  # up to each exit and the end, and of each head


class Exiting(Protocol):
    """What is calibrated: an `EarlyExit`, or the same model in another runtime."""

    policy: Policy
    head_macs: Sequence[float]
    trunk_macs: Sequence[float]

    def times(self, image: Tensor) -> tuple[Sequence[float], Sequence[float], float | None]:
        """Milliseconds up to each exit and the end, of each head, and of the model without exits."""
        ...

    def every_exit(self, images: Tensor) -> Tensor:
        """The logits of all exits and of the end, (exits + 1, B, classes)."""
        ...


@dataclass(frozen=True)
class Row:
    """What some thresholds give.

    Attributes:
        thresholds: one for each exit.
        accuracy, low, high: share of right answers, and Wilson's 95 % interval.
        macs: mean multiply-accumulates, heads included, as a share of those of the plain model.
        latency_ms: mean time of an image alone, from the times measured for each exit.
        shares: of the images that leave at each exit and at the end.
    """

    thresholds: tuple[float, ...]
    accuracy: float
    low: float
    high: float
    macs: float
    latency_ms: float
    shares: tuple[float, ...]


@dataclass(frozen=True)
class Curve:
    """Accuracy against work and time.

    Attributes:
        policy: its name.
        rows: one common threshold each, from where no image leaves early to where all leave at the first exit.
        chosen: what the model is set to; its thresholds may differ from exit to exit.
        exit_accuracy: of each exit and of the end, if all images left there.
        exit_ms: time of one image that leaves there.
        plain_ms: time of the model without exits; None where it is not at hand.
        images: how many were looked at.
        labelled: False where the answers of the end stand in for labels.
    """

    policy: str
    rows: tuple[Row, ...]
    chosen: Row
    exit_accuracy: tuple[float, ...]
    exit_ms: tuple[float, ...]
    plain_ms: float | None
    images: int
    labelled: bool

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON; thresholds beyond all scores are finite."""
        return asdict(self)


def calibrate(
    model: Exiting,
    batches: Iterable[Any],
    *,
    loss: float | None = None,
    top1: float | None = None,
    latency_ms: float | None = None,
    macs: float | None = None,
    policy: str | None = None,
    refine: bool = True,
) -> Curve:
    """Find the thresholds for one target, set them in the model, and return the whole curve.

    Args:
        model: in evaluation mode.
        batches: (images, labels), gone through once; images alone are judged by the answers of the end. Use images that
            were not trained on: on those the exits are surer than they should be.
        loss: accuracy that may be lost against the end, 0.01 being one point; the fastest within it is taken. This is
            the target where none is given.
        top1: accuracy that must be kept, as a share; the fastest is taken.
        latency_ms: mean time of an image alone; the most accurate within it is taken.
        macs: mean multiply-accumulates as a share of the plain model's; the most accurate within it is taken.
        policy: another rule than the model's.
        refine: give each exit a threshold of its own, where that is better on these images.

    Raises:
        CompressionError: no images, logits that are not finite, two targets, or one out of reach.
    """
    asked = {"loss": loss, "top1": top1, "latency_ms": latency_ms, "macs": macs}
    asked = {name: value for name, value in asked.items() if value is not None} or {"loss": DEFAULT_LOSS}
    if len(asked) > 1:
        raise CompressionError(f"give one target, not {' and '.join(asked)}.")
    (target, wanted), *_ = asked.items()
    said, labels, image = _heard(model, batches)
    rule = model.policy if policy is None else policy_of(policy, None, len(said) - 1)
    *times, plain = model.times(image)
    study = _Study(said, labels, rule, (model.trunk_macs, model.head_macs), times)
    rows = [study.row(thresholds) for thresholds in study.common()]
    full = rows[0].accuracy

    def value(row: Row) -> float:
        return full - row.accuracy if target == "loss" else row.accuracy if target == "top1" else getattr(row, target)

    def fits(row: Row) -> bool:
        return value(row) >= wanted - EXACT if target == "top1" else value(row) <= wanted + EXACT

    def merit(row: Row) -> tuple[float, float]:
        both = (-row.latency_ms, row.accuracy)
        return both if target in ("loss", "top1") else both[::-1]

    within = [row for row in rows if fits(row)]
    if not within:
        raise nearest(wanted, [value(row) for row in rows], target)
    best = max(within, key=merit)
    if refine and rule.name in ("confidence", "entropy"):
        best = _refined(study, best, fits, merit)
    model.policy = replace(rule, thresholds=best.thresholds)
    return Curve(
        policy=rule.name,
        rows=tuple(rows),
        chosen=best,
        exit_accuracy=tuple(study.right.double().mean(1).tolist()),
        exit_ms=totals(*times, model.policy),
        plain_ms=plain,
        images=said.shape[1],
        labelled=labels is not None,
    )


def within_macs(model: Exiting, images: Tensor, share: float) -> Policy:
    """The model's policy with the most careful common threshold that keeps the mean work of `images` within a share.

    Raises:
        CompressionError: out of reach; the nearest share is named.
    """
    said, labels, _ = _heard(model, images.split(64))
    work = (model.trunk_macs, model.head_macs)
    study = _Study(said, labels, model.policy, work, work)
    rows = [study.row(t) for t in study.common()]
    within = [row for row in rows if row.macs <= share]
    if not within:
        raise nearest(share, [row.macs for row in rows], "macs")
    return replace(model.policy, thresholds=max(within, key=lambda row: row.macs).thresholds)


class _Study:
    """What every exit said of every image, and what any thresholds make of it."""

    def __init__(self, said: Tensor, labels: Tensor | None, policy: Policy, work: Costs, times: Costs) -> None:
        answers = said.argmax(-1)
        self.right = answers == (answers[-1] if labels is None else labels)
        self.readings, self.policy, self.work, self.times = policy.reading(said[:-1]), policy, work, times
        self.exits = len(self.readings)

    def common(self) -> list[tuple[float, ...]]:
        """Thresholds for all exits alike, from the most careful to the most hasty."""
        name = self.policy.name
        if name == "patience":
            values = [float(row) for row in range(self.exits + 1, 0, -1)]
        else:
            places = torch.linspace(0, 1, STEPS, dtype=torch.double)
            scores = self.readings.double().flatten()
            scores = scores[:: max(len(scores) // 1_000_000, 1)]  # as many as `quantile` takes
            values = [NEVER[name], *scores.quantile(places).tolist(), ALWAYS[name]]
            values = sorted(set(values), reverse=name == "confidence")
        return [(value,) * self.exits for value in values]

    def row(self, thresholds: tuple[float, ...]) -> Row:
        from vitalloy.training.scores import wilson_interval

        policy = replace(self.policy, thresholds=thresholds)
        depths = policy.depths(self.readings)
        right, count = int(self.right.gather(0, depths[None]).sum()), len(depths)
        low, high = wilson_interval(right, count)
        shares = (depths.bincount(minlength=self.exits + 1).double() / count).tolist()
        return Row(
            thresholds=thresholds,
            accuracy=right / count,
            low=low,
            high=high,
            macs=_mean(totals(*self.work, policy), shares),
            latency_ms=_mean(totals(*self.times, policy), shares),
            shares=tuple(shares),
        )


def _mean(values: Sequence[float], shares: Sequence[float]) -> float:
    return sum(value * share for value, share in zip(values, shares, strict=True))


def _refined(study: _Study, best: Row, fits: Callable[[Row], bool], merit: Callable[[Row], Any]) -> Row:
    """A threshold for each exit, exit by exit, as long as that is better."""
    values = [common[0] for common in study.common()]
    for _ in range(ROUNDS):
        before = best
        for exit in range(study.exits):
            tries = [study.row((*best.thresholds[:exit], v, *best.thresholds[exit + 1 :])) for v in values]
            best = max([best, *(row for row in tries if fits(row))], key=merit)
        if best == before:
            break
    return best


@torch.no_grad()
def _heard(model: Exiting, batches: Iterable[Any]) -> tuple[Tensor, Tensor | None, Tensor]:
    """The logits of all exits for all images, the labels where there are any, and the first image."""
    said, labels, image = [], [], None
    device = next((p.device for p in getattr(model, "parameters", lambda: iter(()))()), torch.device("cpu"))
    for batch in batches:
        images, *rest = batch if isinstance(batch, tuple | list) else (batch,)
        image = images[:1].to(device) if image is None else image
        said.append(model.every_exit(images.to(device)).cpu())
        labels += [torch.as_tensor(given) for given in rest[:1]]
    if image is None:
        raise CompressionError("there are no images to calibrate exits on: pass at least one batch.")
    every = torch.cat(said, 1).float()
    if not every.isfinite().all():
        raise CompressionError("an exit answers a calibration image with values that are not finite.")
    return every, torch.cat(labels).cpu() if labels else None, image

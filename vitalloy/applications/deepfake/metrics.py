"""What scores of faces and videos are worth: accuracy, AUC, equal error rate, log loss and F1, with intervals.

A score is about 0 for real and 1 for fake. Intervals are percentile bootstraps (Efron, 1979) of 95 %: whole videos are
drawn again, because faces of one video are alike, and the drawing is done within real and within fake, so that every
resample has both. The area under the ROC curve is the rank statistic with ties counted half; the equal error rate is
read where the straight pieces of the ROC curve cross the line of equal errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vitalloy.errors import DataError

METRICS = ("accuracy", "auc", "eer", "log_loss", "f1")
THRESHOLD = 0.5  # above it is fake
CLIP = 1e-6  # scores are kept this far from 0 and 1 in the log loss
_CHUNK = 2_000_000  # resamples x frames held at once


def frame_metrics(
    fake: Any,
    scores: Any,
    groups: Any = None,
    repeats: int = 1000,
    seed: int = 0,
    *,
    predicted: Any = None,
) -> dict[str, Any]:
    """Accuracy, area under the ROC curve, equal error rate, log loss (nats) and F1 (fake is positive).

    Args:
        fake: (N,) the truth.
        scores: (N,) about 0 for real to 1 for fake.
        groups: (N,) which video each belongs to; resampling takes whole groups. Without it each stands alone.
        repeats: resamples for the intervals; 0 leaves them out.
        predicted: (N,) the decisions, true for fake; without it, scores above 0.5.

    Returns `n`, `n_fake`, `n_real`, `n_groups`, each metric, and `<metric>_interval` as [low, high]. A metric that one
    class alone cannot give is None. An interval is None where resampling cannot tell: a class with a single group, or
    all resamples alike (as when not one answer is wrong); the accuracy then has Wilson's interval over the groups.

    Raises:
        DataError: lengths differ, or a score is not a number.
    """
    fake, scores = np.asarray(fake, dtype=bool), np.asarray(scores, dtype=np.float64)
    predicted = scores > THRESHOLD if predicted is None else np.asarray(predicted, dtype=bool)
    group = np.arange(len(fake)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    if not len(fake) == len(scores) == len(predicted) == len(group):
        raise DataError(f"Scores are measured against as many labels, but {len(scores)} meet {len(fake)}.")
    if not np.isfinite(scores).all():
        raise DataError(f"{int((~np.isfinite(scores)).sum())} of {len(scores)} scores are not numbers.")
    n_groups = int(group.max(initial=-1)) + 1
    result: dict[str, Any] = {
        "n": len(fake),
        "n_fake": int(fake.sum()),
        "n_real": int((~fake).sum()),
        "n_groups": n_groups,
    }
    measure = _measure(fake, scores, predicted)
    values = {name: float(found[0]) for name, found in measure(np.ones((1, len(fake)))).items()}
    draws = _draws(fake, group, repeats, seed)
    low, high = _percentiles(measure, draws, group)
    for name in METRICS:
        value = values.get(name)
        result[name] = value
        interval = [low[name], high[name]] if name in low and low[name] < high[name] else None
        if name == "accuracy" and interval is None and value is not None and repeats:
            from vitalloy.training.scores import wilson_interval

            interval = list(wilson_interval(value * n_groups, n_groups))
        result[f"{name}_interval"] = interval
    return result


def _measure(fake: np.ndarray, scores: np.ndarray, predicted: np.ndarray) -> Callable[..., dict[str, np.ndarray]]:
    """A function from weights (R, N) of the frames to the metrics, each (R,); only those that the classes allow."""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))  # one step of the ROC curve a distinct score
    clipped = np.clip(scores, CLIP, 1 - CLIP)
    columns = np.stack(  # (N, 4): right, surprise, caught, fake or called fake
        [fake == predicted, -np.log(np.where(fake, clipped, 1 - clipped)), fake & predicted, fake * 1.0 + predicted], 1
    ).astype(np.float64)

    def measure(weights: np.ndarray) -> dict[str, np.ndarray]:
        if not len(fake):
            return {}
        total = weights.sum(1)
        right, surprise, caught, either = (weights @ columns).T
        found = {"accuracy": right / total, "log_loss": surprise / total}
        if fake.any():
            found["f1"] = 2 * caught / either
        if fake.any() and not fake.all():
            weights = weights[:, order]
            of_fake = np.add.reduceat(weights * fake[order], starts, axis=1)  # (R, distinct scores)
            of_real = np.add.reduceat(weights, starts, axis=1) - of_fake
            missed, passed = of_fake.cumsum(1), of_real.cumsum(1)  # fakes, reals with at most this score
            fakes, reals = missed[:, -1:], passed[:, -1:]
            found["auc"] = (of_fake * (passed - of_real / 2)).sum(1) / (fakes * reals)[:, 0]
            found["eer"] = _equal_error(missed / fakes, 1 - passed / reals)
        return found

    return measure


def _equal_error(missed: np.ndarray, alarms: np.ndarray) -> np.ndarray:
    """Where two error rates (R, T), one rising and one falling with the threshold, are equal; (R,)."""
    rows = np.arange(len(missed))
    missed = np.concatenate([np.zeros((len(rows), 1)), missed], 1)  # a threshold below every score
    alarms = np.concatenate([np.ones((len(rows), 1)), alarms], 1)
    gap = missed - alarms
    after = np.argmax(gap >= 0, axis=1)
    before = after - 1
    part = gap[rows, before] / (gap[rows, before] - gap[rows, after])
    return missed[rows, before] + part * (missed[rows, after] - missed[rows, before])


def _draws(fake: np.ndarray, group: np.ndarray, repeats: int, seed: int) -> np.ndarray | None:
    """How often each group is in each resample, (repeats, groups); None where there is nothing to draw from."""
    sizes = np.bincount(group)
    fakes = np.bincount(group, weights=fake, minlength=len(sizes))
    stratum = np.where(fakes == 0, 0, np.where(fakes == sizes, 2, 1))  # real, mixed, fake
    if not repeats or not len(sizes) or min(np.unique(stratum, return_counts=True)[1]) < 2:
        return None
    rng = np.random.default_rng(seed)
    draws = np.zeros((repeats, len(sizes)))
    for kind in np.unique(stratum):
        members = np.flatnonzero(stratum == kind)
        draws[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=repeats)
    return draws


def _percentiles(
    measure: Callable[..., dict[str, np.ndarray]], draws: np.ndarray | None, group: np.ndarray
) -> tuple[dict[str, float], dict[str, float]]:
    """The 2.5th and the 97.5th percentile of each metric over the resamples."""
    if draws is None:
        return {}, {}
    step = max(1, _CHUNK // len(group))
    parts = [measure(draws[at : at + step][:, group]) for at in range(0, len(draws), step)]
    found = {name: np.percentile(np.concatenate([part[name] for part in parts]), (2.5, 97.5)) for name in parts[0]}
    return {name: float(pair[0]) for name, pair in found.items()}, {n: float(pair[1]) for n, pair in found.items()}


def video_metrics(rows: Iterable[Mapping[str, Any]], repeats: int = 1000, seed: int = 0) -> dict[str, Any]:
    """What verdicts on videos are worth.

    Each row has `fake` (the truth), `label` ("fake", "real", "no face" or "unreadable"), `score` and `kind`.

    Returns the metrics of `frame_metrics` over the videos with a verdict, and `videos` (all), `no_face`, `unreadable`;
    `as_published`: the metrics as the authors count, a missing face being FAKE with score 0.5; `by_kind`: for each
    manipulation or source how many got a verdict and how many of these were right.
    """
    rows = list(rows)
    decided = [row for row in rows if row["label"] in ("fake", "real") and row["score"] is not None]
    readable = [row for row in rows if row["label"] == "no face" or row in decided]
    published = frame_metrics(
        [row["fake"] for row in readable],
        [0.5 if row["label"] == "no face" else row["score"] for row in readable],
        repeats=repeats,
        seed=seed,
        predicted=[row["label"] != "real" for row in readable],
    )
    kinds: dict[tuple[str, bool], list[Mapping[str, Any]]] = {}
    for row in rows:
        kinds.setdefault((row["kind"], bool(row["fake"])), []).append(row)
    return {
        **frame_metrics(
            [row["fake"] for row in decided],
            [row["score"] for row in decided],
            repeats=repeats,
            seed=seed,
            predicted=[row["label"] == "fake" for row in decided],
        ),
        "videos": len(rows),
        "no_face": sum(row["label"] == "no face" for row in rows),
        "unreadable": sum(row["label"] == "unreadable" for row in rows),
        "as_published": published,
        "by_kind": [_of_kind(kind, fake, members) for (kind, fake), members in sorted(kinds.items())],
    }


def _of_kind(kind: str, fake: bool, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    decided = [row for row in rows if row["label"] in ("fake", "real")]
    right = sum((row["label"] == "fake") == fake for row in decided)
    return {
        "kind": kind,
        "fake": fake,
        "videos": len(rows),
        "n": len(decided),
        "correct": right,
        "accuracy": right / len(decided) if decided else None,
        "no_face": sum(row["label"] == "no face" for row in rows),
        "unreadable": sum(row["label"] == "unreadable" for row in rows),
    }

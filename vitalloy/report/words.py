"""Numbers as a person reads them, and the sentences of the report. Every sentence is computed from the metrics."""

from __future__ import annotations

import math
from collections.abc import Iterable
from datetime import datetime
from numbers import Real
from typing import Any

import numpy as np

ABSENT = "–"

# What a family of saliency methods shows, and what it does not: the first key found in the method's name decides.
_METHODS = {
    "rollout": "multiplies the attention maps of all layers, so bright marks the patches that the answer could draw "
    "on. It follows attention alone: it is the same for every class and leaves out what the other layers do",
    "occlusion": "covers one part of the picture after another, so bright marks the parts whose loss lowers the "
    "score. Evidence that is present twice may not show",
    "cam": "weighs the last feature maps by their effect on the predicted class, so bright marks the regions that "
    "speak for it. The map is as coarse as the features and does not say which property of a region counted",
    "tame": "learns a small network that picks, from the feature maps, the regions that keep the prediction alive. "
    "The mask is itself a prediction, and it does not say which property of a region counted",
    "grad": "follows the gradient of the predicted class back to the pixels, so bright marks the pixels where a "
    "small change moves the score most. That is sensitivity, not a reason",
}
_TITLES = {"grad_cam": "Grad-CAM", "gradcam": "Grad-CAM", "t_tame": "T-TAME"}
_ANY_METHOD = (
    "marks the regions that moved the answer most. It shows where evidence was found, not what the model saw in it"
)


def number(value: Any) -> float | None:
    """`value` as a finite float, or None for anything else (null, NaN, a missing key)."""
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
        return None
    return float(value)


def sig(value: Any, digits: int = 3) -> str:
    """Three significant digits: 0.0123, 4.57, 1,230."""
    x = number(value)
    if x is None:
        return ABSENT
    if x == 0:
        return "0"
    places = digits - 1 - math.floor(math.log10(abs(x)))
    x = round(x, places)
    if abs(x) < 1e-4 or abs(x) >= 1e9:
        mantissa, exponent = f"{x:.{digits - 1}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    places = digits - 1 - math.floor(math.log10(abs(x)))  # rounding may have added a digit
    return f"{x:,.{max(places, 0)}f}"


def count(value: Any) -> str:
    """A whole number with its thousands apart."""
    x = number(value)
    return ABSENT if x is None else f"{x:,.0f}"


def pct(value: Any, sign: bool = True) -> str:
    """A fraction as per cent; it only says 100% or 0% when that is exact."""
    x = number(value)
    if x is None:
        return ABSENT
    x *= 100
    places = 1
    while places < 4 and ((round(x, places) == 100 and x != 100) or (round(x, places) == 0 and x != 0)):
        places += 1
    text = f"{x:.0f}" if x in (0, 100) else f"{x:.{places}f}"
    return text + "%" * sign


def points(value: Any) -> str:
    """A difference of fractions in percentage points."""
    x = number(value)
    if x is None:
        return ABSENT
    text = f"{abs(x) * 100:.1f}"
    return f"{text} point{'' if text == '1.0' else 's'}"


def ms(value: Any) -> str:
    return ABSENT if number(value) is None else f"{sig(value)} ms"


def megabytes(value: Any) -> str:
    return ABSENT if number(value) is None else f"{sig(value)} MB"


def size(value: Any) -> str:
    """Bytes as kB, MB or GB (powers of 1000)."""
    return scaled(value, (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1)))


def amount(value: Any) -> str:
    """Parameters or multiply-adds: 5.49 M, 1.2 G."""
    return scaled(value, (("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1)))


def scaled(value: Any, units: Iterable[tuple[str, float]]) -> str:
    x = number(value)
    if x is None:
        return ABSENT
    units = list(units)
    unit, scale = next(((u, s) for u, s in units if abs(x) >= 0.9995 * s), units[-1])
    return f"{sig(x / scale)} {unit}".rstrip()


def duration(value: Any) -> str:
    x = number(value)
    if x is None:
        return ABSENT
    if x < 60:
        return f"{sig(x)} s"
    minutes, seconds = divmod(round(x), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def moment(value: Any) -> str:
    """An ISO time as a date and time of day; anything else as it stands."""
    try:
        when = datetime.fromisoformat(str(value).replace("Z", "+00:00"))
    except ValueError:
        return str(value)
    return f"{when.day} {when:%B %Y, %H:%M}"


def times(ratio: float, more: str, less: str) -> str:
    """A ratio in words: "1.4× faster", "1.2× slower", "no faster"."""
    if 0.98 < ratio < 1.02:
        return f"no {more}"
    return f"{_ratio(ratio)} {more}" if ratio > 1 else f"{_ratio(1 / ratio)} {less}"


def _ratio(x: float) -> str:
    return f"{x:.2f}×" if x < 1.1 else f"{x:.1f}×" if x < 10 else f"{x:.0f}×"


def headline(metrics: dict) -> str:
    """The reader's question answered in one sentence."""
    test, int8 = metrics.get("test") or {}, metrics.get("int8") or {}
    if number(test.get("top1")) is None:
        return f"{(metrics.get('run') or {}).get('name') or 'This run'} has no test result yet"
    text = f"{pct(test['top1'])} of {count(test['n'])} test images right" if test.get("n") else pct(test["top1"])
    low, high = (test.get("top1_interval") or [None, None])[:2]
    if number(low) is not None and number(high) is not None:
        text += f" (95% interval {pct(low, sign=False)} to {pct(high, sign=False)})"
    parts = []
    full = number((metrics.get("onnx") or {}).get("size_bytes"))
    if full and number(int8.get("size_bytes")):
        parts.append(times(full / int8["size_bytes"], "smaller", "larger"))
    if number(int8.get("speedup")):
        parts.append(times(int8["speedup"], "faster", "slower"))
    if not parts:
        return text
    at = f" at {pct(int8['top1'])}" if number(int8.get("top1")) is not None else ""
    return f"{text}; int8 is {' and '.join(parts)}{at}"


def confused_pairs(confusion: list[list[int]], names: list[str], most: int = 6) -> list[dict]:
    """The most frequent mistakes: which class was taken for which, how often, out of how many."""
    counts = np.array(confusion)
    totals = counts.sum(1)
    np.fill_diagonal(counts, 0)
    pairs = [
        {"truth": names[i], "said": names[j], "count": n, "of": of, "share": n / of}
        for i, j in np.argwhere(counts)
        for n, of in [(int(counts[i, j]), int(totals[i]))]
    ]
    return sorted(pairs, key=lambda p: (-p["count"], -p["share"]))[:most]


def calibration(test: dict) -> str:
    """What the expected calibration error means, with this run's numbers."""
    before, after = number(test.get("ece")), number(test.get("ece_calibrated"))
    if before is None:
        return ""
    text = (
        f"The expected calibration error (ECE) is {points(before)}: sort the answers by confidence, and the confidence "
        "claimed differs from the share of right answers by that much on average."
    )
    temperature = number(test.get("temperature"))
    if after is None or temperature is None:
        return text
    change = "lowers it to" if after < before else "leaves it at" if after == before else "raises it to"
    habit = (
        "was overconfident" if temperature > 1.02 else "was underconfident" if temperature < 0.98 else "was about right"
    )
    return (
        f"{text} Dividing the logits by one temperature ({sig(temperature)}, so the model {habit} on the validation "
        f"images) {change} {points(after)}."
    )


def hardest(corruptions: list[dict], clean: Any) -> str:
    """Which corruption hurts most, and how much they take on average."""
    rows = [c for c in corruptions if number(c.get("top1")) is not None]
    clean = number(clean)
    if not rows or clean is None:
        return ""
    worst = min(rows, key=lambda c: c["top1"])
    severity = f" at severity {worst['severity']}" if worst.get("severity") is not None else ""
    mean = sum(c["top1"] for c in rows) / len(rows)
    return (
        f"On clean test images the model is right {pct(clean)} of the time, and {pct(mean)} on average over the "
        f"{len(rows)} corrupted copies of the test set below. The worst is {pretty(worst['name'])}{severity}: "
        f"{pct(worst['top1'])}, {points(clean - worst['top1'])} {'below' if worst['top1'] <= clean else 'above'} clean."
    )


def saliency(method: str) -> str:
    """What this saliency method does and does not show."""
    key = next((k for k in _METHODS if k in method.lower().replace("-", "").replace("_", "")), None)
    title = _TITLES.get(method) or pretty(method)
    return f"{title[:1].upper()}{title[1:]} {_METHODS.get(key, _ANY_METHOD)}."


def pretty(name: Any) -> str:
    """`gaussian_noise` as "gaussian noise"."""
    return str(name).replace("_", " ")

"""Drawing on SVG: elements with escaped text, axes with ticks, and the frame of a plot."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from matplotlib.ticker import MaxNLocator


def el(name: str, *children: Any, tip: str = "", cls: str = "", **attrs: Any) -> Markup:
    """One SVG element; strings are escaped, floats rounded, `stroke_width` becomes `stroke-width`."""
    if cls:
        attrs["class"] = cls
    head = Markup("").join(
        Markup(' {}="{}"').format(key.replace("_", "-"), _round(value)) for key, value in attrs.items()
    )
    body = (el("title", tip) if tip else Markup("")) + Markup("").join(children)
    return Markup("<{0}{1}>{2}</{0}>").format(name, head, body)


def _round(value: Any) -> Any:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def svg(width: float, height: float, label: str, *children: Markup, cls: str = "") -> Markup:
    box = f"0 0 {_round(float(width))} {_round(float(height))}"
    return el("svg", *children, viewBox=box, role="img", aria_label=label, cls=f"plot {cls}".strip())


def cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


@dataclass
class Axis:
    """A linear or logarithmic scale from values to pixels, with its ticks."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    bins: int = 5
    whole: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (map(math.log10, (self.low, self.high, value))) if self.log else (self.low, self.high, value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    @property
    def ticks(self) -> list[float]:
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [m * 10.0**d for d in decades for m in ((1, 2, 5) if len(decades) < 4 else (1,))]
        else:
            found = MaxNLocator(self.bins, integer=self.whole, steps=[1, 2, 2.5, 5, 10]).tick_values(
                self.low, self.high
            )
        slack = 1e-9 * (self.high - self.low)
        if self.whole:
            found = [t for t in found if t == round(t)]
        return [float(t) for t in found if self.low - slack <= t <= self.high + slack]


def nice(values: list[float], start: float, end: float, floor: float | None = None, ceil: float | None = None) -> Axis:
    """A scale whose ends are ticks just outside the values."""
    low, high = min(values), max(values)
    if high - low < 1e-12 * max(abs(high), 1e-12):
        pad = abs(high) * 0.1 or 1.0
        low, high = low - pad, high + pad
    ticks = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    low = float(ticks[0]) if floor is None else max(float(ticks[0]), floor)
    high = float(ticks[-1]) if ceil is None else min(float(ticks[-1]), ceil)
    return Axis(low, high, start, end)


Text = Callable[[float], str]


def plain(tick: float) -> str:
    """A tick as short as it can be: 0.5, 2, 5e-5."""
    return f"{tick:.4g}".replace("e-0", "e-")


def whole_percent(tick: float) -> str:
    return f"{tick * 100:.4g}%"


def frame(x: Axis, y: Axis, x_label: str, y_label: str, x_text: Text = plain, y_text: Text = plain) -> Markup:
    """Horizontal rules, tick labels and the names of both axes."""
    parts = [el("text", y_label, x=0, y=y.end - 14, cls="name")]
    for tick in y.ticks:
        parts.append(el("line", x1=x.start, x2=x.end, y1=y(tick), y2=y(tick), cls="rule"))
        parts.append(el("text", y_text(tick), x=x.start - 8, y=y(tick) + 4, cls="tick", text_anchor="end"))
    for tick in x.ticks:
        parts.append(el("text", x_text(tick), x=x(tick), y=y.start + 18, cls="tick", text_anchor="middle"))
    parts.append(el("text", x_label, x=x.end, y=y.start + 36, cls="name", text_anchor="end"))
    return Markup("").join(parts)

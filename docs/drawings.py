"""Draws the pictures of the documentation as SVG: one architecture from its card, and the zoo as scatter plots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

from vitalloy.report.svg import Axis, el, frame, nice, svg

if TYPE_CHECKING:
    from vitalloy.catalog import Block, Card

WIDTH, LETTER = 880.0, 6.3  # pixels; mean width of a letter
KINDS = {
    "embedding": "embedding, head",
    "convolution": "convolution",
    "attention": "attention",
    "both": "both",
    "other": "other mixing",
}
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #1f2933 } .small, .tick, .name { font-size: 11px; fill: #52606d }
.strong { font-weight: 600 } .rule { stroke: #d9dee3 } .wire { stroke: #7b8794; fill: none; stroke-width: 1.3 }
.part { fill: #f3f5f7; stroke: #c3cbd3 } .sum { fill: #ffffff; stroke: #7b8794 } .back { fill: #ffffff }
.embedding { fill: #e4e7eb } .convolution { fill: #f2c9a1 } .attention { fill: #a9d6d3 } .both { fill: #d9cdb6 }
.other { fill: #cfc3e8 } .dot { fill: #0f766e; stroke: #ffffff } .join { stroke: #0f766e; fill: none; opacity: .35 }
.label { font-size: 10px }
@media (prefers-color-scheme: dark) {
 text { fill: #e4e7eb } .small, .tick, .name { fill: #9aa5b1 } .back { fill: #12181f } .rule { stroke: #2d3742 }
 .part { fill: #1d2630; stroke: #3e4c59 } .sum { fill: #12181f } .embedding { fill: #3e4c59 }
 .convolution { fill: #8a5a2b } .attention { fill: #1f6f6b } .both { fill: #6b5d3f } .other { fill: #594a86 }
 .dot { fill: #5eead4; stroke: #12181f } .join { stroke: #5eead4 }
}
"""


def architecture(card: Card) -> str:
    """The stages of a backbone in a row, and the blocks they are made of below."""
    count, gap = len(card.stages), 16.0
    width = (WIDTH - gap * (count - 1) - 2) / count
    wrapped = [_wrap(stage.holds, width - 14) for stage in card.stages]
    height = 46.0 + 14 * max(map(len, wrapped))
    parts = []
    for i, (stage, lines) in enumerate(zip(card.stages, wrapped, strict=True)):
        x = 1 + i * (width + gap)
        parts.append(el("rect", x=x, y=1.0, width=width, height=height, rx=6, cls=stage.kind))
        parts.append(el("text", stage.name, x=x + 8, y=19.0, cls="strong"))
        parts += [el("text", line, x=x + 8, y=36.0 + 14 * n) for n, line in enumerate(lines)]
        parts.append(el("text", f"1/{stage.stride}", x=x + width - 8, y=height - 6, cls="small", text_anchor="end"))
        if i:
            parts.append(_arrow(x - gap + 2, x - 2, 1 + height / 2))
    y = height + 22
    for block in card.blocks:
        drawn, y = _block(block, y)
        parts += drawn
    used = {stage.kind for stage in card.stages}
    x = 1.0
    for kind, name in KINDS.items():
        if kind in used:
            parts.append(el("rect", x=x, y=y + 2, width=11, height=11, rx=2, cls=kind))
            parts.append(el("text", name, x=x + 16, y=y + 12, cls="small"))
            x += 34 + LETTER * len(name)
    return _page(WIDTH, y + 20, f"{card.name}: {', '.join(stage.holds for stage in card.stages)}", parts)


def _block(block: Block, top: float) -> tuple[list[Markup], float]:
    """A chain of parts with an arc over each residual branch; returns the drawing and where the next may start."""
    parts = [el("text", block.name, x=1.0, y=top + 12, cls="strong")]
    left = x = start = 16.0
    y = top + 40
    for part in block.parts:
        sums = part.startswith("+")
        width = 16 + LETTER * len(part)
        if x > left and x + width > WIDTH:
            x, y, start = left + 24, y + 46, left + 24
        parts.append(_arrow(x - 12, x - 1, y + 11))
        parts.append(el("rect", x=x, y=y, width=width, height=22, rx=11 if sums else 4, cls="sum" if sums else "part"))
        parts.append(el("text", part, x=x + width / 2, y=y + 15, text_anchor="middle"))
        if sums:
            middle, at = x + width / 2, start - 6
            curve = f"M{at:.1f} {y + 11:.1f} V{y - 6:.1f} Q{at:.1f} {y - 12:.1f} {at + 6:.1f} {y - 12:.1f}"
            curve += f" H{middle - 6:.1f} Q{middle:.1f} {y - 12:.1f} {middle:.1f} {y - 6:.1f} V{y:.1f}"
            parts.append(el("path", d=curve, cls="wire"))
            start = x + width + 8
        x += width + 13
    return parts, y + 34


def _wrap(text: str, width: float) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if len(longer) * LETTER > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _arrow(start: float, end: float, y: float) -> Markup:
    return el("path", d=f"M{start:.1f} {y:.1f} H{end:.1f} m-4 -3 l4 3 l-4 3", cls="wire")


def _page(width: float, height: float, label: str, parts: Sequence[Markup]) -> str:
    back = el("rect", width=width, height=height, cls="back")
    drawn = svg(width, height, label, el("style", Markup(STYLE)), back, *parts)
    size = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}"'
    return str(drawn).replace("<svg", size, 1) + "\n"


@dataclass(frozen=True)
class Point:
    """One model of the zoo: `family` joins variants with a line."""

    name: str
    family: str
    x: float
    top1: float


def zoo(points: Sequence[Point], label: str) -> str:
    """Published accuracy against a cost on a logarithmic scale; variants of a family are joined, the last is named."""
    width, height = WIDTH, 560.0
    costs = [p.x for p in points]
    x = Axis(min(costs) * 0.85, max(costs) * 1.35, 52.0, width - 20, log=True)
    y = nice([p.top1 for p in points], height - 48, 34.0)
    parts = [frame(x, y, label, "ImageNet-1k top-1, published (%)")]
    families: dict[str, list[Point]] = {}
    for point in points:
        families.setdefault(point.family, []).append(point)
    taken: list[tuple[float, float, float]] = []
    for family, members in families.items():
        members = sorted(members, key=lambda p: p.x)
        line = " ".join(f"{x(p.x):.1f},{y(p.top1):.1f}" for p in members)
        parts.append(el("polyline", points=line, cls="join"))
        for p in members:
            tip = f"{p.name}: {p.top1:.1f} %, {p.x:.4g}"
            parts.append(el("circle", cx=x(p.x), cy=y(p.top1), r=4, cls="dot", tip=tip))
        parts.append(_label(family, x(members[-1].x), y(members[-1].top1), taken))
    return _page(width, height, f"Published accuracy against {label} of {len(points)} models", parts)


def _label(text: str, x: float, y: float, taken: list[tuple[float, float, float]]) -> Markup:
    """The name of a family beside its last point, moved up or down until it covers no other name."""
    width = 5.6 * len(text)
    left = x + 7 if x + 7 + width < WIDTH else x - 7 - width
    for step in (0, -11, 11, -22, 22, -33, 33, -44, 44):
        clear = all(abs(y + step - b) > 10 or left + width < a or left > a + w for a, b, w in taken)
        if clear:
            y += step
            break
    taken.append((left, y, width))
    return el("text", text, x=left, y=y + 3.5, cls="label")

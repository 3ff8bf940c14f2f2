"""The plots of the report as inline SVG. Colours are CSS classes of the page, so one drawing serves light and dark.

Every function takes rows of `metrics.json` and returns markup, or None when there is nothing to draw. Text stays
text; each mark carries a `<title>` with its exact numbers.
"""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
from markupsafe import Markup

from vitalloy.report.svg import Axis, Text, cut, el, frame, nice, plain, svg, whole_percent
from vitalloy.report.words import ABSENT, count, ms, number, pct, points, pretty, sig, size

SMALL = 16  # classes up to which the matrix leaves room for words beside it
GRID = 120  # cells a side of the matrix without labels
SHADES = 8  # steps of its colour
GLYPH = 7.4  # pixels of a letter in a label, in the widest of the usual system fonts


def curves(history: list[dict], best: int | None) -> list[Markup] | None:
    """Three panels over the epochs: losses, validation accuracy, learning rate; the best epoch is marked."""
    panels = (
        ("Loss", {"train_loss": ("training", "teal"), "val_loss": ("validation", "copper")}, sig),
        ("Validation accuracy", {"val_top1": ("accuracy", "copper")}, pct),
        ("Learning rate", {"lr": ("learning rate", "teal")}, sig),
    )
    drawn = [_curve(history, best, *panel) for panel in panels]
    return [d for d in drawn if d] or None


def _curve(history: list[dict], best: int | None, title: str, series: dict, text: Text) -> Markup | None:
    lines = {k: [(e["epoch"], number(e.get(k))) for e in history] for k in series}
    lines = {k: [(e, v) for e, v in line if v is not None] for k, line in lines.items()}
    values = [v for line in lines.values() for _, v in line]
    if not values:
        return None
    epochs = [e["epoch"] for e in history]
    spread = 0.5 if min(epochs) == max(epochs) else 0
    x = Axis(min(epochs) - spread, max(epochs) + spread, 52.0, 346.0, whole=True)
    accuracy = text is pct
    y = nice(values, 190.0, 34.0, floor=0.0 if min(values) >= 0 else None, ceil=1.0 if accuracy else None)
    if title == "Loss" and min(values) > 0 and max(values) > 30 * min(values):
        y, title = Axis(min(values) * 0.8, max(values) * 1.25, 190.0, 34.0, log=True), "Loss (log scale)"
    parts = [frame(x, y, "epoch", title, y_text=whole_percent if accuracy else plain)]
    if best in epochs:
        parts.append(el("line", x1=x(best), x2=x(best), y1=y.start, y2=y.end, cls="mark"))
    key = 346.0
    for name, (label, colour) in reversed(series.items()):
        path = " ".join(f"{x(e):.1f},{y(v):.1f}" for e, v in lines[name])
        parts.append(el("polyline", points=path, cls=f"line {colour}"))
        step = max(1, len(lines[name]) // 120)
        for epoch, value in lines[name]:
            if epoch == best or len(lines[name]) == 1:
                parts.append(el("circle", cx=x(epoch), cy=y(value), r=4, cls=f"dot {colour}"))
            if epoch == best or epoch % step == 0:
                tip = f"epoch {epoch}{' (best)' if epoch == best else ''}: {label} {text(value)}"
                parts.append(el("circle", cx=x(epoch), cy=y(value), r=7, cls="hover", tip=tip))
        if len(series) > 1:
            parts.append(el("text", label, x=key, y=20, cls=f"key {colour}", text_anchor="end"))
            key -= 7.0 * len(label) + 10
    if best in epochs and accuracy:
        right = x(best) > 250
        place = {"x": x(best) + (-8 if right else 8), "text_anchor": "end" if right else "start"}
        parts.append(el("text", f"best: epoch {best}", y=y.start - 10, cls="note", **place))
    return svg(352, 232, f"{title} over {len(history)} epochs", *parts)


def confusion(matrix: list[list[int]], names: list[str]) -> Markup:
    """A labelled heat map with counts: rows are the truth, columns the answer; shares are of the row."""
    n, most = len(matrix), 16
    longest = max(min(len(name), most) for name in names)
    cell = max(24.0, min(44.0, 460 / n))
    left = 30.0 + 7.2 * longest
    slanted = 7.2 * longest > cell - 4
    top = 44.0 + (5.2 * longest if slanted else 0.0)
    width = left + n * cell + (5.2 * longest if slanted else 0) + 2
    down = f"translate(12 {top + n * cell / 2:.0f}) rotate(-90)"
    parts = [
        el("text", "answer of the model", x=left + n * cell / 2, y=14, cls="name", text_anchor="middle"),
        el("text", "truth", cls="name", text_anchor="middle", transform=down),
    ]
    for i, row in enumerate(matrix):
        y, total = top + i * cell, sum(row) or 1
        label = cut(names[i], most)
        parts.append(
            el("text", label, tip=names[i], x=left - 9, y=y + cell / 2 + 4, cls="tick user", text_anchor="end")
        )
        middle = left + i * cell + cell / 2
        turn = {"transform": f"translate({middle + 3:.1f} {top - 9:.1f}) rotate(-45)"} if slanted else {}
        place = turn or {"x": middle, "y": top - 9, "text_anchor": "middle"}
        parts.append(el("text", label, tip=names[i], cls="tick user", **place))
        for j, value in enumerate(row):
            share = value / total
            tip = f"{names[i]} → {names[j]}: {count(value)} of {count(sum(row))} ({pct(share)})"
            colour = "empty" if not value else "teal" if i == j else "copper"
            strength = 1.0 if not value else 0.14 + 0.86 * (share if i == j else math.sqrt(share))
            x = left + j * cell
            box = {"x": x + 1, "y": y + 1, "width": cell - 2, "height": cell - 2, "rx": 3}
            parts.append(el("rect", **box, cls=f"fill {colour}", fill_opacity=strength, tip=tip))
            if value:
                ink = "cell over" if strength > 0.6 else "cell"
                parts.append(
                    el("text", count(value), x=x + cell / 2, y=y + cell / 2 + 4, cls=ink, text_anchor="middle")
                )
    label = f"Confusion matrix of {n} classes: rows are the truth, columns the answer"
    return svg(width, top + n * cell + 2, label, *parts, cls=f"{'tight' * (n > SMALL)} {'slant' * slanted}".strip())


def block(classes: int) -> int:
    """How many neighbouring classes one square of the compact matrix holds."""
    return math.ceil(classes / GRID)


def compact(matrix: list[list[int]]) -> Markup:
    """A matrix without labels for many classes: one path a shade, so that a thousand classes stay small."""
    step = block(len(matrix))
    n = math.ceil(len(matrix) / step)
    counts = np.array(matrix)
    cells = np.zeros((n, n))
    rows, columns = np.nonzero(counts)
    np.add.at(cells, (rows // step, columns // step), counts[rows, columns])
    shares = cells / np.maximum(cells.sum(1, keepdims=True), 1)
    paths: dict[tuple[str, int], list[str]] = defaultdict(list)
    for i, j in np.argwhere(cells):
        shade = math.ceil(SHADES * (shares[i, j] if i == j else math.sqrt(shares[i, j])))
        paths["teal" if i == j else "copper", shade].append(f"M{j} {i}h1v1h-1z")
    parts = [el("rect", width=n, height=n, cls="fill empty")]
    for (colour, shade), found in sorted(paths.items()):
        parts.append(el("path", d="".join(found), cls=f"fill {colour}", fill_opacity=0.1 + 0.9 * shade / SHADES))
    return svg(
        n, n, f"Compact confusion matrix of {len(matrix)} classes, right answers on the diagonal", *parts, cls="crisp"
    )


def reliability(bins: list[dict], calibrated: bool) -> Markup | None:
    """Share of right answers by confidence, the gap to the claim, and below how many images fall in each bin."""
    bins = [b for b in bins if b.get("count") and number(b.get("accuracy")) is not None]
    if not bins:
        return None
    x, y = Axis(0.0, 1.0, 52.0, 346.0), Axis(0.0, 1.0, 300.0, 34.0)
    title = ("After temperature scaling" if calibrated else "As trained") + ": share of right answers"
    parts = [frame(x, y, "", title, whole_percent, whole_percent)]
    most = max(b["count"] for b in bins)
    for b in bins:
        box = {"x": x(b["low"]) + 1, "width": x(b["high"]) - x(b["low"]) - 2}
        accuracy, confidence = b["accuracy"], b["confidence"]
        tip = (
            f"confidence {pct(b['low'])} to {pct(b['high'])}: {count(b['count'])} images, "
            f"claimed {pct(confidence)}, right {pct(accuracy)}"
        )
        upper, lower = y(max(accuracy, confidence)), y(min(accuracy, confidence))
        parts.append(el("rect", **box, y=lower, height=y(0) - lower, cls="fill teal soft", tip=tip))
        parts.append(el("rect", **box, y=upper, height=lower - upper, cls="fill copper gap", tip=tip))
        end = box["x"] + box["width"]
        parts.append(el("line", x1=box["x"], x2=end, y1=y(accuracy), y2=y(accuracy), cls="line teal"))
        tall = max(1.0, 34 * b["count"] / most)
        parts.append(el("rect", **box, y=366 - tall, height=tall, cls="fill muted", tip=tip))
    parts.append(el("line", x1=x(0), y1=y(0), x2=x(1), y2=y(1), cls="mark"))
    parts.append(el("line", x1=x(0), x2=x(1), y1=366, y2=366, cls="rule"))
    parts.append(el("text", "images", x=44, y=364, cls="tick", text_anchor="end"))
    parts.append(el("text", "confidence", x=346, y=384, cls="name", text_anchor="end"))
    return svg(
        352, 390, "Reliability diagram " + ("after" if calibrated else "before") + " temperature scaling", *parts
    )


def corruptions(rows: list[dict], clean: float | None) -> Markup | None:
    """Bars of accuracy per corruption (a thin bar per severity), mildest first, against the clean accuracy."""
    groups: dict[str, list[dict]] = defaultdict(list)
    for row in rows:
        if number(row.get("top1")) is not None:
            groups[pretty(row["name"])].append(row)
    if not groups:
        return None
    single = all(len(g) == 1 for g in groups.values())
    tall, apart, clean = (16, 12, number(clean)) if single else (9, 14, number(clean))
    x, y, parts = Axis(0.0, 1.0, 138.0, 396.0), 44.0, []
    for name, group in sorted(groups.items(), key=lambda g: -sum(r["top1"] for r in g[1]) / len(g[1])):
        middle = y + len(group) * tall / 2 + 4
        parts.append(el("text", cut(name, 19), x=130, y=middle, cls="label user", text_anchor="end", tip=name))
        for k, row in enumerate(sorted(group, key=lambda r: r["severity"])):
            loss = f", {points(clean - row['top1'])} lost" if clean is not None else ""
            box = {"x": 138, "y": y, "width": max(1.0, x(row["top1"]) - 138), "height": tall - 1.5, "rx": 2}
            tip = f"{name}, severity {row['severity']}: {pct(row['top1'])}{loss}"
            if clean is not None:
                parts.append(el("rect", **box | {"width": max(1.0, x(clean) - 138)}, cls="fill empty"))
            depth = 0.85 if single else 0.4 + 0.6 * (k + 1) / len(group)
            parts.append(el("rect", **box, cls="fill teal", fill_opacity=depth, tip=tip))
            y += tall
        value = pct(min(r["top1"] for r in group))
        parts.append(el("text", value, x=406, y=middle, cls="label value"))
        y += apart
    if clean is not None:
        parts.append(el("line", x1=x(clean), x2=x(clean), y1=34, y2=y - apart + 4, cls="line copper dash"))
        parts.append(el("text", f"clean {pct(clean)}", x=x(clean), y=24, cls="key copper", text_anchor="end"))
    return svg(460, y, f"Accuracy under {len(groups)} corruptions", *parts)


def frontier(rows: list[dict]) -> Markup | None:
    """Latency against accuracy, area by file size; hollow where another point is as fast and as accurate."""
    rows = [r for r in rows if number(r.get("latency_ms")) is not None and number(r.get("top1")) is not None]
    if not rows:
        return None
    slowest = max(max(r["latency_ms"], number(r.get("latency_p90_ms")) or 0) for r in rows)
    x = nice([0.0, slowest * 1.05], 52.0, 446.0, floor=0.0)
    scores = [r["top1"] for r in rows]
    pad = max(0.005, (max(scores) - min(scores)) * 0.35)
    y = nice([min(scores) - pad, min(1.0, max(scores) + pad)], 270.0, 40.0, floor=0.0)
    parts = [frame(x, y, "median latency of one image, ms", "Top-1 accuracy", y_text=whole_percent)]
    biggest = max(number(r.get("size_bytes")) or 0 for r in rows) or 1
    spots = []
    for r in rows:
        radius = max(5.0, 20 * math.sqrt((number(r.get("size_bytes")) or 0) / biggest))
        spots.append((x(r["latency_ms"]), y(r["top1"]), radius))
    taken = [(a - r, b - r, a + r, b + r) for a, b, r in spots]
    for r, (at, up, radius) in zip(rows, spots, strict=True):
        weight = size(r.get("size_bytes"))
        tip = f"{r['name']}: {ms(r['latency_ms'])} (p90 {ms(r.get('latency_p90_ms'))}), {pct(r['top1'])}, {weight}"
        if number(r.get("latency_p90_ms")) is not None:
            parts.append(el("line", x1=at, x2=x(r["latency_p90_ms"]), y1=up, y2=up, cls="line teal thin"))
        parts.append(el("circle", cx=at, cy=up, r=radius, cls="spot hollow" if _beaten(r, rows) else "spot", tip=tip))
        parts.append(el("circle", cx=at, cy=up, r=2.5, cls="dot teal"))
        label = cut(r["name"], 30) + (f" · {weight}" if weight != ABSENT else "")
        left, line = _free(at, up, radius, GLYPH * len(label), taken)
        parts.append(el("text", label, x=left, y=line, cls="label user"))
    return svg(460, 310, "Latency against accuracy; the area of a point is its file size", *parts)


def exits(rows: list[dict], chosen: dict) -> Markup | None:
    """Accuracy against the mean work of an image, a point for each threshold; the chosen thresholds are marked."""
    rows = sorted((r for r in rows if number(r.get("macs")) is not None), key=lambda r: r["macs"])
    if len(rows) < 2:
        return None
    x = nice([0.0, rows[-1]["macs"]], 52.0, 446.0, floor=0.0)
    y = nice([r["accuracy"] for r in [*rows, chosen]], 270.0, 40.0, floor=0.0, ceil=1.0)
    parts = [frame(x, y, "mean work of an image, of the full model's", "Top-1 accuracy", whole_percent, whole_percent)]
    path = " ".join(f"{x(r['macs']):.1f},{y(r['accuracy']):.1f}" for r in rows)
    parts.append(el("polyline", points=path, cls="line teal"))
    for r in [*rows, chosen]:
        mark = r is chosen
        levels = ", ".join(sig(t) for t in (r["thresholds"] if mark else r["thresholds"][:1]))
        tip = f"threshold {levels}: {pct(r['accuracy'])} with {pct(r['macs'])} of the work"
        parts.append(el("circle", cx=x(r["macs"]), cy=y(r["accuracy"]), r=7, cls="hover", tip=tip))
        if mark:
            parts.append(el("circle", cx=x(r["macs"]), cy=y(r["accuracy"]), r=5, cls="dot copper"))
            parts.append(el("text", "chosen", x=x(r["macs"]) + 9, y=y(r["accuracy"]) + 15, cls="key copper"))
    return svg(460, 310, "Accuracy against work for every threshold of the exits", *parts)


def kept(rows: list[dict]) -> Markup | None:
    """A bar for each layer: the share of its work that stays."""
    rows = [r for r in rows if number(r.get("kept")) is not None]
    if not rows:
        return None
    x, tall, y, parts = Axis(0.0, 1.0, 168.0, 396.0), 14, 14.0, []
    for r in rows:
        name, share = r["layer"], r["kept"]
        tip = f"{name}: {pct(share)} of {count(r['macs_before'])} multiply-adds stay"
        box = {"x": 168, "y": y, "height": tall - 4, "rx": 2}
        parts.append(el("text", cut(name, 24), x=160, y=y + 9, cls="tick user", text_anchor="end", tip=name))
        parts.append(el("rect", **box, width=x(1.0) - 168, cls="fill empty"))
        parts.append(el("rect", **box, width=max(1.0, x(share) - 168), cls="fill teal", tip=tip))
        parts.append(el("text", pct(share), x=404, y=y + 9, cls="tick"))
        y += tall
    return svg(460, y + 4, f"Work that stays in each of {len(rows)} layers", *parts)


def _beaten(row: dict, rows: list[dict]) -> bool:
    """Whether another runtime is at least as fast and as accurate, and better in one of them."""
    mine = (row["latency_ms"], row["top1"])
    return any(
        o["latency_ms"] <= mine[0] and o["top1"] >= mine[1] and (o["latency_ms"], o["top1"]) != mine for o in rows
    )


def _free(at: float, up: float, radius: float, wide: float, taken: list[tuple]) -> tuple[float, float]:
    """Where a label `wide` pixels long fits beside a point without covering what is `taken`; adds itself to it."""
    middle = min(max(at - wide / 2, 54.0), 458.0 - wide)
    spots = [
        (middle, up - radius - 7),
        (middle, up + radius + 17),
        (at + radius + 8, up + 18),
        (at - radius - wide - 8, up + 4),
    ]
    spots += [(middle, up + side * (radius + 17 * k)) for k in range(2, 9) for side in (-1, 1)]
    for left, line in spots:
        box = (left, line - 12, left + wide, line + 4)
        apart = all(box[2] < t[0] or box[0] > t[2] or box[3] < t[1] or box[1] > t[3] for t in taken)
        if apart and box[0] >= 52 and box[2] <= 460 and box[1] >= 24 and box[3] <= 268:
            break
    taken.append(box)
    return left, line

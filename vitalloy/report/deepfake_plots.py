"""The plots of the deepfake report, and the numbers on them: scores over time, and the ROC curve of an evaluation.

Colours are CSS classes of the page, as in `plots`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from vitalloy.report import words
from vitalloy.report.svg import Axis, el, frame, plain, svg, whole_percent

if TYPE_CHECKING:
    from vitalloy.applications.deepfake.pipeline import FaceScore, Verdict

NUMBERED = 60  # faces up to which a dot has room for the number of its person
DOTS = 300  # faces up to which every dot is a mark with its own tip
HUES = 6  # colours of people


def score(value: Any) -> str:
    """A score with three digits; it only says 0, 0.5 or 1 when that is exact."""
    x = words.number(value)
    if x is None:
        return words.ABSENT
    places = 3
    while places < 6 and round(x, places) in (0, 0.5, 1) and round(x, places) != x:
        places += 1
    return f"{x:.{places}f}"


def signed(value: Any) -> str:
    """A change of a score with its sign."""
    x = words.number(value)
    return words.ABSENT if x is None else f"{x:+.3f}".replace("-", "\N{MINUS SIGN}")


def clock(seconds: Any) -> str:
    """A moment in a video: 3.20 s, 1:04.5, 2:00:31."""
    x = words.number(seconds)
    if x is None:
        return words.ABSENT
    if x < 60:
        return f"{x:.2f} s"
    hours, rest = divmod(x, 3600)
    return f"{int(hours)}:{int(rest // 60):02d}:{int(rest % 60):02d}" if hours else f"{int(x // 60)}:{x % 60:04.1f}"


def alone(face: FaceScore, net: str) -> float:
    """The vote of one network on one face."""
    import torch

    from vitalloy.applications.deepfake.pipeline import vote

    return vote(torch.tensor([face.logits[net]], dtype=torch.float64)).score


def timeline(verdict: Verdict, demo: bool = False) -> Markup | None:
    """Scores over time: a dot a face, joined to the marks of the networks alone where both ran.

    Dots take the colour of their person where there are several, else that of their side of the decision line. The
    solid line is the score of the video, the band its spread. None where there are no two moments to compare.
    """
    faces = verdict.faces
    if len({f.frame for f in faces}) < 2:
        return None
    timed = all(f.time is not None for f in faces)
    at = [float(f.time if timed else f.frame) for f in faces]
    unit, scale = ("minutes", 60.0) if timed and max(at) > 300 else ("seconds" if timed else "frame", 1.0)
    at = [t / scale for t in at]
    pad = 0.02 * (max(at) - min(at)) or 0.5
    x = Axis(min(at) - pad, max(at) + pad, 44.0, 650.0, bins=9, whole=not timed)
    y = Axis(0.0, 1.0, 236.0, 54.0 if demo else 38.0)
    parts = [frame(x, y, unit, "score of a face: 0 real, 1 fake", plain, plain)]
    mean = words.number(verdict.score)
    if mean is not None:
        if len(faces) > 1 and words.number(verdict.spread):
            top, low = y(min(mean + verdict.spread, 1.0)), y(max(mean - verdict.spread, 0.0))
            parts.append(el("rect", x=x.start, width=x.end - x.start, y=top, height=low - top, cls="fill band"))
        parts.append(el("line", x1=x.start, x2=x.end, y1=y(mean), y2=y(mean), cls="line mean"))
        beside = y(mean) + 4
        if abs(y(mean) - y(0.5)) < 15:
            beside = y(0.5) + 4 + (16 if mean < 0.5 else -16)
        parts.append(el("text", f"video {score(mean)}", x=x.end + 8, y=beside, cls="key"))
    parts.append(el("line", x1=x.start, x2=x.end, y1=y(0.5), y2=y(0.5), cls="mark strong"))
    parts.append(el("text", "decision 0.5", x=x.end + 8, y=y(0.5) + 4, cls="note"))
    parts.append(_marks(faces, [x(t) for t in at], y))
    parts.append(_dots(verdict, [x(t) for t in at], y))
    if demo:
        parts.append(el("text", "DEMO: untrained networks, meaningless", x=0, y=18, cls="key copper"))
    scores = [f.score for f in faces]
    label = (
        f"Timeline: {len(faces)} faces, scores from {score(min(scores))} to {score(max(scores))}, "
        f"score of the video {score(mean)}"
    )
    return svg(744, 274, label, *parts, cls="time")


def _marks(faces: Sequence[FaceScore], at: list[float], y: Axis) -> Markup:
    """Where both networks ran: a triangle for A alone, a square for B alone and the line between them, a path each."""
    paths: dict[str, list[str]] = {"join": [], "a": [], "b": []}
    aside = min(11.0, 180.0 / len(set(at)))  # A stands left of its dot and B right, so that neither hides the other
    for left, face in zip(at, faces, strict=True):
        if not {"a", "b"} <= face.logits.keys():
            continue
        one, other = left - aside, left + aside
        a, b = y(alone(face, "a")), y(alone(face, "b"))
        paths["join"].append(f"M{one:.1f} {a:.1f}L{left:.1f} {y(face.score):.1f} {other:.1f} {b:.1f}")
        paths["a"].append(f"M{one:.1f} {a - 4:.1f}l4 7h-8z")
        paths["b"].append(f"M{other - 3:.1f} {b - 3:.1f}h6v6h-6z")
    return Markup("").join(el("path", d="".join(d), cls=f"net {name}") for name, d in paths.items() if d)


def _dots(verdict: Verdict, at: list[float], y: Axis) -> Markup:
    """A circle a face with its numbers as tip; beyond `DOTS` faces one path a colour, without tips."""
    several, faces, parts = len(verdict.people) > 1, verdict.faces, []
    colours = [f"p{f.person % HUES}" if several else "copper" if f.score > 0.5 else "teal" for f in faces]
    if len(faces) > DOTS:
        for colour in sorted(set(colours)):
            spots = {f"M{t:.0f} {y(f.score):.0f}h0" for t, f, c in zip(at, faces, colours, strict=True) if c == colour}
            parts.append(el("path", d="".join(sorted(spots)), cls=f"spots {colour}"))
        return Markup("").join(parts)
    numbered = several and len(faces) <= NUMBERED
    for left, face, colour in zip(at, faces, colours, strict=True):
        when = f"frame {face.frame}" + (f", {clock(face.time)}" if face.time is not None else "")
        nets = "".join(f", {net.upper()} {score(alone(face, net))}" for net in sorted(face.logits) if face.logits[net])
        tip = (f"person {face.person + 1}, " if several else "") + f"{when}: score {score(face.score)}{nets}"
        up = y(face.score)
        parts.append(el("circle", cx=left, cy=up, r=8 if numbered else 5, cls=f"dot face {colour}", tip=tip))
        if numbered:
            parts.append(el("text", str(face.person + 1), x=left, y=up + 3.5, cls="who", text_anchor="middle"))
    return Markup("").join(parts)


def roc(rows: list[dict]) -> Markup | None:
    """The ROC curve of videos with `fake` (the truth) and `score`; None without both classes."""
    rows = [r for r in rows if words.number(r.get("score")) is not None and r.get("label") in ("fake", "real")]
    fakes = sum(bool(r["fake"]) for r in rows)
    if not 0 < fakes < len(rows):
        return None
    x, y = Axis(0.0, 1.0, 52.0, 340.0), Axis(0.0, 1.0, 300.0, 34.0)
    spots = [(0.0, 0.0)]
    for threshold in sorted({r["score"] for r in rows}, reverse=True):
        over = [bool(r["fake"]) for r in rows if r["score"] >= threshold]
        spots.append(((len(over) - sum(over)) / (len(rows) - fakes), sum(over) / fakes))
    path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in spots)
    parts = [
        frame(x, y, "real ones called fake", "fakes found", whole_percent, whole_percent),
        el("line", x1=x(0), y1=y(0), x2=x(1), y2=y(1), cls="mark"),
        el("polyline", points=path, cls="line teal"),
    ]
    return svg(352, 340, f"ROC curve of {len(rows)} videos", *parts)

"""What `vitalloy deepfake` says on the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from vitalloy.cli.console import percent

if TYPE_CHECKING:
    from vitalloy.applications.deepfake.export import Exported
    from vitalloy.applications.deepfake.pipeline import FaceScore, Verdict

COLORS = {"fake": "bold red", "real": "bold green", "no face": "bold yellow", "unreadable": "bold magenta"}
METRICS = {"accuracy": "accuracy", "auc": "AUC", "eer": "equal error rate", "log_loss": "log loss", "f1": "F1"}
FRACTIONS = ("accuracy", "eer")


def warning() -> str:
    return (
        "[bold red]DEMO: a network here is untrained. Every verdict, score and picture below is meaningless.[/]\n"
        "Give --weights, or --download for the authors' (CC-BY-NC-4.0)."
    )


def lines(verdict: Verdict, demo: bool) -> Iterator[str]:
    """A verdict, then its scores frame by frame, and person by person where there are several."""
    mark = " [bold red](demo: meaningless)[/]" if demo else ""
    label = f"[{COLORS[verdict.label]}]{verdict.label.upper()}[/]{mark}"
    if verdict.score is None:
        yield f"{escape(verdict.file)}  {label}  {escape(verdict.problem or f'in {verdict.frames} frames')}"
        return
    score = f"{verdict.score:.3f}" + ("" if verdict.spread is None else f" ± {verdict.spread:.3f}")
    alone = ", ".join(f"{net.upper()} {value:.3f}" for net, value in verdict.networks.items())
    yield (
        f"{escape(verdict.file)}  {label}  {score}  ({len(verdict.faces)} faces in {verdict.frames} frames"
        + (f"; {alone}" if len(verdict.networks) > 1 else "")
        + ")"
    )
    if verdict.problem:
        yield f"  [yellow]{escape(verdict.problem)}[/]"
    if verdict.faces:
        frames = groupby(verdict.faces, key=lambda face: (face.frame, face.time))
        yield "  [dim]" + "  ".join(_frame(*key, list(faces)) for key, faces in frames) + "[/]"
    if len(verdict.people) > 1:
        people = (f"{p.number + 1}: {p.label} {p.score:.3f} ({p.faces} faces)" for p in verdict.people)
        yield f"  people  {'  '.join(people)}"


def _frame(index: int, time: float | None, faces: list[FaceScore]) -> str:
    where = f"#{index}" if time is None else f"{time:.1f}s"
    return f"{where} {'/'.join(f'{face.score:.2f}' for face in faces)}"


def measured(found: dict[str, Any]) -> str:
    """Accuracy and AUC with their intervals in a sentence."""
    parts = [f"{METRICS[key]} {_value(found, key)}" for key in ("accuracy", "auc") if found.get(key) is not None]
    return f"{', '.join(parts)} on {found['n_fake']} fake and {found['n_real']} real"


def scores(found: dict[str, Any]) -> Iterator[Any]:
    """Tables of an evaluation."""
    videos, faces = found["videos"], found["faces"]
    table = Table("", "videos", "faces", box=None, pad_edge=False)
    table.add_row("fake / real", *(f"{m['n_fake']} / {m['n_real']}" for m in (videos, faces)))
    for key, name in METRICS.items():
        table.add_row(name, _value(videos, key), _value(faces, key))
    yield table
    yield f"not judged: {videos['no_face']} without a face, {videos['unreadable']} unreadable"
    if (median := found["time"]["median"]) is not None:
        yield f"{median:.2f} s a video (median)"
    if found["degradations"]:
        table = Table("degraded", "accuracy", "AUC", "no face", "change of score", box=None, pad_edge=False)
        for row in found["degradations"]:
            change = "–" if row["score_change"] is None else f"{row['score_change']:+.3f}"
            table.add_row(row["name"], _value(row, "accuracy"), _value(row, "auc"), str(row["no_face"]), change)
        yield table


def summary(found: dict[str, Any]) -> Table:
    """A result file of the authors, recomputed."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for key, value in found.items():
        table.add_row(key, f"{value:.4f}" if isinstance(value, float) else str(value))
    return table


def _value(found: dict[str, Any], key: str) -> str:
    value, interval = found.get(key), found.get(f"{key}_interval")
    if value is None:
        return "–"
    text = percent if key in FRACTIONS else lambda v: f"{v:.3f}"
    return text(value) + (f" ({text(interval[0])} to {text(interval[1])})" if interval else "")


def exported(made: Exported) -> str:
    auc = "" if made.auc is None else f", AUC against its answers {made.auc:.4f}"
    return (
        f"{made.path}  {made.bytes / 1e6:.0f} MB, {made.method}: on {made.faces} faces the score changes by "
        f"{made.max_change:.1e} at most, {percent(made.agreement)} of the answers agree{auc}"
    )

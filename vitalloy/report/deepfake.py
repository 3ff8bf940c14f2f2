"""`write_deepfake_report`: the verdicts on videos as one HTML page that a person can check.

For whoever has to answer for a verdict: every score with its spread, the faces that it came from, how each network
redrew them and where it looked, and in plain words what the numbers mean and do not mean. Like the report of a run,
the page needs no network, no script and nothing beside it, and escapes every name. Its size is bounded: when the
pictures of all videos would be too many, the videos with the highest scores keep theirs and the table still has all.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Template
from PIL import Image

from vitalloy.errors import RunError
from vitalloy.report import words
from vitalloy.report.deepfake_plots import HUES, NUMBERED, alone, clock, roc, score, signed, timeline
from vitalloy.report.html import clean, data_uri, environment, jpeg, write_page

if TYPE_CHECKING:
    from vitalloy.applications.deepfake.pipeline import FaceScore, Setup, Verdict

LABELS = ("fake", "real", "no face", "unreadable")
PAGE_BUDGET = 3_000_000  # characters of pictures and plots on the page
SHOWN = (6, 24)  # faces of a video shown as pictures: fewest, where there are many videos, and most
FACES = 150  # shown on the page before a video shows fewer than the most
PEOPLE = 30  # rows of the table of people
CROP, MAP = 144, 96  # sides of the pictures in pixels
METRICS = {
    "accuracy": ("Accuracy", "share of right verdicts", words.pct),
    "auc": ("AUC", "chance that a fake scores above a real one; 0.5 is guessing", score),
    "eer": ("Equal error rate", "both kinds of error, at the threshold where they are alike", words.pct),
    "f1": ("F1", "of the verdict fake", score),
    "log_loss": ("Log loss", "lower is better; 0.693 is a coin", words.sig),
}


def write_deepfake_report(
    verdicts: Sequence[Verdict], setup: Setup, path: Path, evaluation: dict | None = None
) -> Path:
    """Write the verdicts as one HTML file and return its path; an existing file is replaced as a whole.

    Args:
        verdicts: in the order of the page's table.
        setup: which networks, weights, detector and behaviour gave them.
        path: the file to write.
        evaluation: what the networks scored on labelled videos (`evaluation.evaluate`), if that was measured.

    Raises:
        RunError: the file cannot be written.
    """
    path = Path(path)
    page = render(verdicts, setup, evaluation)
    try:
        write_page(path, page)
    except OSError as error:
        raise RunError(f"cannot write {str(path)!r}: {error.strerror}. Check the folder, disk and rights.") from error
    return path


def render(verdicts: Sequence[Verdict], setup: Setup, evaluation: dict | None = None) -> str:
    """The page as text."""
    folder, names = _names([str(v.file) for v in verdicts])
    rows = [_row(i, v, name) for i, (v, name) in enumerate(zip(verdicts, names, strict=True), 1)]
    room, most = PAGE_BUDGET, max(SHOWN[0], min(SHOWN[1], FACES // max(1, sum(v.score is not None for v in verdicts))))
    for i in sorted(range(len(rows)), key=lambda i: 1.0 if verdicts[i].score is None else -verdicts[i].score):
        details = _details(verdicts[i], setup, most)
        room -= sum(len(uri) for card in details["cards"] for uri in card["uris"]) + len(details["plot"] or "")
        if room < 0:
            break
        rows[i] |= details
    counts = {label: sum(v.label == label for v in verdicts) for label in LABELS}
    kinds = {v.info.kind for v in verdicts if v.info}
    page = {
        "rows": rows,
        "headline": _headline(verdicts, names, counts, "video" if kinds <= {"video"} else "file"),
        "command": _command(setup),
        "noun": "video" if kinds <= {"video"} else "file",
        "folder": clean(folder),
        "setup": clean(dataclasses.asdict(setup)),
        "used": [source.net for source in setup.networks],
        "faceless": sum(v.label == "fake" and not v.faces for v in verdicts),
        "evaluation": _evaluation(evaluation or {}),
        "now": datetime.now().isoformat(),
        "ramp": _ramp(),
        "numbered": NUMBERED,
        "hues": HUES,
    }
    return _template().render(**page)


@functools.cache
def _template() -> Template:
    env = environment().overlay()
    env.filters = env.filters | {"score": score, "clock": clock, "signed": signed}
    return env.get_template("deepfake.html.j2")


def _names(files: list[str]) -> tuple[str, list[str]]:
    """The folder that all files lie in ("" if none) and the rest of each name."""
    try:
        folder = os.path.commonpath([os.path.dirname(file) for file in files])
    except ValueError:  # no files, other drives, or absolute and relative names together
        folder = ""
    return folder, [file[len(folder) :].lstrip("/\\") or file for file in files]


def _headline(verdicts: Sequence[Verdict], names: list[str], counts: dict[str, int], noun: str) -> tuple[str, str]:
    """The answer in one sentence, as (the words to stress, the rest)."""
    if not verdicts:
        return "No new verdict:", "nothing was scanned for this page"
    if len(verdicts) == 1:
        name, label = clean(names[0]), verdicts[0].label
        return {
            "no face": ("No face", f"was found in {name}, so nothing was judged"),
            "unreadable": ("Unreadable:", f"{name} could not be judged"),
        }.get(label, (f"Called {label}:", f"{name}, score {score(verdicts[0].score)}"))
    parts = [f"{counts['real']} real"]
    if counts["no face"]:
        parts.append(f"{counts['no face']} without a face")
    if counts["unreadable"]:
        parts.append(f"{counts['unreadable']} unreadable")
    rest = f"{noun}s called fake, " + (", ".join(parts[:-1]) + " and " if parts[1:] else "") + parts[-1]
    return f"{counts['fake']} of {len(verdicts)}", rest


def _command(setup: Setup) -> str:
    """The command line that scans again in the same way, as far as the setup tells; the detector stands beside it."""
    line = ["vitalloy", "deepfake", "VIDEOS", "--net", "".join(source.net for source in setup.networks)]
    files = [source.file for source in setup.networks if source.file]
    line += ["--weights", *files] if files else []
    line += ["--frames", str(setup.frames), "--seed", str(setup.seed)]
    line += ["--as-published"] * setup.as_published + ["--demo"] * setup.demo
    return clean(shlex.join(line))


def _row(number: int, verdict: Verdict, name: str) -> dict[str, Any]:
    """What the table says of a video."""
    info = verdict.info
    row = {
        "id": f"v{number}",
        "name": name,
        "label": verdict.label,
        "score": verdict.score,
        "spread": verdict.spread if len(verdict.faces) > 1 else None,
        "faces": len(verdict.faces),
        "frames": verdict.frames,
        "duration": info.duration if info else None,
        "networks": {net.upper(): value for net, value in sorted(verdict.networks.items())},
        "problem": verdict.problem,
        "info": _info(info) if info else "",
        "seconds": verdict.seconds,
    }
    return clean(row) | {"details": False}


def _info(info: Any) -> str:
    """What kind of file it is, in one line."""
    if info.kind != "video":
        what = "one image" if info.kind == "image" else f"a folder of {words.count(info.frames)} images"
        return f"{what}, {info.width} × {info.height} pixels"
    parts = [str(info.codec or "unknown codec"), f"{info.width} × {info.height} pixels"]
    if info.rate:
        parts.append(f"{info.rate:.4g} frames a second")
    parts.append(("" if info.counted else "about ") + f"{words.count(info.frames)} frames")
    if info.rotation:
        parts.append(f"turned by {info.rotation}° as its flag says")
    return ", ".join(parts)


def _details(verdict: Verdict, setup: Setup, most: int) -> dict[str, Any]:
    """What the section of a video shows: plot, faces, people, and what a reader must not overlook."""
    faces, value = verdict.faces, words.number(verdict.score)
    shown = choose_faces(faces, most)
    alone = {net: x for net, x in verdict.networks.items() if words.number(x) is not None}
    people = sorted(verdict.people, key=lambda p: -p.score)[:PEOPLE] if len(verdict.people) > 1 else []
    return {
        "details": True,
        "plot": timeline(verdict, setup.demo),
        "cards": _cards(verdict, shown),
        "hidden": len(faces) - len(shown),
        "people": sorted((dataclasses.asdict(p) for p in people), key=lambda p: p["number"]),
        "people_hidden": len(verdict.people) - len(people) if people else 0,
        "above": sum(f.score > 0.5 for f in faces),
        "disagree": len({x > 0.5 for x in alone.values()}) > 1,
        # the vote compares two means that need not add up to one, so that label and score can part
        "crossed": bool(faces) and value is not None and (verdict.label == "fake") != (value > 0.5),
    }


def choose_faces(faces: Sequence[FaceScore], most: int) -> list[FaceScore]:
    """The faces to show, by time: all, or `most` of them, a third for their score and the others evenly chosen."""
    ordered = sorted((f for f in faces if f.crop is not None), key=lambda f: (f.frame, f.person, f.face.left))
    if len(ordered) <= most:
        return ordered
    by_score = sorted(range(len(ordered)), key=lambda i: -ordered[i].score)
    chosen = set(by_score[: most // 3])
    rest = [i for i in range(len(ordered)) if i not in chosen]
    chosen.update(rest[int(k)] for k in np.linspace(0, len(rest) - 1, most - len(chosen)))
    return [ordered[i] for i in sorted(chosen)]


def _cards(verdict: Verdict, shown: list[FaceScore]) -> list[dict[str, Any]]:
    """The pictures of each face: crop and, for each network, error map and saliency, with what to say of them."""
    nets = sorted({net for f in shown for net in (*f.logits, *f.errors, *f.saliency)})
    errors = [{net: _shrink(values) for net, values in f.errors.items()} for f in shown]
    peaks = {  # one scale a network, so that the faces of a video can be compared
        net: max((float(np.percentile(maps[net], 99.5)) for maps in errors if net in maps), default=0.0) for net in nets
    }
    several, cards = len(verdict.people) > 1, []
    single = verdict.info is not None and verdict.info.kind == "image"
    for f, redrawn in zip(shown, errors, strict=True):
        crop = Image.fromarray(np.ascontiguousarray(f.crop)).convert("RGB").resize((CROP, CROP), Image.Resampling.BOX)
        when = f"at {clock(f.time)}" if f.time is not None else "in the image" if single else f"in frame {f.frame}"
        who = f" of person {f.person + 1}" if several else ""
        card = {"when": when, "score": f.score, "person": f.person if several else None}
        card |= {"crop": data_uri(jpeg(crop, 80)), "maps": [], "alt": f"Face{who} {when}, score {score(f.score)}"}
        card["alone"] = {net.upper(): alone(f, net) for net in nets if net in f.logits}
        for kind, maps in (("error", redrawn), ("saliency", f.saliency)):
            for net in nets:
                if net in maps:
                    small = _error(maps[net], peaks[net]) if kind == "error" else _saliency(crop, maps[net])
                    said = "Reconstruction error" if kind == "error" else "Saliency"
                    picture = {"net": net.upper(), "kind": kind, "uri": data_uri(jpeg(small, 80))}
                    card["maps"].append(picture | {"alt": f"{said} of network {net.upper()} for the face{who} {when}"})
        card["uris"] = [card["crop"], *(m["uri"] for m in card["maps"])]
        cards.append(card)
    return cards


def _shrink(values: np.ndarray) -> np.ndarray:
    """A map (h, w) at the size of a picture, without what is no number."""
    finite = np.nan_to_num(np.asarray(values, np.float32), posinf=0.0, neginf=0.0)
    return np.asarray(Image.fromarray(finite).resize((MAP, MAP), Image.Resampling.BOX))


def _error(values: np.ndarray, peak: float) -> Image.Image:
    """A map of errors in colours, from 0 to `peak`."""
    import matplotlib

    colours = matplotlib.colormaps["viridis"](np.clip(values / (peak or 1.0), 0, 1))
    return Image.fromarray(np.uint8(colours[..., :3] * 255))


def _saliency(crop: Image.Image, values: np.ndarray) -> Image.Image:
    """A map (h, w) of 0..1 laid over the face."""
    import torch

    from vitalloy.explanation import overlay

    return overlay(crop.resize((MAP, MAP)), torch.from_numpy(np.clip(_shrink(values), 0, 1)))


def _ramp() -> list[str]:
    """Colours of the error maps from low to high, for the legend."""
    import matplotlib

    return [matplotlib.colors.to_hex(matplotlib.colormaps["viridis"](k / 4)) for k in range(5)]


def _evaluation(found: dict) -> dict[str, Any]:
    """Metrics with intervals, kinds, robustness and ROC curve of labelled videos, as far as they were measured."""
    videos, faces = clean(found.get("videos") or {}), clean(found.get("faces") or {})
    columns = {"Videos": videos, "Videos, as the authors count": videos.get("as_published") or {}, "Faces": faces}
    columns = {title: c for title, c in columns.items() if any(words.number(c.get(m)) is not None for m in METRICS)}
    degraded = [d for d in clean(found.get("degradations") or []) if d.get("name")]
    if not columns and not degraded:
        return {}
    table = [
        {"title": title, "about": about, "cells": [_cell(c, key, text) for c in columns.values()]}
        for key, (title, about, text) in METRICS.items()
    ]
    return {
        "videos": videos,
        "columns": list(columns),
        "table": table,
        "kinds": videos.get("by_kind") or [],
        "degraded": [
            {"metrics": {key: _cell(d, key, METRICS[key][2]) for key in ("accuracy", "auc")}, **d} for d in degraded
        ],
        "roc": roc(found.get("rows") or []),
        "time": found.get("time") or {},
    }


def _cell(measured: dict, key: str, text: Any) -> tuple[str, str]:
    """A metric and its interval as text."""
    low, high = measured.get(f"{key}_interval") or (None, None)
    return text(measured.get(key)), "" if words.number(low) is None else f"{text(low)} to {text(high)}"

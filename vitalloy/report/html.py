"""`write_report`: the metrics of a run as one HTML file that needs nothing beside it.

Plots are inline SVG, pictures are data URIs, and the page asks the network for nothing (a content policy in its head
forbids it). Class names and file names are the user's and are escaped wherever they appear.
"""

from __future__ import annotations

import base64
import functools
import io
import logging
import os
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import ChainableUndefined, Environment, FileSystemLoader
from PIL import Image

from vitalloy.errors import RunError
from vitalloy.report import plots, words

log = logging.getLogger("vitalloy")

IMAGE_BUDGET = 900_000  # characters of data URIs on the page
IMAGE_LIMIT = 60_000  # bytes; a larger picture is made smaller first
MANY_CLASSES = 30  # above it: the weakest classes only, and a matrix without labels
WORST_SHOWN = 15
_ODD = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")  # not for HTML


def write_report(metrics: dict, folder: Path, *, images: Path | None = None) -> Path:
    """Write `report.html` into a run folder and return its path.

    Args:
        metrics: the content of `metrics.json`. A part that is missing or null is left out of the page.
        folder: the run folder.
        images: the folder that the explanation's picture names are relative to (default: `folder`). Pictures that
            are missing, damaged or outside this folder are left out with a note.

    Raises:
        RunError: the folder is missing or cannot be written.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RunError(f"cannot write a report into {str(folder)!r}: no such folder. Give a run folder.")
    page = render(metrics, folder, Path(images) if images else folder)
    target = folder / "report.html"
    try:
        write_page(target, page)
    except OSError as error:
        raise RunError(f"cannot write {str(target)!r}: {error.strerror}. Check the disk and rights.") from error
    return target


def render(metrics: dict, folder: Path, images: Path) -> str:
    """The page as text."""
    metrics = clean(metrics)
    test = metrics.get("test") or {}
    page = {
        "headline": words.headline(metrics),
        "place": shlex.quote(clean(f"runs/{folder.name}" if folder.parent.name == "runs" else folder.name)),
        "plots": _plots(metrics),
        "errors": _errors(test, (metrics.get("data") or {}).get("classes") or []),
        "baseline": _baseline(test),
        "trials": _trials(metrics),
        "omitted": [_omitted(part, images) for part in metrics.get("compression") or [] if part.get("steps")],
        "pictures": _pictures((metrics.get("explanation") or {}).get("images") or [], images),
        "words": words,
    }
    sections = ("run", "data", "model", "history", "best", "test", "onnx", "int8", "runtimes", "corruptions")
    known = {key: metrics.get(key) or {} for key in (*sections, "explanation", "budget", "compression")}
    return environment().get_template("report.html.j2").render(**known, **page)


@functools.cache
def environment() -> Environment:
    """The templates of this folder, with the formats of `words` as filters."""
    env = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=ChainableUndefined,  # half-filled metrics give "–", not an error
        lstrip_blocks=True,
    )
    for name in ("amount", "count", "duration", "megabytes", "moment", "ms", "pct", "points", "pretty", "sig", "size"):
        env.filters[name] = getattr(words, name)
    return env


def _plots(metrics: dict) -> dict:
    test = metrics.get("test") or {}
    history, best = metrics.get("history") or [], (metrics.get("best") or {}).get("epoch")
    found = {
        "curves": plots.curves(history, best),
        "corruptions": plots.corruptions(metrics.get("corruptions") or [], test.get("top1")),
        "frontier": plots.frontier(metrics.get("runtimes") or []),
        "compression": plots.frontier([r for r in _trials(metrics) if r.get("execution") != "simulation"]),
    }
    for key in ("reliability", "reliability_calibrated"):
        found[key] = plots.reliability(test.get(key) or [], key.endswith("calibrated"))
    return found


def _trials(metrics: dict) -> list[dict]:
    """Every way to run the model that `compress` measured; the float ones from its first run alone."""
    rows: list[dict] = []
    for part in metrics.get("compression") or []:
        for row in part.get("tried") or []:
            if row.get("method") not in ("float", "onnx") or row["name"] not in [r["name"] for r in rows]:
                rows.append({**row, "chosen": row["name"] == part.get("chosen")})
    return rows


def _omitted(part: dict, images: Path) -> dict:
    """What the methods of one `compress` that leave work out left out: plots, and pictures by method."""
    settings = {step["method"]: step.get("settings") or {} for step in part["steps"]}
    curve = part.get("exits") or {}
    shown = _pictures(part.get("pictures") or [], images)["shown"]
    return {
        **part,
        "reverse": (settings.get("sit") or {}).get("reverse_parameters"),
        "kept": plots.kept((settings.get("lpvit") or {}).get("layers") or []),
        "curve": plots.exits(curve.get("rows") or [], curve["chosen"]) if curve else None,
        "shown": {method: [row for row in shown if row["method"] == method] for method in settings},
    }


def _errors(test: dict, names: list[str]) -> dict:
    """The confusion matrix, its most frequent mistakes in words and the table of classes, weakest first."""
    found: dict[str, Any] = {}
    confusion, per_class = test.get("confusion") or [], test.get("per_class") or []
    many = max(len(confusion), len(per_class)) > MANY_CLASSES
    if confusion:
        names = [str(n) for n in names] + [str(i) for i in range(len(names), len(confusion))]
        found["pairs"] = words.confused_pairs(confusion, names)
        found["wrong"] = int(np.sum(confusion) - np.trace(confusion))
        found["matrix"] = plots.compact(confusion) if many else plots.confusion(confusion, names)
        found["large"] = not many and len(confusion) > plots.SMALL
        found["block"] = plots.block(len(confusion))
    weakest = sorted(per_class, key=lambda c: words.number(c.get("f1")) or 0.0)
    found["rows"] = weakest[:WORST_SHOWN] if many else weakest
    found["hidden"] = len(weakest) - len(found["rows"])
    found["many"] = many
    return found


def _baseline(test: dict) -> float | None:
    """The accuracy of always naming the commonest class of the test set."""
    support = [c.get("support") or 0 for c in test.get("per_class") or []]
    return max(support) / sum(support) if sum(support) else None


def _pictures(rows: list[dict], base: Path) -> dict:
    """The explanation's pictures as data URIs, and how many had to stay out and why."""
    shown, missing, spare, room = [], [], 0, IMAGE_BUDGET
    for row in rows:
        path = _inside(base, str(row.get("file") or ""))
        try:
            uri, width = _picture(path) if path else ("", 0)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            log.warning("report: picture %s left out: %s", path, error)
            uri = ""
        if not uri:
            missing.append(row.get("file"))
        elif len(uri) > room:
            spare += 1
        else:
            room -= len(uri)
            shown.append({**row, "uri": uri, "small": width < 100})
    return {"shown": sorted(shown, key=lambda r: bool(r.get("correct"))), "missing": missing, "spare": spare}


def _inside(base: Path, name: str) -> Path | None:
    """The file `name` below `base`; None when it is missing or leads out of the folder."""
    path = (base / name).resolve()
    return path if path.is_file() and path.is_relative_to(base.resolve()) else None


def _picture(path: Path) -> tuple[str, int]:
    """A picture as (data URI, width in pixels); large ones are scaled down to 384 pixels and stored as JPEG."""
    raw = path.read_bytes()
    with Image.open(io.BytesIO(raw)) as image:
        kind, width = image.format, image.width
        image.load()
        if len(raw) > IMAGE_LIMIT or kind not in ("PNG", "JPEG", "WEBP", "GIF"):
            image = image.convert("RGB")
            image.thumbnail((384, 384))
            raw, kind, width = jpeg(image), "JPEG", image.width
    return data_uri(raw, kind), width


def jpeg(image: Image.Image, quality: int = 85) -> bytes:
    """A picture as the bytes of a JPEG file."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def data_uri(raw: bytes, kind: str = "JPEG") -> str:
    """The bytes of a picture file as the source of an `img`."""
    return f"data:image/{kind.lower()};base64,{base64.b64encode(raw).decode()}"


def clean(value: Any) -> Any:
    """`value` with the characters that HTML cannot hold replaced in every string."""
    if isinstance(value, str):
        return _ODD.sub("\N{REPLACEMENT CHARACTER}", value)
    if hasattr(value, "tolist"):  # NumPy and torch values that have not been through JSON yet
        return value.tolist()
    if isinstance(value, dict):
        return {key: clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(item) if isinstance(item, (str, dict, list, tuple)) else item for item in value]
    return value


def write_page(target: Path, text: str) -> None:
    """Write beside the target and move it there, so that a reader never meets half a page."""
    beside = target.with_name(f".report-{os.getpid()}.html")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)

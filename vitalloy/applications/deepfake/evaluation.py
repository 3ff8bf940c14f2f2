"""How well a deepfake detector does on labelled videos: scores with intervals, robustness, time.

For everyone who must know how far a verdict can be trusted. The scores and their intervals stand in `metrics`.

Departures from the GenConViT authors' evaluation, each because theirs would mislead: a video without a face is counted
apart and not as FAKE 0.5 (`as_published` in `video_metrics` gives their numbers), labels are compared with labels, and
no threshold is fitted to the test set.

The degradations are those that forensic work meets most: recompression as JPEG or H.264 (one intra picture: what a
codec does to a single frame, without motion), shrinking and enlarging, and blur. They act on whole frames, before the
faces are looked for.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitalloy.applications.deepfake.data import Labelled
from vitalloy.applications.deepfake.metrics import frame_metrics, video_metrics
from vitalloy.errors import DataError, VitalloyError, suggest

_log = logging.getLogger("vitalloy")

_KEPT = ("label", "score", "face_scores", "seconds", "problem")  # of a verdict, for measuring

Degradation = Callable[[np.ndarray], np.ndarray]


def result_rows(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The `rows` of `evaluate` as `data.write_results` takes them, a missing face as FAKE 0.5, as the authors write it.

    As with the authors, videos that could not be read are left out.
    """
    return [
        {
            "name": Path(row["path"]).name,
            "pred": 0.5 if row["label"] == "no face" else row["score"],
            "klass": row["kind"],
            "pred_label": "real" if row["label"] == "real" else "fake",
            "correct_label": "fake" if row["fake"] else "real",
            "compression": row["compression"],
        }
        for row in rows
        if row["label"] != "unreadable"
    ]


def evaluate(
    labelled: Sequence[Labelled],
    scan: Callable[..., Any],
    *,
    setup: Any = None,
    degradations: Sequence[str] = (),
    results: str | os.PathLike[str] | None = None,
    advance: Callable[[int, int], None] | None = None,
    repeats: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Scan labelled videos, as they are and degraded, and measure the verdicts.

    Args:
        labelled: what to scan; see `data.read_layout`.
        scan: `scan(path, perturb=None)` -> `pipeline.Verdict`; `perturb` is a function from frame to frame.
        setup: what made the verdicts (networks, hashes of the weights, ...), a dataclass or JSON-able; without it
            `scan.setup`, if there is one.
        degradations: keys of `DEGRADATIONS`; each costs a scan of everything.
        results: a file of JSON lines that gets the setup and then every verdict as it comes. What it already holds
            is not scanned again, so a run that was killed goes on where it was.
        advance: called after each video with (done, all).
        repeats, seed: of the bootstrap.

    Returns `setup`; `videos` (see `video_metrics`); `faces` (see `frame_metrics`, grouped by video); `time` in seconds
    a video (median, 90th percentile); `degradations`, a row each: the scores at video level, and the mean change of
    the score against the clean video over all, fake and real ones; `rows`, one a clean video.

    Raises:
        DataError: nothing to scan, an unknown degradation, or `results` is of another setup or not such a file.
        VitalloyError: of `scan`, unless it is a DataError: a video that cannot be read is a row, never the end.
    """
    if not labelled:
        raise DataError("There is nothing to evaluate: the list of labelled videos is empty.")
    for name in degradations:
        if name not in DEGRADATIONS:
            known = ", ".join(DEGRADATIONS)
            raise DataError(f"There is no degradation {name!r}.{suggest(name, DEGRADATIONS)} Choose among {known}.")
    setup = _plain(getattr(scan, "setup", None) if setup is None else setup)
    done, todo = _open_results(results, setup), [(item, name) for name in (None, *degradations) for item in labelled]
    for count, (item, name) in enumerate(todo, start=1):
        key = (os.path.abspath(item.path), name)
        if key not in done:
            done[key], verdict = _scan(scan, item, name)
            if verdict is not None and results is not None:
                line = {"path": key[0], "degradation": name, **done[key], "verdict": verdict.as_dict()}
                with open(results, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
        if advance is not None:
            advance(count, len(todo))
    tables = {name: [_row(item, done[os.path.abspath(item.path), name]) for item in labelled] for _, name in todo}
    return _summary(setup, tables, degradations, repeats, seed)


def _scan(scan: Callable[..., Any], item: Labelled, name: str | None) -> tuple[dict[str, Any], Any]:
    """What is measured of a verdict, and the verdict; None after an accident, so that a later run tries again."""
    try:
        verdict = scan(item.path) if name is None else scan(item.path, perturb=DEGRADATIONS[name])
    except Exception as error:  # whatever a damaged video does, the others are still to be scanned
        if isinstance(error, VitalloyError) and not isinstance(error, DataError):
            raise  # the networks are at fault, not this video
        reason = " ".join(str(error).split()) or type(error).__name__
        _log.warning("%s: could not be scanned (%s)", item.path, reason)
        _log.debug("where it happened", exc_info=True)
        return dict(zip(_KEPT, ("unreadable", None, [], None, reason), strict=True)), None
    score = None if verdict.score is None else float(verdict.score)
    faces = [float(face.score) for face in verdict.faces]
    kept = (verdict.label, score, faces, float(verdict.seconds), verdict.problem)
    return dict(zip(_KEPT, kept, strict=True)), verdict


def _row(item: Labelled, line: Mapping[str, Any]) -> dict[str, Any]:
    return {"path": str(item.path), "fake": item.fake, "kind": item.kind, "compression": item.compression, **line}


def _summary(
    setup: Any, tables: Mapping[str | None, list[dict[str, Any]]], degradations: Sequence[str], repeats: int, seed: int
) -> dict[str, Any]:
    clean = tables[None]
    faces = [(row["fake"], score, i) for i, row in enumerate(clean) for score in row["face_scores"]]
    fake, scores, groups = zip(*faces, strict=True) if faces else ((), (), ())
    seconds = [row["seconds"] for row in clean if row["seconds"] is not None and row["label"] != "unreadable"]
    found = []
    for name in degradations:
        measured = video_metrics(tables[name], repeats, seed)
        both = [
            (row["fake"], row["score"] - before["score"])
            for row, before in zip(tables[name], clean, strict=True)
            if row["score"] is not None and before["score"] is not None
        ]
        measured["score_change"] = _mean([change for _, change in both])
        measured["score_change_fake"] = _mean([change for truth, change in both if truth])
        measured["score_change_real"] = _mean([change for truth, change in both if not truth])
        found.append({"name": name, **measured})
    return {
        "setup": setup,
        "videos": video_metrics(clean, repeats, seed),
        "faces": frame_metrics(fake, scores, groups, repeats, seed),
        "time": {
            "n": len(seconds),
            "median": float(np.median(seconds)) if seconds else None,
            "p90": float(np.percentile(seconds, 90)) if seconds else None,
        },
        "degradations": found,
        "rows": clean,
    }


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _plain(value: Any) -> Any:
    """As it comes back from JSON, so that it can be compared with what a file holds."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    return json.loads(json.dumps(value, default=str))


def _open_results(path: str | os.PathLike[str] | None, setup: Any) -> dict[tuple[str, str | None], dict[str, Any]]:
    """What an earlier run left in the file, which is begun with the setup if it is new."""
    if path is None:
        return {}
    file = Path(path)
    data = file.read_bytes() if file.is_file() else b""
    whole = data[: data.rfind(b"\n") + 1]  # a run killed while writing leaves half a line
    if not whole:
        if data and not data.startswith(b'{"setup"'):
            raise DataError(f"{file}: this is not a file of results. Give another name.")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"setup": setup}) + "\n", encoding="utf-8")
        return {}
    try:
        first, *lines = (json.loads(line) for line in whole.splitlines())
        before = first["setup"]
        done = {(line["path"], line["degradation"]): {key: line[key] for key in _KEPT} for line in lines}
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{file}: this is not a file of results, or it is damaged. Give another name.") from None
    if before != setup:
        raise DataError(
            f"{file}: its verdicts are from another setup ({_difference(before, setup)}). Give another file, remove "
            "this one, or go back to its setup."
        )
    if len(whole) < len(data):
        with open(file, "r+b") as opened:
            opened.truncate(len(whole))
    return done


def _difference(before: Any, now: Any) -> str:
    if not isinstance(before, dict) or not isinstance(now, dict):
        return f"{before!r} there, {now!r} now"
    key = next(key for key in {**before, **now} if before.get(key) != now.get(key))
    return f"{key}: {before.get(key)!r} there, {now.get(key)!r} now"


# Degradations: (H, W, 3) uint8 RGB -> the same shape


def _jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file).convert("RGB"))


def _h264(image: np.ndarray, crf: int) -> np.ndarray:
    """One intra picture of H.264 with 4:2:0 colour; odd sides are padded with their last row or column."""
    import av

    height, width = image.shape[:2]
    padded = np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    encoder = av.CodecContext.create("libx264", "w")
    encoder.height, encoder.width = padded.shape[:2]
    encoder.pix_fmt, encoder.time_base, encoder.thread_count = "yuv420p", Fraction(1, 25), 1
    encoder.options = {"crf": str(crf), "preset": "medium"}
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(padded), format="rgb24")
    decoder = av.CodecContext.create("h264", "r")
    packets = [*encoder.encode(frame), *encoder.encode(None)]
    decoded = [frame for packet in packets for frame in decoder.decode(packet)] + list(decoder.decode(None))
    return decoded[0].to_ndarray(format="rgb24")[:height, :width]


def _shrink(image: np.ndarray, factor: int) -> np.ndarray:
    height, width = image.shape[:2]
    small = (max(1, round(width / factor)), max(1, round(height / factor)))
    shrunk = Image.fromarray(image).resize(small, Image.Resampling.BICUBIC)
    return np.asarray(shrunk.resize((width, height), Image.Resampling.BICUBIC))


def _blur(image: np.ndarray, sigma: float) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    smooth = gaussian_filter(image, (sigma, sigma, 0), output=np.float32)
    return np.clip(np.rint(smooth), 0, 255).astype(np.uint8)


DEGRADATIONS: dict[str, Degradation] = {
    "jpeg 75": partial(_jpeg, quality=75),
    "jpeg 50": partial(_jpeg, quality=50),
    "jpeg 30": partial(_jpeg, quality=30),
    "h264 crf 23": partial(_h264, crf=23),
    "h264 crf 32": partial(_h264, crf=32),
    "h264 crf 40": partial(_h264, crf=40),
    "half size": partial(_shrink, factor=2),
    "quarter size": partial(_shrink, factor=4),
    "blur 1 px": partial(_blur, sigma=1.0),
    "blur 2 px": partial(_blur, sigma=2.0),
    "blur 3 px": partial(_blur, sigma=3.0),
}

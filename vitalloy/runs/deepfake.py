"""Deepfake detection as the command calls it: scan, evaluate and export, with progress, files and reports."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vitalloy.applications.deepfake.data import read_layout
from vitalloy.applications.deepfake.evaluation import evaluate as evaluate_videos, result_rows
from vitalloy.applications.deepfake.export import Exported, export_network
from vitalloy.applications.deepfake.model import normalize
from vitalloy.applications.deepfake.pipeline import UNREADABLE, Scanner, Verdict
from vitalloy.applications.deepfake.results import read_results, summarize_results, write_results
from vitalloy.applications.deepfake.weights import open_networks
from vitalloy.data.video import find_videos
from vitalloy.errors import DataError, RunError
from vitalloy.report.deepfake import write_deepfake_report
from vitalloy.runs.folder import Reporter, Silent

REWRITE = 30.0  # seconds between two versions of a report while a scan goes on
PICTURED = 60  # videos of an evaluation that keep the pictures of their faces for the report


def open_scanner(
    weights: Sequence[str | Path] = (), nets: str = "", *, demo: bool = False, download: bool = False, **options: Any
) -> Scanner:
    """A `Scanner` with networks from `open_networks`; `options` are the scanner's."""
    networks = open_networks(weights, nets, demo=demo, download=download, seed=options.get("seed", 0))
    return Scanner(networks, **options)


def scan(
    paths: Iterable[str | Path],
    scanner: Scanner,
    *,
    report: str | Path | None = None,
    reporter: Reporter | None = None,
    tell: Callable[[Verdict], None] = lambda verdict: None,
) -> list[Verdict]:
    """Verdicts on videos, images and folders of them.

    Args:
        scanner: with `inspect=True` for a report with redrawings and saliency.
        report: an HTML page to write; it is renewed while the scan goes on, and holds what was done after a kill.
        tell: called with each verdict as it comes.

    Raises:
        DataError: nothing to scan, or not one video could be read.
    """
    videos, reporter, verdicts = find_videos(paths), reporter or Silent(), []
    _check_place(report)
    written = time.monotonic()
    try:
        for done, path in enumerate(videos, 1):
            verdicts.append(scanner(path))
            tell(verdicts[-1])
            reporter.advance(done, len(videos))
            if report is not None and done < len(videos) and time.monotonic() - written > REWRITE:
                write_deepfake_report(verdicts, scanner.setup, Path(report))
                written = time.monotonic()
    finally:
        if report is not None and verdicts:
            write_deepfake_report(verdicts, scanner.setup, Path(report))
    if all(verdict.label == UNREADABLE for verdict in verdicts):
        raise DataError(verdicts[0].problem if len(verdicts) == 1 else f"none of {len(verdicts)} videos can be read.")
    return verdicts


def evaluate(
    data: str | Path,
    scanner: Scanner | None = None,
    *,
    layout: str = "auto",
    split: str | None = None,
    limit: int | None = None,
    degradations: Sequence[str] = (),
    results: str | Path | None = None,
    published_results: str | Path | None = None,
    report: str | Path | None = None,
    reporter: Reporter | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Accuracy, AUC, equal error rate and log loss on labelled videos, with bootstrap intervals.

    Args:
        data: an unpacked data set (see `read_layout`), or a result file of the authors (.json), which needs no scan.
        limit: take this many videos of each class, evenly spaced.
        degradations: names of `evaluation.DEGRADATIONS`, each a further scan of everything.
        results: JSON lines that keep every verdict as it comes; what is there is not scanned again.
        published_results: write a result file in the authors' format too.
    """
    data, reporter = Path(data), reporter or Silent()
    if data.suffix == ".json" and data.is_file():
        return summarize_results(read_results(data))
    labelled = read_layout(data, layout, split)
    _check_place(report)
    if limit is not None:
        labelled = [item for fake in (True, False) for item in _spaced([x for x in labelled if x.fake == fake], limit)]
    kept: dict[str, Verdict] = {}

    def remembered(path: Path, perturb: Callable[[np.ndarray], np.ndarray] | None = None) -> Verdict:
        verdict = scanner(path, perturb)
        if perturb is None and report is not None:
            kept[str(path)] = verdict if len(kept) < PICTURED else _without_pictures(verdict)
        return verdict

    found = evaluate_videos(
        labelled,
        remembered,
        setup=scanner.setup,
        degradations=degradations,
        results=results,
        advance=reporter.advance,
        seed=seed,
    )
    if published_results is not None:
        write_results(published_results, result_rows(found["rows"]))
    if report is not None:
        verdicts = [kept.get(row["path"]) or _earlier(row) for row in found["rows"]]
        write_deepfake_report(verdicts, scanner.setup, Path(report), found)
    return found


def export(
    scanner: Scanner,
    paths: Iterable[str | Path],
    folder: str | Path,
    *,
    int8: bool = False,
    reporter: Reporter | None = None,
) -> list[Exported]:
    """Write a scanner's networks as ONNX files, and measure on the faces of videos how they agree.

    Raises:
        DataError: no face was found: agreement cannot be measured, nor int8 ranges.
    """
    reporter, videos, crops = reporter or Silent(), find_videos(paths), []
    reporter.stage("finding faces")
    for done, path in enumerate(videos, 1):
        crops += [face.crop for face in scanner(path).faces if face.crop is not None]
        reporter.advance(done, len(videos))
    if not crops:
        raise DataError("no face was found in these videos, and exporting is measured on faces. Give others.")
    faces, made = normalize(np.stack(crops)), []
    for network, source in zip(scanner.networks, scanner.setup.networks, strict=True):
        reporter.stage(f"writing and measuring network {network.net.upper()}")
        path = Path(folder) / f"network_{network.net}{'.int8' if int8 else ''}.onnx"
        made.append(export_network(network, path, faces, int8=int8, source=source))
    return made


def _check_place(report: str | Path | None) -> None:
    """Refuse a report that could not be written before the work for it begins."""
    if report is None:
        return
    folder = Path(report).absolute().parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{report}: no report can be written there ({error.strerror}). Give another place.") from error
    if Path(report).is_dir() or not os.access(folder, os.W_OK):
        raise RunError(f"{report}: no report can be written there. Give the name of a file in a folder of yours.")


def _without_pictures(verdict: Verdict) -> Verdict:
    return replace(verdict, faces=tuple(replace(f, crop=None, errors={}, saliency={}) for f in verdict.faces))


def _earlier(row: dict[str, Any]) -> Verdict:
    """The verdict of a row that an earlier, interrupted evaluation left."""
    return Verdict(row["path"], row["label"], row["score"], problem=row["problem"], seconds=row["seconds"] or 0.0)


def _spaced(items: list[Any], count: int) -> list[Any]:
    if len(items) <= count:
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, count, dtype=int)]

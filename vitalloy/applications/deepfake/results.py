"""The result files of the GenConViT authors' prediction script: written, read, and recomputed into their table.

For everyone who compares verdicts with the published ones. The files were read as they lie in the authors' repository:
in the one for Celeb-DF each class is a list of folders, of which the first is the video's own, and other lists than
`name` and `pred` may be missing.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from vitalloy.errors import DataError


def write_results(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write verdicts as the authors' prediction script does.

    Each row has `name`, `pred` (the score, 1 = fake, None where there is none), `klass`, `pred_label`,
    `correct_label` and, for FaceForensics++, `compression`; see `results_name` for the file's usual name.
    """
    rows = list(rows)
    columns = {key: [row.get(key) for row in rows] for key in ("name", "pred", "klass", "pred_label", "correct_label")}
    columns["klass"] = [None if value is None else str(value).lower() for value in columns["klass"]]
    for key in ("pred_label", "correct_label"):
        columns[key] = [None if value is None else str(value).upper() for value in columns[key]]
    if any(row.get("compression") is not None for row in rows):
        columns["compression"] = [row.get("compression") for row in rows]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps({"video": columns}), encoding="utf-8")


def results_name(dataset: str, net: str, when: datetime | None = None) -> str:
    """The authors' name for a result file: prediction_<dataset>_<net>_<Month_day_Year_H_M_S>.json."""
    return f"prediction_{dataset}_{net}_{(when or datetime.now()).strftime('%B_%d_%Y_%H_%M_%S')}.json"


def read_results(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a result file, as `write_results` takes them; `compression` is None where the file has none.

    A missing `pred_label` is made from the score (0.5 and more is FAKE, as the authors count a missing face), a
    missing `correct_label` from a class that is called real or fake.

    Raises:
        DataError: not such a file, or its lists differ in length.
    """
    try:
        video = json.loads(Path(path).read_text(encoding="utf-8"))["video"]
        columns = {str(key).lower(): list(values) for key, values in video.items() if values}
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file. Check the path.") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f'{path}: this is not a result file. Expected is JSON with lists below "video".') from None
    count = len(columns.get("pred", columns.get("name", [])))
    for key, values in columns.items():
        if len(values) != count:
            raise DataError(f"{path}: {key!r} has {len(values)} entries where {count} are expected. Write it again.")
    if count and "pred" not in columns and "pred_label" not in columns:
        raise DataError(f"{path}: it has neither scores ('pred') nor labels ('pred_label'). Write it again.")
    return [_result_row(path, {key: values[i] for key, values in columns.items()}, i) for i in range(count)]


def summarize_results(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a result file says, as the authors' headline numbers are counted.

    Accuracies (fractions) take the decisions as they are stored; AUC and F1 take the scores, F1 with fake as the
    positive class from 0.5 on. Rows without a true label or a decision are left out. None where there is nothing to
    count.
    """
    from sklearn.metrics import f1_score, roc_auc_score

    known = [row for row in results if row["correct_label"] in ("FAKE", "REAL") and row["pred_label"]]
    fake = [row["correct_label"] == "FAKE" for row in known]
    right = [row["pred_label"] == row["correct_label"] for row in known]
    scored = [(f, row["pred"]) for f, row in zip(fake, known, strict=True) if row["pred"] is not None]
    truth, scores = [f for f, _ in scored], [score for _, score in scored]
    kinds: dict[tuple[str, bool], list[bool]] = {}
    for row, f, r in zip(known, fake, right, strict=True):
        kinds.setdefault((row["klass"] or "", f), []).append(r)
    return {
        "n": len(known),
        "n_fake": sum(fake),
        "n_real": len(known) - sum(fake),
        "accuracy": _share(right),
        "real_accuracy": _share([r for r, f in zip(right, fake, strict=True) if not f]),
        "fake_accuracy": _share([r for r, f in zip(right, fake, strict=True) if f]),
        "auc": float(roc_auc_score(truth, scores)) if 0 < sum(truth) < len(truth) else None,
        "f1": float(f1_score(truth, [score >= 0.5 for score in scores])) if any(truth) else None,
        "by_kind": [
            {"kind": kind, "fake": f, "n": len(marks), "accuracy": _share(marks)} for (kind, f), marks in kinds.items()
        ],
    }


def _result_row(path: Any, row: dict[str, Any], index: int) -> dict[str, Any]:
    try:
        pred = None if row.get("pred") is None else float(row["pred"])
    except (TypeError, ValueError):
        pred = math.nan
    if pred is not None and not math.isfinite(pred):
        raise DataError(f"{path}: the score of entry {index} is {row['pred']!r}, not a number. Write the file again.")
    klass = row.get("klass")
    if isinstance(klass, list):
        klass = klass[0] if klass else None
    klass = None if klass is None else str(klass).lower()
    truth, label = (str(row.get(key) or "").upper() for key in ("correct_label", "pred_label"))
    if truth not in ("FAKE", "REAL") and klass in ("fake", "real"):
        truth = klass.upper()
    if not label and pred is not None:
        label = "FAKE" if pred >= 0.5 else "REAL"
    return {
        "name": str(row.get("name", index)),
        "pred": pred,
        "klass": klass,
        "pred_label": label or None,
        "correct_label": truth or None,
        "compression": row.get("compression"),
    }


def _share(marks: Sequence[bool]) -> float | None:
    return sum(marks) / len(marks) if marks else None

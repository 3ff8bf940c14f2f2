"""Every golden record through the public path: create_model -> load_checkpoint -> forward -> compare."""

from __future__ import annotations

from pathlib import Path

import golden
import pytest
import torch
from cases import CASES

RECORDS = sorted((Path(__file__).parent / "goldens").glob("*/*.json"))
TOLERANCE = {"float64": 1e-6, "float32": 1e-3}


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def test_every_row_has_a_record():
    assert set(CASES) <= {name_of(p) for p in RECORDS}


@pytest.mark.parametrize("path", RECORDS, ids=name_of)
def test_golden(path: Path, record_property):
    record, name = golden.load(path), name_of(path)
    assert name in CASES, f"{name} has no row in tests/parity/cases.py"
    with torch.no_grad():
        outputs = CASES[name](record)
    missing = set(record["outputs"]) - set(outputs)
    assert not missing, f"{name} does not compute {sorted(missing)}"
    differences = {k: golden.difference(outputs[k], want) for k, want in record["outputs"].items()}
    worst = max(differences.values())
    record_property("parity", (record["system"], record["case"], len(differences), worst))
    assert worst < TOLERANCE[record["dtype"]], differences

"""Every golden record through the public path: create_model -> load_checkpoint -> forward -> compare."""

from __future__ import annotations

import os
from pathlib import Path

import golden
import pytest
import torch
from cases import CASES

RECORDS = sorted((Path(__file__).parent / "goldens").glob("*/*.json"))
TOLERANCE = {"float64": 1e-6, "float32": 1e-3}
LARGE = {"genconvit/vae_tiny_full_f32": 20}  # gigabytes that a machine must have, as filling the weights takes 9


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def memory_gigabytes() -> float:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9


def test_every_row_has_a_record():
    assert set(CASES) <= {name_of(p) for p in RECORDS}


@pytest.mark.parametrize("path", RECORDS, ids=name_of)
def test_golden(path: Path, record_property):
    record, name = golden.load(path), name_of(path)
    assert name in CASES, f"{name} has no row in tests/parity/cases"
    if memory_gigabytes() < LARGE.get(name, 0):
        pytest.skip(f"needs a machine with {LARGE[name]} GB of memory")
    with torch.no_grad():
        outputs = CASES[name](record)
    missing = set(record["outputs"]) - set(outputs)
    assert not missing, f"{name} does not compute {sorted(missing)}"
    differences = {k: golden.difference(outputs[k], want) for k, want in record["outputs"].items()}
    worst = max(differences.values())
    record_property("parity", (record["system"], record["case"], len(differences), worst))
    assert worst < TOLERANCE[record["dtype"]], differences

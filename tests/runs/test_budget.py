from __future__ import annotations

import pytest

from vitalloy.errors import RecipeError
from vitalloy.runs.budget import Budget, choose_model
from vitalloy.runs.folder import Silent
from vitalloy.training.recipe import Recipe


def test_parse_takes_the_three_kinds_in_any_order():
    assert Budget.parse("10ms, 5MB, 92%") == Budget("10ms, 5MB, 92%", 10.0, 5.0, 0.92)
    assert Budget.parse("800kb") == Budget("800kb", None, 0.8, None)
    assert Budget.parse("50%,0.5 s").latency_ms == 500


@pytest.mark.parametrize("text", ["", "fast", "10", "5MB, 6MB", "0ms", "120%"])
def test_parse_refuses_what_it_cannot_read(text):
    with pytest.raises(RecipeError):
        Budget.parse(text)


def test_met_needs_one_runtime_that_keeps_every_limit():
    rows = [
        {"latency_ms": 20.0, "size_bytes": 1e6, "top1": 0.95},
        {"latency_ms": 2.0, "size_bytes": 9e6, "top1": 0.95},
        {"latency_ms": 2.0, "size_bytes": 1e6, "top1": 0.80},
    ]
    assert not Budget.parse("10ms, 5MB, 92%").met(rows)
    assert Budget.parse("10ms, 5MB").met(rows) and Budget.parse("10ms, 92%").met(rows)


def test_choice_is_the_most_promising_that_fits():
    chosen = choose_model(Budget.parse("60s, 2.4MB"), Recipe(), 32, 10, Silent())
    best = [row for row in chosen["table"] if row["chosen"]]
    assert len(best) == 1 and best[0]["size_mb"] <= 2.4
    fitting = [row for row in chosen["table"] if row["fits"]]
    assert best[0]["macs"] == max(row["macs"] for row in fitting)
    assert all(row["latency_ms"] is None for row in chosen["table"] if row["size_mb"] > 2.4)


def test_impossible_budget_names_the_nearest():
    with pytest.raises(RecipeError, match=r"the nearest is \w+, 0\.\d+ MB"):
        choose_model(Budget.parse("10kb"), Recipe(), 32, 10, Silent())

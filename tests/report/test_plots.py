"""The plots put their marks where the numbers say."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest
from metrics_samples import sample

from vitalloy.report import plots
from vitalloy.report.svg import Axis, nice


def parse(markup):
    return ET.fromstring(str(markup))


def named(root, cls):
    return [e for e in root.iter() if cls in (e.get("class") or "").split()]


def test_axis_maps_ends_and_picks_round_ticks():
    axis = nice([0.12, 2.3], 200.0, 30.0)
    assert axis(axis.low) == 200 and axis(axis.high) == 30 and axis.ticks == [0, 0.5, 1, 1.5, 2, 2.5]
    log = Axis(0.01, 10, 0, 300, log=True)
    assert log(0.1) == pytest.approx(100) and log.ticks == pytest.approx([0.01, 0.1, 1, 10])


def test_curves_hold_every_epoch_and_mark_the_best():
    panels = plots.curves(sample()["history"], 26)
    assert len(panels) == 3
    points = [named(parse(panels[0]), c)[0].get("points") for c in ("teal", "copper")]
    lines = [e for e in named(parse(panels[0]), "line") if e.tag == "polyline"]
    assert len(lines) == 2 and all(len(e.get("points").split()) == 30 for e in lines), points
    dashed = named(parse(panels[1]), "mark")
    assert len(dashed) == 1
    best = named(parse(panels[1]), "dot")[0]
    assert best.get("cx") == dashed[0].get("x1")
    assert "epoch 26 (best): accuracy 98.1%" in panels[1]


def test_curves_skip_what_is_not_a_number():
    history = [
        {"epoch": e, "train_loss": float("nan") if e == 1 else 1.0 / (e + 1), "val_loss": None} for e in range(4)
    ]
    (panel,) = plots.curves(history, None)
    assert "nan" not in panel
    assert plots.curves([], None) is None


def test_loss_over_a_wide_range_gets_a_log_scale():
    history = [{"epoch": e, "train_loss": 10.0 ** (-e), "val_loss": 1.0} for e in range(4)]
    assert "Loss (log scale)" in plots.curves(history, None)[0]


def test_confusion_counts_lie_in_their_cells():
    root = parse(plots.confusion([[5, 1], [0, 4]], ["cat", "dog"]))
    tips = [e.find("title").text for e in named(root, "fill")]
    assert tips == ["cat → cat: 5 of 6 (83.3%)", "cat → dog: 1 of 6 (16.7%)", "dog → cat: 0 of 4 (0%)",
                    "dog → dog: 4 of 4 (100%)"]  # fmt: skip
    assert [e.text for e in named(root, "cell")] == ["5", "1", "4"]
    mistake = named(root, "copper")
    assert len(mistake) == 1 and len(named(root, "teal")) == 2


def test_compact_matrix_adds_up_neighbours():
    n = 240
    root = parse(plots.compact([[3 if i == j else 0 for j in range(n)] for i in range(n)]))
    assert root.get("viewBox") == "0 0 120 120" and plots.block(n) == 2
    paths = [e for e in root.iter() if e.tag == "path"]
    assert sum(len(re.findall("M", e.get("d"))) for e in paths) == 120
    assert all("teal" in e.get("class") for e in paths)


def test_reliability_gap_spans_claim_and_truth():
    bins = [{"low": 0.8, "high": 0.9, "confidence": 0.85, "accuracy": 0.6, "count": 20},
            {"low": 0.0, "high": 0.1, "confidence": 0.0, "accuracy": 0.0, "count": 0}]  # fmt: skip
    root = parse(plots.reliability(bins, False))
    (gap,) = named(root, "gap")
    scale = 300 - 34
    assert float(gap.get("height")) == pytest.approx(0.25 * scale, abs=0.01)
    assert float(gap.get("y")) == pytest.approx(300 - 0.85 * scale, abs=0.01)
    assert plots.reliability([], False) is None


def test_corruptions_run_from_mild_to_hard_with_a_bar_a_severity():
    rows = [{"name": "noise", "severity": s, "top1": 0.5 - s / 10} for s in (1, 3)]
    rows.append({"name": "fog", "severity": 1, "top1": 0.8})
    root = parse(plots.corruptions(rows, 0.9))
    assert [e.find("title").text for e in named(root, "label") if e.find("title") is not None] == ["fog", "noise"]
    bars = named(root, "fill")
    widths = [float(e.get("width")) for e in bars if "teal" in e.get("class")]
    assert widths == pytest.approx([0.8 * 258, 0.4 * 258, 0.2 * 258], abs=0.01)
    assert "noise, severity 3: 20.0%, 70.0 points lost" in "".join(root.itertext())
    assert "clean 90.0%" in "".join(root.itertext())


def test_frontier_area_follows_size_and_beaten_points_are_hollow():
    root = parse(plots.frontier(sample()["runtimes"]))
    spots = named(root, "spot")
    radius = [float(e.get("r")) for e in spots]
    assert (radius[2] / radius[1]) ** 2 == pytest.approx(6_197_000 / 22_310_000, rel=0.01)
    assert ["hollow" in e.get("class") for e in spots] == [True, False, False]  # PyTorch is slower at equal accuracy
    x = [float(e.get("cx")) for e in spots]
    assert x[2] < x[1] < x[0]
    boxes = [(float(e.get("x")), float(e.get("y")), 7.4 * len(e.text)) for e in named(root, "label")]
    for i, (x1, y1, w1) in enumerate(boxes):
        for x2, y2, w2 in boxes[i + 1 :]:
            assert abs(y1 - y2) >= 16 or x1 + w1 <= x2 or x2 + w2 <= x1, "labels overlap"
    assert plots.frontier([{"name": "a", "latency_ms": None, "top1": 0.5}]) is None

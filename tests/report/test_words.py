"""The numbers and sentences of the report say what the metrics say, no more."""

from __future__ import annotations

import math

import pytest

from vitalloy.report import words


@pytest.mark.parametrize(
    ("shown", "wanted"),
    [
        (words.pct(0.97778), "97.8%"),
        (words.pct(1.0), "100%"),
        (words.pct(0.9996), "99.96%"),  # never 100% with a mistake left
        (words.pct(0.0), "0%"),
        (words.pct(None), "–"),
        (words.pct(math.nan), "–"),
        (words.sig(0.012345), "0.0123"),
        (words.sig(9.996), "10.0"),
        (words.sig(1234.5), "1,230"),
        (words.sig(3.81e-6), "3.81e-6"),
        (words.ms(4.6123), "4.61 ms"),
        (words.size(6_197_000), "6.20 MB"),
        (words.size(999_900), "1.00 MB"),
        (words.size(512), "512 B"),
        (words.amount(5_490_000), "5.49 M"),
        (words.points(0.0118), "1.2 points"),
        (words.points(0.01), "1.0 point"),
        (words.duration(192.4), "3 min 12 s"),
        (words.duration(7500), "2 h 5 min"),
        (words.moment("2025-11-21T11:54:03Z"), "21 November 2025, 11:54"),
        (words.moment("yesterday"), "yesterday"),
        (words.times(1.4, "faster", "slower"), "1.4× faster"),
        (words.times(0.5, "faster", "slower"), "2.0× slower"),
        (words.times(1.0, "faster", "slower"), "no faster"),
    ],
)
def test_numbers(shown, wanted):
    assert shown == wanted


def test_headline_says_when_int8_is_slower():
    metrics = {
        "test": {"top1": 0.9, "n": 1000, "top1_interval": [0.88, 0.92]},
        "onnx": {"size_bytes": 4e6},
        "int8": {"size_bytes": 1e6, "speedup": 0.5, "top1": 0.85},
    }
    assert words.headline(metrics) == (
        "90.0% of 1,000 test images right (95% interval 88.0 to 92.0); int8 is 4.0× smaller and 2.0× slower at 85.0%"
    )
    assert words.headline({"test": {"top1": 0.5, "n": 4}}) == "50.0% of 4 test images right"
    assert words.headline({"run": {"name": "a"}}) == "a has no test result yet"


def test_calibration_tells_direction_and_harm():
    under = words.calibration({"ece": 0.03, "ece_calibrated": 0.01, "temperature": 0.7})
    assert "underconfident" in under and "lowers it to 1.0 point." in under
    over = words.calibration({"ece": 0.01, "ece_calibrated": 0.03, "temperature": 1.5})
    assert "overconfident" in over and "raises it to 3.0 points." in over


def test_confused_pairs_are_ordered_and_counted():
    pairs = words.confused_pairs([[8, 2, 0], [0, 5, 0], [3, 0, 1]], ["a", "b", "c"])
    assert [(p["truth"], p["said"], p["count"], p["of"]) for p in pairs] == [("c", "a", 3, 4), ("a", "b", 2, 10)]


def test_hardest_names_the_worst():
    rows = [{"name": "fog", "severity": 1, "top1": 0.8}, {"name": "shot_noise", "severity": 5, "top1": 0.4}]
    text = words.hardest(rows, 0.9)
    assert "60.0% on average" in text and "shot noise at severity 5: 40.0%, 50.0 points below clean" in text


def test_saliency_names_the_method_and_its_limit():
    assert words.saliency("grad_cam").startswith("Grad-CAM weighs")
    assert "does not say" in words.saliency("grad_cam")
    assert words.saliency("something_new").startswith("Something new marks")

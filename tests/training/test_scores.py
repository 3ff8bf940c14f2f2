"""Protects: the numbers that the report shows."""

import numpy as np
import pytest
import torch
from scipy.special import softmax

from vitalloy.training.scores import (
    classification_scores,
    expected_calibration_error,
    negative_log_likelihood,
    temperature_scaling,
    wilson_interval,
)


def answers(n=4000, classes=5, overconfidence=3.0):
    """Labels drawn from the model's own probabilities, logits then stretched: the right temperature is known."""
    rng = np.random.RandomState(0)
    logits = rng.standard_normal((n, classes)) * 1.5
    p = softmax(logits, axis=1)
    labels = (p.cumsum(axis=1) < rng.random_sample((n, 1))).sum(axis=1)
    return logits * overconfidence, labels


def test_temperature_is_found_and_calibrates():
    logits, labels = answers()
    t = temperature_scaling(torch.from_numpy(logits).half(), torch.from_numpy(labels))
    assert t == pytest.approx(3.0, rel=0.05)
    before, _ = expected_calibration_error(softmax(logits, axis=1), labels)
    after, _ = expected_calibration_error(softmax(logits / t, axis=1), labels)
    assert after < 0.03 < 0.15 < before
    around = [negative_log_likelihood(logits, labels, t * f) for f in (0.98, 1.0, 1.02)]
    assert around[1] == min(around)


def test_temperature_without_a_mistake_stays_finite():
    logits = np.eye(4) * 3
    assert 0.04 < temperature_scaling(logits, np.arange(4)) < 0.1
    assert temperature_scaling(np.zeros((0, 4)), np.zeros(0, int)) == 1.0


def test_calibration_error_by_hand():
    probs = np.array([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.5, 0.5], [1.0, 0.0]])
    error, rows = expected_calibration_error(probs, [0, 1, 0, 0, 0], bins=5)
    # (0.4, 0.6]: 0.6 and 0.5, both right; (0.6, 0.8]: 0.8, wrong; (0.8, 1]: 0.9 and 1.0, both right
    assert error == pytest.approx((2 * 0.45 + 0.8 + 2 * 0.05) / 5)
    assert [r["count"] for r in rows] == [0, 0, 2, 1, 2]
    assert rows[3]["confidence"] == pytest.approx(0.8) and rows[3]["accuracy"] == 0.0
    assert (rows[0]["low"], rows[-1]["high"]) == (0.0, 1.0)


def test_wilson_interval():
    low, high = wilson_interval(95, 100)
    assert (low, high) == (pytest.approx(0.8883, abs=1e-3), pytest.approx(0.9785, abs=1e-3))
    assert wilson_interval(10, 10)[1] == 1.0 and wilson_interval(10, 10)[0] == pytest.approx(0.7225, abs=1e-3)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_scores_of_each_class():
    scores = classification_scores([0, 0, 0, 1, 1], [0, 0, 1, 1, 1], ["a", "b", "never seen"])
    assert scores["confusion"] == [[2, 1, 0], [0, 2, 0], [0, 0, 0]]
    a, b, none = scores["per_class"]
    assert (a["name"], a["precision"], a["support"]) == ("a", 1.0, 3)
    assert a["recall"] == pytest.approx(2 / 3) and b["precision"] == pytest.approx(2 / 3)
    assert b["f1"] == pytest.approx(0.8) and none["f1"] == 0.0 and none["support"] == 0

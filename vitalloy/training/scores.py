"""What a classifier's answers are worth: accuracy with its interval, per-class scores, calibration.

Temperature scaling and the expected calibration error follow "On Calibration of Modern Neural Networks" (Guo,
Pleiss, Sun, Weinberger, ICML 2017, arXiv 1706.04599); the interval of an accuracy is Wilson's score interval, which
stays inside 0..1 and is sound for small test sets.

SciPy and scikit-learn are imported where they are used: they take seconds, and predicting needs neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

TEMPERATURES = (0.05, 20.0)  # the search stays inside: a validation set without a mistake has no finite optimum


def wilson_interval(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The interval that holds the true accuracy of `correct` right answers in `n`, as fractions."""
    from scipy.stats import norm

    if n <= 0:
        return 0.0, 1.0
    z, p = float(norm.ppf(0.5 + confidence / 2)), correct / n
    centre, spread = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)
    return 0.0 if correct == 0 else float(low), 1.0 if correct == n else float(high)  # exact at both ends


def negative_log_likelihood(logits: Any, labels: Any, temperature: float = 1.0) -> float:
    """Mean of -log p(label) over the samples; `logits` (N, classes), `labels` (N,)."""
    from scipy.special import log_softmax

    logits, labels = _float64(logits), np.asarray(labels, dtype=np.int64)
    return float(-log_softmax(logits / temperature, axis=1)[np.arange(len(labels)), labels].mean())


def temperature_scaling(logits: Any, labels: Any) -> float:
    """The temperature that makes softmax(logits / temperature) fit held-out `labels` best.

    Give it validation logits, never those of the test set that it is judged on. Above 1 the model was too sure.
    """
    from scipy.optimize import minimize_scalar

    logits, labels = _float64(logits), np.asarray(labels, dtype=np.int64)
    if len(labels) == 0:
        return 1.0
    best = minimize_scalar(
        lambda log_t: negative_log_likelihood(logits, labels, float(np.exp(log_t))),
        bounds=tuple(np.log(TEMPERATURES)),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(np.exp(best.x))


def expected_calibration_error(probs: Any, labels: Any, bins: int = 15) -> tuple[float, list[dict[str, float]]]:
    """How far confidence is from accuracy, on average over `bins` equal steps of confidence.

    Returns the error (a fraction) and a row for each bin: low, high, its mean confidence, its accuracy, and the
    count of samples in it; an empty bin has zeros.
    """
    probs, labels = _float64(probs), np.asarray(labels, dtype=np.int64)
    confidence, right = probs.max(axis=1, initial=0.0), probs.argmax(axis=1) == labels
    edges = np.linspace(0.0, 1.0, bins + 1)
    where = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)  # a bin is (low, high]
    rows, error = [], 0.0
    for b in range(bins):
        inside = where == b
        count = int(inside.sum())
        sure, accurate = (float(v[inside].mean()) if count else 0.0 for v in (confidence, right))
        error += count * abs(sure - accurate)
        rows.append(
            {
                "low": float(edges[b]),
                "high": float(edges[b + 1]),
                "confidence": sure,
                "accuracy": accurate,
                "count": count,
            }
        )
    return error / max(len(labels), 1), rows


def classification_scores(labels: Any, predictions: Any, classes: Sequence[str]) -> dict[str, Any]:
    """The confusion matrix (rows truth, columns prediction) and precision, recall, F1 and support of each class."""
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    labels, predictions = np.asarray(labels), np.asarray(predictions)
    present = list(range(len(classes)))
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, predictions, labels=present, zero_division=0.0
    )
    return {
        "confusion": confusion_matrix(labels, predictions, labels=present).tolist(),
        "per_class": [
            {
                "name": name,
                "precision": float(precision[i]),
                "recall": float(recall[i]),
                "f1": float(f1[i]),
                "support": int(support[i]),
            }
            for i, name in enumerate(classes)
        ],
    }


def _float64(values: Any) -> np.ndarray:
    if hasattr(values, "detach"):  # a tensor, maybe in half precision or on another device
        values = values.detach().to("cpu").double().numpy()
    return np.asarray(values, dtype=np.float64)

"""Metrics as `fit` writes them, with fixed numbers, for the report's tests."""

from __future__ import annotations

import copy
import math

import numpy as np

DIGITS = [str(i) for i in range(10)]
HOSTILE = ["<script>alert('x')</script>", 'say "a" & b', "猫 кот 🐈", "\u202eright to left", "x" * 300, "</style>",
           "{{ 7 * 7 }}", "bell\x07", "lone\udcff", "'"]  # fmt: skip


def sample(classes: list[str] | None = None, epochs: int = 30) -> dict:
    """A digits-like run: 27 test images a class, six mistakes, int8 3.6× smaller and 1.4× faster."""
    classes = list(classes or DIGITS)
    n = len(classes)
    confusion = [[27 if i == j else 0 for j in range(n)] for i in range(n)]
    for truth, said, times in ((8, 1, 3), (9, 5, 1), (3, 8, 1), (1, 8, 1)):
        confusion[truth][truth] -= times
        confusion[truth][said] += times
    matrix = np.array(confusion)
    right = matrix.diagonal()
    recall, precision = right / matrix.sum(1), right / matrix.sum(0)
    f1 = 2 * precision * recall / (precision + recall)
    top1 = float(right.sum() / matrix.sum())
    history = []
    for e in range(epochs):
        history.append({
            "epoch": e, "train_loss": 0.42 + 1.9 * math.exp(-e / 4), "val_loss": 0.12 + 2.1 * math.exp(-e / 5),
            "val_top1": 0.981 - 0.86 * math.exp(-e / 3.2) - 0.0007 * max(0, e - 26),
            "lr": 2e-3 * (min(1.0, (e + 1) / 3) * 0.5 * (1 + math.cos(math.pi * e / max(epochs, 2)))), "seconds": 2.1,
        })  # fmt: skip
    best = max(history, key=lambda h: h["val_top1"])
    counts = [4, 5, 3, 4, 6, 7, 9, 12, 31, 189]
    before = [0.0, 0.2, 0.33, 0.5, 0.67, 0.71, 0.78, 0.83, 0.935, 0.995]
    after = [0.0, 0.0, 0.33, 0.25, 0.5, 0.57, 0.67, 0.75, 0.87, 0.964]
    bins = [
        {"low": i / 10, "high": (i + 1) / 10, "confidence": (i + 0.5) / 10, "count": c} for i, c in enumerate(counts)
    ]
    rows = (
        ("PyTorch fp32", top1, 21_960_000, 9.84, 11.92),
        ("ONNX Runtime fp32", top1, 22_310_000, 4.61, 5.02),
        ("ONNX Runtime int8", 0.97407, 6_197_000, 3.29, 3.61),
    )
    columns = ("name", "top1", "size_bytes", "latency_ms", "latency_p90_ms")
    runtimes = [dict(zip(columns, row, strict=True)) for row in rows]
    hurt = {"brightness": 0.963, "contrast": 0.933, "jpeg_compression": 0.948, "defocus_blur": 0.881,
            "motion_blur": 0.859, "gaussian_noise": 0.704, "shot_noise": 0.744, "pixelate": 0.956}  # fmt: skip
    return {
        "run": {"name": "digits-1", "started": "2025-11-21T11:54:03", "seconds": 192.4, "seed": 0,
                "command": "vitalloy fit digits --budget '10ms, 25MB'",
                "versions": {"vitalloy": "0.1.0", "torch": "2.13.0", "timm": "1.0.31", "onnxruntime": "1.23.2"},
                "machine": {"cpu": "Example CPU 2.4 GHz", "cores": 2, "threads": 2, "accelerator": None}},
        "data": {"spec": "digits", "name": "digits", "classes": classes, "train": 1257, "val": 270, "test": 27 * n,
                 "native_size": [8, 8], "counts": {"train": [125 + i % 4 for i in range(n)]}},
        "model": {"name": "cvt_13", "params": 5_490_000, "macs": 1_180_000_000, "img_size": [32, 32], "in_chans": 3,
                  "weights": None, "probe": False},
        "history": history,
        "best": {"epoch": best["epoch"], "val_top1": best["val_top1"], "weights": "ema"},
        "test": {"top1": top1, "top1_interval": [0.9524, 0.9908], "top5": 0.9963, "nll": 0.093, "n": 27 * n,
                 "ece": 0.0314, "ece_calibrated": 0.0118, "temperature": 0.741, "confusion": confusion,
                 "per_class": [{"name": c, "precision": float(p), "recall": float(r), "f1": float(f), "support": 27}
                               for c, p, r, f in zip(classes, precision, recall, f1, strict=True)],
                 "reliability": [{**b, "accuracy": a} for b, a in zip(bins, before, strict=True)],
                 "reliability_calibrated": [{**b, "accuracy": a} for b, a in zip(bins, after, strict=True)]},
        "onnx": {"file": "model.onnx", "opset": 18, "max_abs_diff": 3.81e-6, "images": 64, "agreement": 1.0,
                 "size_bytes": 22_310_000, "latency_ms": 4.61, "latency_p90_ms": 5.02},
        "int8": {"file": "model.int8.onnx", "top1": 0.97407, "size_bytes": 6_197_000, "latency_ms": 3.29,
                 "latency_p90_ms": 3.61, "speedup": 4.61 / 3.29, "agreement": 0.9889, "calibration_images": 128,
                 "verdict": "int8 pays here: 1.4 times faster and 3.6 times smaller for 0.4 points of accuracy.",
                 "method": "static, per channel"},
        "runtimes": [{**r, "batch": 1} for r in runtimes],
        "corruptions": [{"name": k, "severity": 3, "top1": v} for k, v in hurt.items()],
        "explanation": {"method": "grad_cam", "images": [
            {"file": f"images/{i}.png", "truth": classes[i], "prediction": classes[1 if i == 8 else i],
             "confidence": 0.61 if i == 8 else 0.9 + i / 100, "correct": i != 8} for i in range(9)]},
        "budget": {"asked": "10ms, 25MB", "latency_ms": 10.0, "size_mb": 25.0, "top1": None, "met": True, "table": [
            {"model": "cvt_13", "params": 5_490_000, "size_mb": 22.0, "latency_ms": 9.84, "published_top1": 0.816,
             "fits": True, "chosen": True, "note": "the most accurate that fits"},
            {"model": "mobilevit_xs", "params": 2_310_000, "size_mb": 9.3, "latency_ms": 6.2, "published_top1": 0.748,
             "fits": True, "chosen": False, "note": ""},
            {"model": "coatnet_0", "params": 25_000_000, "size_mb": 100.0, "latency_ms": 31.0, "published_top1": None,
             "fits": False, "chosen": False, "note": "too slow, too large"}]},
    }  # fmt: skip


def without(metrics: dict, *keys: str) -> dict:
    """A copy with some parts missing."""
    return {k: v for k, v in copy.deepcopy(metrics).items() if k not in keys}

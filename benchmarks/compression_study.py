"""Accuracy, size and latency of every quantizer at several bit widths, on the bundled models.

    python benchmarks/compression_study.py [--methods easyquant ...]

Fashion-MNIST must be at hand (Debian's package dataset-fashion-mnist, or the folder named by VITALLOY_DATA). Each row
is written when it is measured, so that a study which is cut short can be continued by the same command.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from pathlib import Path

import torch

import vitalloy
from vitalloy.benchmark import describe
from vitalloy.compression.quantization import METHODS
from vitalloy.data import load_data, make_loader
from vitalloy.errors import VitalloyError
from vitalloy.runs import transform_of

RESULTS = Path(__file__).parent / "results" / "compression_study.json"
MODELS = ("fashion_hybrid", "fashion_vit")
BITS = ((8, 8), (6, 6), (4, 8), (4, 4), (3, 3))
CALIBRATION, TESTED, TRAINED = 128, 2000, 12_800  # images
SEARCHES = ("easyquant", "fq_vit", "ptq4vit", "repq_vit", "q_hyvit", "aphq")
TRAININGS = {"i_vit": ((8, 8),), "bivit": ((1, 1),), "fliqs": ((6, 6),)}  # 6: the mean that a search aims at
OPTIONS = {"aphq": {"iterations": 200}, "i_vit": {"epochs": 1}, "bivit": {"epochs": 4}, "fliqs": {"steps": 400}}


def evenly(images, count):
    step = max(len(images) // count, 1)
    return images.subset(range(0, min(len(images), count * step), step))


def study(name: str, methods: list[str], rows: list[dict]) -> None:
    model = vitalloy.load(f"bundled:{name}")
    splits = load_data("FashionMNIST")
    judging = transform_of(model)
    calibration = list(make_loader(evenly(splits.train.with_transform(judging), CALIBRATION), 32, train=False))
    tested = list(make_loader(evenly(splits.test.with_transform(judging), TESTED), 100, train=False))
    shown = list(make_loader(evenly(splits.train.with_transform(judging), TRAINED), 64, train=False))
    for method in methods:
        bits = TRAININGS.get(method) or (BITS if method in METHODS else ((8, 8),))
        for weights, activations in bits:
            key = {"model": name, "method": method, "weights": weights, "activations": activations}
            if any(all(row[k] == v for k, v in key.items()) for row in rows):
                continue
            options = dict(OPTIONS.get(method, {}))
            if method in TRAININGS:
                options["train"] = shown
            if method == "fliqs":
                options["target_bits"] = weights
            elif method in METHODS:
                options |= {"weights": weights, "activations": activations}
            started = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                try:
                    report = vitalloy.compress(
                        model, calibration, method, evaluation=tested, folder=folder, **options
                    ).report
                    row = {k: v for k, v in report.after.as_dict().items() if k not in ("file", "name")}
                    row |= {"float": report.before.as_dict(), "onnx": report.before_runtime.as_dict()}
                    row["bit_operations"] = report.as_dict()["bit_operations"]
                except VitalloyError as error:
                    row = {"problem": str(error)}
            rows.append({**row, **key, "total_seconds": round(time.perf_counter() - started, 1)})
            RESULTS.write_text(json.dumps({"machine": describe(), "rows": rows}, indent=1) + "\n")
            logging.info("%s", {k: rows[-1].get(k) for k in (*key, "top1", "execution", "latency_ms", "problem")})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--methods", nargs="+", default=["int8", "int8_dynamic", "openvino", *SEARCHES, *TRAININGS])
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else []
    for name in args.models:
        study(name, args.methods, rows)


if __name__ == "__main__":
    main()

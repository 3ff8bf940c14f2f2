"""What the two perturbations behind APHQ-ViT's Hessian measure, and what they are worth at 3 bits.

    python benchmarks/perturbation.py

The published push adds the same number to every channel of a block's output; random signs are the default here. For
each bundled model: how much of what float32 measures is still there in float64 (rounding noise is not), and the top-1
accuracy at 3/3 bits with either, and without a Hessian. Fashion-MNIST must be at hand, as for the compression study.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import torch
from compression_study import CALIBRATION, MODELS, OPTIONS, TESTED, evenly

import vitalloy
from vitalloy.benchmark import describe
from vitalloy.compression.quantization import quantize
from vitalloy.compression.quantization.aphq import perturbation_report
from vitalloy.data import load_data, make_loader
from vitalloy.runs import transform_of

RESULTS = Path(__file__).parent / "results" / "perturbation.json"
VARIANTS = {
    "rademacher": {"perturbation": "rademacher"},
    "ones": {"perturbation": "ones"},
    "no Hessian": {"reconstruction": "mse"},
}
LOOKED_AT = 32  # images of the report


@torch.inference_mode()
def accuracy(model, batches) -> float:
    right = sum((model(images).argmax(-1) == torch.as_tensor(labels)).sum().item() for images, labels, *_ in batches)
    return right / len(batches.dataset)


def measure(name: str, seeds: int) -> dict:
    model = vitalloy.load(f"bundled:{name}").eval()
    judging = transform_of(model)
    splits = load_data("FashionMNIST")
    shown = evenly(splits.train.with_transform(judging), CALIBRATION)
    calibration = torch.cat([images for images, *_ in make_loader(shown, 32, train=False)])
    tested = make_loader(evenly(splits.test.with_transform(judging), TESTED), 100, train=False)
    layers = perturbation_report(model, calibration[:LOOKED_AT])
    row = {"model": name, "images": len(tested.dataset), "float_top1": accuracy(model, tested), "layers": layers}
    row["top1"] = {
        variant: [
            accuracy(quantize(model, calibration, "aphq", weights=3, activations=3, seed=seed, **options), tested)
            for seed in range(seeds)
        ]
        for variant, options in ((variant, OPTIONS["aphq"] | choice) for variant, choice in VARIANTS.items())
    }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--seeds", type=int, default=1, help="runs of each accuracy")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    rows = {row["model"]: row for row in json.loads(RESULTS.read_text())["rows"]} if RESULTS.is_file() else {}
    for name in args.models:
        rows[name] = measure(name, args.seeds)
        RESULTS.write_text(json.dumps({"machine": describe(), "rows": list(rows.values())}, indent=1) + "\n")
        logging.info("%s", {key: value for key, value in rows[name].items() if key != "layers"})


if __name__ == "__main__":
    main()

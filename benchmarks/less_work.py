"""Work saved, time saved and accuracy of the methods that leave work out, at three budgets.

    OMP_NUM_THREADS=1 python benchmarks/less_work.py speed      # published models at 224 pixels, random weights
    OMP_NUM_THREADS=1 python benchmarks/less_work.py accuracy   # the bundled models, trained on with Fashion-MNIST

Full and reduced model are timed in turns in one process: in PyTorch, in ONNX Runtime and there in int8, one image and
sixteen at a time; figures are medians. Early exits take the time of the images at hand, in the mean. `accuracy` needs
Fashion-MNIST (Debian's package dataset-fashion-mnist, or the folder named by VITALLOY_DATA). Each row is written when
it is measured, so that a study which is cut short can be continued by the same command.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import vitalloy
from vitalloy.benchmark import compare, describe
from vitalloy.compression import trunk
from vitalloy.compression.reduction import reduce
from vitalloy.compression.tokens.lgvit import EarlyExit, calibrate
from vitalloy.data import ImageSet, load_data, make_loader
from vitalloy.errors import VitalloyError
from vitalloy.runs import transform_of
from vitalloy.runs.folder import Silent
from vitalloy.runs.trials import Workbench, judge

RESULTS = Path(__file__).parent / "results"
PUBLISHED = ("deit_small_patch16_224", "cvt_13", "pvt_v2_b1")
BUNDLED = ("fashion_vit", "fashion_hybrid")
BUDGETS = (0.8, 0.65, 0.5)  # shares of the work that may stay
BATCH, CALIBRATION, TESTED, TRAINED = 16, 128, 2000, 12_800  # images
METHODS: dict[str, dict[str, Any]] = {
    "sit": {},
    "sparsifiner": {},
    "lgvit": {},
    "lpvit": {"pattern": "aligned"},
    "lpvit_blocks": {"pattern": "blocks"},
}
EPOCHS = {"sit": 4, "sparsifiner": 2, "lgvit": 2, "lpvit": 3, "lpvit_blocks": 3}


def times(forms: dict[str, Callable[[torch.Tensor], Any]], images: torch.Tensor, budget_s: float) -> dict[str, Any]:
    """Milliseconds of each form for one image, in the mean of sixteen, and for sixteen at once."""
    batch = images[:BATCH]

    def alone(call: Callable[[torch.Tensor], Any]) -> None:
        for image in batch.split(1):
            call(image)

    one = compare({name: lambda c=call: alone(c) for name, call in forms.items()}, repeats=15, budget_s=budget_s)
    many = compare({name: lambda c=call: c(batch) for name, call in forms.items()}, repeats=15, budget_s=budget_s)
    return {name: {"one_ms": one[name].median_ms / BATCH, "batch_ms": many[name].median_ms} for name in forms}


def forms_of(bench: Workbench) -> dict[str, Any]:
    """The trials of a model in PyTorch, ONNX Runtime and there in int8; fewer where an export fails."""
    found = {"eager": bench.float()}
    try:
        found |= {"onnx": bench.onnx(), "int8": bench.make("int8")}
    except VitalloyError as error:
        logging.info("%s", error)
    return found


def row_of(full: dict[str, Any], bench: Workbench, images: torch.Tensor, budget_s: float = 4.0) -> dict[str, Any]:
    reduced = forms_of(bench)
    calls = {f"full {name}": trial.call for name, trial in full.items()}
    calls |= {f"reduced {name}": trial.call for name, trial in reduced.items()}
    shown = images[:BATCH]
    work = trunk.macs(bench.model, shown) / len(shown)
    return {"macs": work / full["eager"].macs, "ms": times(calls, shown, budget_s), "trials": reduced}


def named(method: str) -> tuple[str, dict[str, Any]]:
    return method.removesuffix("_blocks"), METHODS[method]


class Results:
    """Rows in a file, each written when it is there."""

    def __init__(self, name: str) -> None:
        self.path = RESULTS / f"less_work_{name}.json"
        self.rows = json.loads(self.path.read_text())["rows"] if self.path.is_file() else []

    def has(self, **key: Any) -> bool:
        return any(all(row[k] == v for k, v in key.items()) for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.path.write_text(json.dumps({"machine": describe(), "rows": self.rows}, indent=1) + "\n")
        logging.info("%s", {k: v for k, v in row.items() if k not in ("ms", "settings")})


def speed(names: list[str], methods: list[str]) -> None:
    results = Results("speed")
    images = torch.randn(CALIBRATION // 4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    for name in names:
        torch.manual_seed(0)
        model = vitalloy.create_model(name).eval()
        with tempfile.TemporaryDirectory() as folder:
            full = forms_of(Workbench(model, images, Path(folder), Silent()))
            for method in methods:
                for budget in BUDGETS:
                    key = {"model": name, "method": method, "budget": budget}
                    if results.has(**key):
                        continue
                    gc.collect()
                    real, options = named(method)
                    try:
                        made = reduce(model, images, real, macs=budget, epochs=0, **options)
                        bench = Workbench(made, images, Path(folder), Silent(), f"{method}-{budget}")
                        row = row_of(full, bench, images, budget_s=8.0)
                        row.pop("trials")
                    except VitalloyError as error:
                        row = {"problem": str(error)}
                    results.add({**key, **row})


def accuracy(names: list[str], methods: list[str], budgets: list[float]) -> None:
    results = Results("accuracy")
    for name in names:
        model, splits = vitalloy.load(f"bundled:{name}"), load_data("FashionMNIST")
        train, val, test = (s.with_transform(transform_of(model)) for s in (splits.train, splits.val, splits.test))
        images = torch.cat([x for x, _ in some(train, CALIBRATION, 32)])
        shown, tested = some(train, TRAINED, 64), some(test, TESTED, 100)
        held_out = some(val, TESTED, 100)  # by which exits are chosen
        with tempfile.TemporaryDirectory() as folder:
            full = forms_of(Workbench(model, images, Path(folder), Silent()))
            full = dict(zip(full, judge(list(full.values()), tested, Silent()), strict=True))
            for method in methods:
                learned = None
                for budget in budgets:
                    key = {"model": name, "method": method, "budget": budget}
                    if results.has(**key):
                        continue
                    started = time.perf_counter()
                    try:
                        made, learned = make(model, images, method, budget, shown, held_out, learned)
                        bench = Workbench(made, images, Path(folder), Silent(), f"{method}-{budget}")
                        mixed = torch.cat([x for x, _ in tested])[:: TESTED // BATCH][:BATCH]
                        row = row_of(full, bench, mixed)
                        trials = row.pop("trials")
                        judged = dict(zip(trials, judge(list(trials.values()), tested, Silent()), strict=True))
                        row["top1"] = {n: t.top1 for n, t in judged.items()}
                        row["interval"] = judged["eager"].top1_interval
                        row["size"] = {n: t.size_bytes for n, t in judged.items()}
                        row["macs"] = macs_of(made, tested) / full["eager"].macs
                        row["full_top1"] = {n: t.top1 for n, t in full.items()}
                    except VitalloyError as error:
                        row = {"problem": str(error)}
                    results.add({**key, "epochs": EPOCHS[method], "seconds": time.perf_counter() - started, **row})


def some(images: ImageSet, count: int, batch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches (images, labels) of `count` images, evenly spread."""
    step = max(len(images) // count, 1)
    chosen = images.subset(range(0, min(len(images), count * step), step))
    return [(x, torch.as_tensor(y)) for x, y, _ in make_loader(chosen, batch, train=False)]


def make(
    model: nn.Module, images: torch.Tensor, method: str, budget: float, shown: Any, held_out: Any, learned: Any
) -> tuple[nn.Module, Any]:
    """The reduced model, and what other budgets can share: exits are trained once."""
    real, options = named(method)
    if real != "lgvit":
        return reduce(model, images, real, macs=budget, train=shown, epochs=EPOCHS[method], **options), None
    made = learned or reduce(model, images, real, train=shown, epochs=EPOCHS[method], **options)
    calibrate(made, held_out, macs=budget)
    return made, made


def macs_of(model: nn.Module, batches: Any) -> float:
    """Mean multiply-accumulates of an image; of all test images where they differ."""
    if not isinstance(model, EarlyExit):
        return trunk.macs(model, batches[0][0][:1])
    return sum(trunk.macs(model, images) for images, _ in batches) / sum(len(images) for images, _ in batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=("speed", "accuracy"))
    parser.add_argument("--models", nargs="+")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS))
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    if args.study == "speed":
        speed(args.models or list(PUBLISHED), args.methods)
    else:
        accuracy(args.models or list(BUNDLED), args.methods, args.budgets)


if __name__ == "__main__":
    main()

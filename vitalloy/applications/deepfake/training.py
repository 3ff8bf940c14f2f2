"""Training GenConViT's networks: on real and forged faces, or on real faces alone with forgeries made on the fly.

For everyone who adapts the detector to material of their own. Losses, optimizer (Adam, its L2 decay), schedule (a tenth
of the rate every 15 epochs), batch, seed and augmentation are the authors', and so is the choice of the epoch with the
lowest validation loss. Departures: accuracy compares labels with labels, where their test indexes labels by
predictions; network B is validated with the mean of its latent, so that epochs can be compared; a run that was killed
goes on to the very weights of an unbroken one (on a CPU, with the same number of threads); and where the forgeries are
self-made, a batch is half real faces and half forgeries of just these, under the same augmentation, so that nothing
but the forgery tells them apart.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitalloy.applications.deepfake import augmentation, forgeries
from vitalloy.applications.deepfake.metrics import frame_metrics
from vitalloy.applications.deepfake.model import NETWORKS, Network
from vitalloy.applications.deepfake.training_data import FAKE, FaceSet, Forge, Sample, crop_videos, read_samples
from vitalloy.applications.deepfake.weights import save_network
from vitalloy.checkpoints import load_checkpoint
from vitalloy.data import make_loader
from vitalloy.errors import ModelError, RunError, suggest

log = logging.getLogger("vitalloy")

PAIRS = 4  # frozen (real, forged) pairs of each face that self-made forgeries are judged on
_FREE = ("epochs", "workers", "accelerator")  # may change when a run is resumed; the epochs only grow


@dataclass(frozen=True)
class TrainingResult:
    """What a training leaves.

    Attributes:
        file: the best epoch's weights, for `load_network`.
        history: a row an epoch: epoch (from 0), train_loss, train_accuracy, val_loss, val_accuracy, lr, seconds.
        best_epoch: of the lowest validation loss.
        data: for each part the counts of real and fake faces and of people or videos.
        self_made: the forgeries were made from the real faces.
        test: what `frame_metrics` measures on the test part; None without one.
        seconds: of this call.
    """

    file: Path
    history: list[dict[str, Any]]
    best_epoch: int
    data: dict[str, dict[str, int]]
    self_made: bool
    test: dict[str, Any] | None
    seconds: float


def train(
    data: str | Path,
    *,
    out: str | Path,
    net: str = "a",
    backbone: str = "convnext_tiny",
    img_size: int = 224,
    epochs: int = 5,
    batch_size: int = 32,
    lr: float = 1e-4,
    weight_decay: float = 1e-4,
    step: int = 15,
    gamma: float = 0.1,
    kl_weight: float = 0.0,
    augment: float = augmentation.CHANCE,
    forge: Forge | None = None,
    weights: str | Path | None = None,
    backbone_weights: str | Path | None = None,
    seed: int = 1,
    frames: int = 15,
    detector: str = "auto",
    grouped: bool = True,
    resume: bool = False,
    workers: int | str = "auto",
    accelerator: str = "auto",
    advance: Callable[[str, int, int], None] | None = None,
) -> TrainingResult:
    """Train network A or B and leave the best weights, the history and the scores on held-out faces in `out`.

    Args:
        data: a published data set or class folders `real` and `fake` (divided into train, valid and test, or not), or
            a folder of real faces alone; pictures of faces, or videos, in which the faces are found first.
        out: gets network_<net>.safetensors, training.json, checkpoints/, and faces/ if there are videos.
        net: "a" or "b".
        backbone, img_size: any backbone of the registry, and the side of the faces in pixels, a multiple of 32.
        step, gamma: the rate is multiplied by gamma every so many epochs.
        kl_weight: of network B's KL value, which the authors leave out.
        augment: chance that the list of augmentations is applied to a training face.
        forge: makes the forgeries where the data has none; `forgeries.pair` by default.
        weights: a published or own file of this network to begin with.
        backbone_weights: a file for the backbone alone to begin with; the authors began with ImageNet's.
        frames: looked at in each video.
        detector: of faces in videos, as `create_detector` takes it.
        grouped: False takes every picture for another person's, whatever its name.
        resume: go on after the last whole epoch of a run that was cut off, to as many epochs as it was begun with, or
            more; the other arguments must be those that it was begun with.
        advance: told what goes on ("faces" or "training"), and how much of it is done.

    Raises:
        DataError: the data cannot be used; ModelError: an unknown network or backbone; CheckpointError: the weights do
        not fit; RunError: `out` holds another run; TrainingError: the loss is no number, or the run was cut off.
    """
    arguments = {k: str(v) if isinstance(v, Path) else v for k, v in locals().items()}
    for name in ("out", "resume", "advance"):
        del arguments[name]
    arguments["forge"] = getattr(forge, "__name__", None if forge is None else type(forge).__name__)
    began, out = time.monotonic(), Path(out)
    state = _before(out, arguments, resume)
    if net not in NETWORKS:
        raise ModelError(f"There is no network {net!r}; choose a or b.{suggest(net, NETWORKS)}")
    parts = crop_videos(
        read_samples(data, seed=seed, grouped=grouped),
        Path(data),
        out / "faces",
        size=img_size,
        frames=frames,
        detector=detector,
        reuse=resume,
        advance=None if advance is None else lambda done, total: advance("faces", done, total),
    )
    self_made = all(sample.label != FAKE for samples in parts.values() for sample in samples)
    make = (forge or forgeries.pair) if self_made else None
    counts = {name: _counts(samples) for name, samples in parts.items() if samples}
    network = _start(net, backbone, img_size, kl_weight, weights, backbone_weights, seed)
    log.info("network %s, %s; faces: %s", net.upper(), backbone, counts)

    learning = FaceSet(parts["train"], img_size, forge=make, chance=augment)
    judging, testing = (
        FaceSet(parts[name], img_size, forge=make, repeats=PAIRS if self_made else 1, seed=seed + offset)
        for offset, name in enumerate(("val", "test"), start=1)
    )
    options = {"batch_size": max(1, batch_size // 2) if self_made else batch_size, "seed": seed, "workers": workers}
    loaders = make_loader(learning, train=True, **options), make_loader(judging, train=False, **options)
    history = _fit(network, loaders, out / "checkpoints", arguments, state, advance)
    best = min(history, key=lambda row: row["val_loss"])
    test = _test(network, make_loader(testing, train=False, **options), testing.groups) if testing else None
    about = {
        "summary": _summary(Path(data).resolve().name, counts["train"], self_made, best),
        "data": counts,
        "self_made": self_made,
        "img_size": img_size,
        "epoch": best["epoch"],
        "val_loss": best["val_loss"],
    }
    file = save_network(network, out / f"network_{net}.safetensors", about)
    result = TrainingResult(file, history, best["epoch"], counts, self_made, test, time.monotonic() - began)
    _write(out / "training.json", {"arguments": arguments} | asdict(result) | {"file": file.name})
    return result


def _before(out: Path, arguments: dict[str, Any], resume: bool) -> dict[str, Any] | None:
    """The checkpoint of a run to go on with, or None to begin."""
    from vitalloy.training.checkpointing import LAST, read_checkpoint

    last = out / "checkpoints" / LAST
    if not last.exists():
        return None
    if not resume:
        raise RunError(f"{out} holds a training already. Resume it, or give another folder.")
    state = read_checkpoint(last)
    before = state["arguments"]
    if changed := [k for k in arguments if k not in _FREE and arguments[k] != before.get(k)]:
        was = ", ".join(f"{k} was {before.get(k)!r} and is {arguments[k]!r}" for k in changed)
        raise RunError(f"{out} holds another training: {was}. Give what it began with, or another folder.")
    arguments["epochs"] = max(arguments["epochs"], before["epochs"])
    return state


def _start(
    net: str,
    backbone: str,
    img_size: int,
    kl_weight: float,
    weights: str | Path | None,
    backbone_weights: str | Path | None,
    seed: int,
) -> Network:
    if kl_weight and net != "b":
        raise ModelError("kl_weight is of network B; network A has no latent distribution.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = NETWORKS[net](backbone, img_size, **({"logvar": True} if kl_weight else {}))
    if backbone_weights is not None:
        load_checkpoint(network.backbone, backbone_weights)
    if weights is not None:
        load_checkpoint(network, weights)
    return network


def _counts(samples: list[Sample]) -> dict[str, int]:
    fake = sum(sample.label == FAKE for sample in samples)
    return {"real": len(samples) - fake, "fake": fake, "groups": len({sample.group for sample in samples})}


def _summary(name: str, counts: dict[str, int], self_made: bool, best: dict[str, Any]) -> str:
    fakes = "forgeries made from them" if self_made else f"{counts['fake']} forged faces"
    return (
        f"trained here on {name}: {counts['real']} real faces and {fakes}, {counts['groups']} people or videos; "
        f"{100 * best['val_accuracy']:.1f} % right on held-out faces of the same kind"
    )


def _fit(
    network: Network,
    loaders: tuple[Any, Any],
    checkpoints: Path,
    arguments: dict[str, Any],
    state: dict[str, Any] | None,
    advance: Callable[[str, int, int], None] | None,
) -> list[dict[str, Any]]:
    """Train in place to the best epoch's weights; returns the history."""
    import lightning.pytorch as pl

    from vitalloy.applications.deepfake.training_loop import Detector, KeepLastAndBest, Progress
    from vitalloy.training.checkpointing import BEST, LAST, AtomicCheckpointIO, read_checkpoint
    from vitalloy.training.trainer import failures_named, quiet_lightning

    module = Detector(network, arguments)
    module.history = list(state["history"]) if state else []
    if len(module.history) < arguments["epochs"]:
        with quiet_lightning(), failures_named(checkpoints), torch.random.fork_rng(devices=[]):
            trainer = pl.Trainer(
                accelerator=arguments["accelerator"],
                devices=1,
                max_epochs=arguments["epochs"],
                plugins=[AtomicCheckpointIO()],
                callbacks=[KeepLastAndBest(checkpoints), *([Progress(advance)] if advance else [])],
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                use_distributed_sampler=False,
                num_sanity_val_steps=0,
                default_root_dir=checkpoints.parent,
            )
            trainer.fit(module, *loaders, ckpt_path=checkpoints / LAST if state else None, weights_only=True)
    network.load_state_dict(read_checkpoint(checkpoints / BEST)["state_dict"])
    network.cpu().eval()
    return module.history


@torch.inference_mode()
def _test(network: Network, loader: Any, groups: list[str]) -> dict[str, Any]:
    from vitalloy.applications.deepfake.training_loop import in_a_row

    labels, scores = [], []
    for batch in loader:
        images, targets = in_a_row(batch)
        scores.append(network(images).softmax(1)[:, FAKE].double().numpy())
        labels.append(targets.numpy() == FAKE)
    of_pairs = np.repeat(groups, sum(map(len, scores)) // len(groups))  # an item may be a pair
    return frame_metrics(np.concatenate(labels), np.concatenate(scores), of_pairs)


def _write(path: Path, content: dict[str, Any]) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(part, path)

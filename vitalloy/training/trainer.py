"""`train`: from a model, data and a resolved recipe to the best weights; a killed run resumes from its checkpoints.

Lightning does the work (devices, DDP and FSDP under torchrun, precision, loggers); this file puts its parts together
and turns what can go wrong into messages.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from vitalloy.data import eval_transform, make_loader, train_transform
from vitalloy.data.transforms import SMALL
from vitalloy.errors import RecipeError, TrainingError
from vitalloy.training.checkpointing import BEST, LAST, AtomicCheckpointIO, KeepLastAndBest, read_checkpoint
from vitalloy.training.loop import Classifier, seed_epoch
from vitalloy.training.recipe import Recipe

if TYPE_CHECKING:
    from vitalloy.data import Splits

log = logging.getLogger("vitalloy")
# choices that may differ between the parts of a resumed run without changing what is computed
FREE_TO_CHANGE = {"data", "download", "weights", "teacher", "num_workers", "calibrate", "export", "int8"} | {
    *("explain_images", "corruptions", "corruption_severity", "budget")
}


@dataclass(frozen=True)
class TrainResult:
    """What a training run leaves beside the model.

    history: a row an epoch: epoch (from 0), train_loss, val_loss, val_top1, lr, seconds; best_epoch and best_top1 (a
    fraction): those whose weights the model now holds; weights: "ema" (averaged) or "raw".
    """

    history: list[dict[str, Any]]
    best_epoch: int
    best_top1: float
    stopped_early: bool
    weights: str


def transforms(recipe: Recipe, native_size: tuple[int, int]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The training and the evaluation transform of a resolved recipe, for images of `native_size` (height, width)."""
    size = recipe.img_size if isinstance(recipe.img_size, tuple) else (recipe.img_size, recipe.img_size)
    common = {
        "mean": recipe.mean,
        "std": recipe.std,
        "interpolation": recipe.interpolation,
        "small": max(native_size) <= SMALL,
    }
    training = train_transform(
        size,
        flip=recipe.hflip,
        randaugment=recipe.randaugment,
        crop_scale=recipe.crop_scale,
        color_jitter=recipe.color_jitter,
        random_erasing=recipe.random_erasing,
        **common,
    )
    return training, eval_transform(size, crop_pct=recipe.crop_pct, **common)


def train(
    model: nn.Module,
    splits: Splits,
    recipe: Recipe,
    folder: str | Path,
    *,
    resume: bool = False,
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
    teacher: nn.Module | None = None,
) -> TrainResult:
    """Train `model` on `splits.train`, choose the best epoch on `splits.val`, and leave the best weights in `model`.

    Args:
        model: answers images (B, C, H, W) with logits (B, classes); trained in place.
        splits: image sets without a transform get the recipe's; the test images are not touched.
        recipe: resolved (`Recipe.resolve`).
        folder: gets `checkpoints/last.ckpt` (all that a resume needs), `checkpoints/best.ckpt` and `logs/`.
        resume: go on from `checkpoints/last.ckpt`; a run that had ended is only read back.
        progress: show a bar.
        callbacks: Lightning callbacks to add.
        teacher: for distillation; sees the same images, answers the same classes.

    Raises:
        TrainingError: the loss is no number, the disk is full, memory runs out, or the run was interrupted.
    """
    folder = Path(folder)
    checkpoints = folder / "checkpoints"
    # FSDP cuts the module that it trains to pieces, so it gets a copy; the best weights go into `model`
    trained = copy.deepcopy(model) if recipe.strategy == "fsdp" else model
    module = Classifier(trained, recipe, len(splits.classes), splits.train.describe, teacher)
    start = _resume_point(checkpoints, recipe, module) if resume else None
    if resume and (module.stopped_early or len(module.history) >= recipe.epochs):
        log.info("The run had ended after epoch %d; nothing is left to train.", len(module.history))
        return _finish(model, module, checkpoints)
    with quiet_lightning(), _numbers(recipe), failures_named(checkpoints):
        trainer = _make_trainer(recipe, folder, progress, callbacks)
        loaders = _make_loaders(splits, recipe, trainer)
        if recipe.grad_checkpointing and hasattr(trained, "set_grad_checkpointing"):
            trained.set_grad_checkpointing(True)
        if recipe.channels_last:
            module.to(memory_format=torch.channels_last)
        if recipe.compile:
            trained.compile()
        trainer.fit(module, *loaders, ckpt_path=start, weights_only=True)
    return _finish(model, module, checkpoints)


def _make_trainer(recipe: Recipe, folder: Path, progress: bool, callbacks: Sequence[Callback]) -> pl.Trainer:
    watching: list[Callback] = [KeepLastAndBest(folder / "checkpoints")]
    if recipe.patience:
        watching.append(EarlyStopping("val_top1", mode="max", patience=recipe.patience, strict=False))
    bar = progress and sys.stderr.isatty()
    watching.append(RichProgressBar(leave=False) if bar else _Lines(progress))
    try:
        return pl.Trainer(
            accelerator=recipe.accelerator,
            devices=recipe.devices,
            num_nodes=recipe.num_nodes,
            strategy={"single": "auto"}.get(recipe.strategy, recipe.strategy),
            precision=recipe.precision,
            max_epochs=recipe.epochs,
            accumulate_grad_batches=recipe.accumulate,
            gradient_clip_val=recipe.grad_clip or None,
            # on CUDA a few operations of common models have no deterministic form: those warn instead of failing
            deterministic=("warn" if recipe.accelerator == "gpu" else True) if recipe.deterministic else False,
            logger=TensorBoardLogger(folder, name="logs", version=""),
            plugins=[AtomicCheckpointIO()],
            callbacks=[*callbacks, *watching],
            enable_checkpointing=True,
            enable_progress_bar=bar,
            enable_model_summary=False,
            use_distributed_sampler=False,  # the loader's own sampler knows the ranks
            num_sanity_val_steps=0,
            log_every_n_steps=10,
            default_root_dir=folder,
        )
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        raise RecipeError(
            f"This machine cannot train with accelerator = {recipe.accelerator!r}, devices = {recipe.devices}, "
            f"strategy = {recipe.strategy!r}, precision = {recipe.precision!r}: {error} "
            "Set them to 'auto' to take what is here."
        ) from error


def _make_loaders(splits: Splits, recipe: Recipe, trainer: pl.Trainer) -> tuple[Any, Any]:
    learning, judging = transforms(recipe, splits.native_size)
    common = {
        "seed": recipe.seed,
        "workers": recipe.num_workers,
        "rank": trainer.global_rank,
        "world": trainer.world_size,
        "pin_memory": recipe.accelerator == "gpu",
    }
    sets = [
        images if images.transform is not None else images.with_transform(transform)
        for images, transform in ((splits.train, learning), (splits.val, judging))
    ]
    return tuple(
        make_loader(images, recipe.batch_size, train=first, **common)
        for images, first in zip(sets, (True, False), strict=True)
    )


def _resume_point(checkpoints: Path, recipe: Recipe, module: Classifier) -> Path | None:
    """The checkpoint to go on from, or None to begin; `module` gets its history."""
    path = checkpoints / LAST
    if not path.exists():
        log.info("No epoch had been finished in %s; training begins anew.", checkpoints.parent)
        return None
    content = read_checkpoint(path)
    module.history, module.stopped_early = content.get("history", []), content.get("stopped_early", False)
    before, now = content.get("recipe", {}), recipe.model_dump(mode="json")
    changed = [k for k in now if k in before and before[k] != now[k] and k not in FREE_TO_CHANGE]
    if changed:
        log.warning(
            "The run is resumed with another recipe and will not end in the weights of an unbroken one. Changed: %s.",
            ", ".join(f"{k} ({before[k]} -> {now[k]})" for k in changed),
        )
    return path


def _finish(model: nn.Module, module: Classifier, checkpoints: Path) -> TrainResult:
    """Put the best weights into the model and sum up."""
    content = read_checkpoint(checkpoints / BEST)
    model.load_state_dict(content["state_dict"])
    model.to("cpu").eval()
    best = content["epoch"], content["val_top1"]
    return TrainResult(list(module.history), *best, module.stopped_early, content["weights"])


class _Lines(Callback):
    """A line an epoch to the log, where there is no terminal to draw a bar on."""

    def __init__(self, on: bool):
        self.level = logging.INFO if on else logging.DEBUG

    def on_train_end(self, trainer: pl.Trainer, module: Classifier) -> None:
        self._say(module, trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, module: Classifier) -> None:
        self._say(module, trainer)

    def _say(self, module: Classifier, trainer: pl.Trainer) -> None:
        if module.history and trainer.is_global_zero:
            log.log(
                self.level,
                "epoch %(epoch)d: train loss %(train_loss).3f, val loss %(val_loss).3f, val top-1 %(val_top1).4f "
                "(%(seconds).1f s)",
                {**module.history[-1], "epoch": len(module.history)},
            )


@contextlib.contextmanager
def _numbers(recipe: Recipe) -> Iterator[None]:
    """The recipe's threads and determinism while training; what was set before comes back after."""
    threads, fixed = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    fill, benchmark = torch.utils.deterministic.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    torch.set_num_threads(recipe.threads)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it guards against reading what was never written
    seed_epoch(recipe.seed, 0)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(fixed)
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.backends.cudnn.benchmark = benchmark


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Without Lightning's remarks on hardware, workers and loggers, which are settled here."""
    chatty = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [(logger, logger.level) for logger in chatty]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning.*")
        warnings.filterwarnings("ignore", message=".*(num_workers|lr_scheduler.step|isinstance.treespec).*")
        for logger in chatty:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in levels:
                logger.setLevel(level)


@contextlib.contextmanager
def failures_named(checkpoints: Path) -> Iterator[None]:
    """Interruption, lack of memory and lack of disk as messages that say how to go on."""
    interrupt = signal.getsignal(signal.SIGINT)
    before = checkpoints / LAST

    def go_on() -> str:
        return (
            f"{before} is whole; resume the run to go on from there." if before.exists() else "No epoch was finished."
        )

    try:
        yield
    except SystemExit as error:  # Lightning ends the process after Ctrl+C
        raise TrainingError(f"Training was interrupted. {go_on()}") from error
    except KeyboardInterrupt as error:
        raise TrainingError(f"Training was interrupted. {go_on()}") from error
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            "The device ran out of memory. Set a smaller batch_size (with accumulate to keep the step), "
            f"grad_checkpointing = true, or a smaller img_size. {go_on()}"
        ) from error
    except OSError as error:
        named = error.filename if isinstance(error.filename, str | bytes) else checkpoints
        where = os.fsdecode(named)
        raise TrainingError(f"Training stopped: {error.strerror or error} ({where}). {go_on()}") from error
    finally:
        with contextlib.suppress(ValueError):  # only the main thread may; Lightning leaves the signal ignored
            signal.signal(signal.SIGINT, interrupt)

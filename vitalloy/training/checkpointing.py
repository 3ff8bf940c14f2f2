"""Checkpoints that survive: written beside the old one, made durable, then put in its place in one step.

A kill, a power cut or a full disk during a write leaves the previous checkpoint whole. `last.ckpt` holds all that a
resumed run needs; `best.ckpt` holds the best weights alone, the averaged ones if those were validated.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from vitalloy.errors import CheckpointError, TrainingError

LAST, BEST = "last.ckpt", "best.ckpt"


def save_atomically(content: dict[str, Any], path: str | Path) -> None:
    """torch.save to `path` such that `path` is at every moment either the old file or the new one.

    Raises TrainingError where the disk is full or cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(draft, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
        _make_durable(path.parent)
    except (OSError, RuntimeError) as error:
        cause = _system_error(error)
        if cause is None:
            raise
        reason = "the disk is full" if cause.errno == errno.ENOSPC else (cause.strerror or str(cause))
        kept = f"The checkpoint before it is whole: {path}." if path.exists() else "There is none before it."
        raise TrainingError(
            f"The checkpoint {path} could not be written: {reason}. {kept} "
            f"Make room in {path.parent}, then resume the run."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint file as a dictionary, tensors on the CPU; no code in it is run."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"There is no checkpoint {path}.") from None
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"The checkpoint {path} is damaged or is no checkpoint: {first}") from None


def _make_durable(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _system_error(error: BaseException | None) -> OSError | None:
    """The operating system's error behind `error`; PyTorch's zip writer may raise its own on top of it."""
    while error is not None:
        if isinstance(error, OSError):
            return error
        error = error.__cause__ or error.__context__
    return None


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's reader and writer of checkpoints, with the writing above."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        save_atomically(checkpoint, path)


class KeepLastAndBest(Checkpoint):
    """Writes `last.ckpt` after each epoch, and `best.ckpt` when the epoch was the best.

    Which epoch is best is read from the module's history, so it survives a resume and a moved run folder; of epochs
    with one accuracy the one with the lower validation loss is better, which matters for small validation sets.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.sanity_checking or trainer.fast_dev_run:
            return
        module.stopped_early = bool(trainer.should_stop)  # the early stop has been decided by now
        if module.history and best_row(module.history) is module.history[-1]:
            state = module.weights_to_keep()  # every process takes part: the weights may be split between them
            if trainer.is_global_zero:
                row = module.history[-1]
                content = {"state_dict": state, "weights": module.kept_kind, **row}
                save_atomically(content, self.folder / BEST)
        trainer.save_checkpoint(self.folder / LAST)


def best_row(history: list[dict[str, Any]]) -> dict[str, Any]:
    """The epoch with the highest validation accuracy; of equal ones the lowest validation loss, then the first."""
    return max(history, key=lambda row: (row["val_top1"], -row["val_loss"]))

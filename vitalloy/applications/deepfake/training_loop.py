"""The training loop of GenConViT's networks, as a Lightning module with its callbacks; `training.train` runs it.

What happens in an epoch depends on the seed, the epoch and the weights at its start, and on nothing else.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from torch import Tensor

from vitalloy.applications.deepfake.model import Network, loss_a, loss_b
from vitalloy.errors import TrainingError
from vitalloy.training.checkpointing import BEST, LAST, save_atomically
from vitalloy.training.loop import seed_epoch

log = logging.getLogger("vitalloy")


def in_a_row(batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Faces (B, 3, S, S) and labels (B,) of a batch whose items are faces or pairs of them."""
    images, labels, _ = batch
    return (images, labels) if labels.ndim == 1 else (images.flatten(0, 1), labels.flatten())


class Detector(pl.LightningModule):
    """Trains network A or B; batches are (normalized faces, labels, indices).

    arguments: those of `training.train`, kept in the checkpoints.
    """

    def __init__(self, network: Network, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.network, self.arguments = network, arguments
        self.history: list[dict[str, Any]] = []

    def on_train_epoch_start(self) -> None:
        seed_epoch(self.arguments["seed"], self.current_epoch)
        self._began, self._rate = time.monotonic(), self.trainer.optimizers[0].param_groups[0]["lr"]
        self._sums = {part: torch.zeros(3, dtype=torch.float64) for part in ("train", "val")}

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self._loss("train", batch)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"The loss is {float(loss)} in epoch {self.current_epoch + 1}, at learning rate {self._rate:.3g}. "
                "Try a lower lr."
            )
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        self._loss("val", batch)

    def _loss(self, part: str, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        images, labels = in_a_row(batch)
        outputs = self.network(images, reconstruction=True)
        if self.network.net == "a":
            loss = loss_a(outputs.logits, labels)
        else:
            loss = loss_b(outputs, labels, images, self.arguments["kl_weight"])
        right = (outputs.logits.detach().argmax(1) == labels).sum()
        self._sums[part] += torch.tensor([float(loss.detach()) * len(labels), float(right), len(labels)])
        return loss

    def on_train_epoch_end(self) -> None:  # the validation is over by now
        row: dict[str, Any] = {"epoch": self.current_epoch}
        for part, (loss, right, seen) in self._sums.items():
            row |= {f"{part}_loss": float(loss / seen), f"{part}_accuracy": float(right / seen)}
        row |= {"lr": self._rate, "seconds": time.monotonic() - self._began}
        if not math.isfinite(row["val_loss"]):
            raise TrainingError(f"The validation loss is no number after epoch {row['epoch'] + 1}. Try a lower lr.")
        self.history = [*self.history, row]
        log.info(
            "epoch %d: train loss %.4f, accuracy %.3f; validation loss %.4f, accuracy %.3f (%.1f s)",
            *(row["epoch"] + 1, row["train_loss"], row["train_accuracy"], row["val_loss"], row["val_accuracy"]),
            row["seconds"],
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["history"], checkpoint["arguments"] = self.history, self.arguments

    def configure_optimizers(self) -> dict[str, Any]:
        chosen = self.arguments
        trained = [weight for weight in self.network.parameters() if weight.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=chosen["lr"], weight_decay=chosen["weight_decay"])
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, chosen["step"], chosen["gamma"])
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class KeepLastAndBest(Checkpoint):
    """`last.ckpt` after each epoch; `best.ckpt`, the weights alone, when its validation loss was the lowest."""

    def __init__(self, folder: Any) -> None:
        self.folder = folder

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Detector) -> None:
        if min(module.history, key=lambda row: row["val_loss"]) is module.history[-1]:
            state = {name: value.detach().cpu() for name, value in module.network.state_dict().items()}
            save_atomically({"state_dict": state, **module.history[-1]}, self.folder / BEST)
        trainer.save_checkpoint(self.folder / LAST)


class Progress(Callback):
    """Tells `advance` how many batches of all epochs are done."""

    def __init__(self, advance: Callable[[str, int, int], None]) -> None:
        self.advance = advance

    def on_train_batch_end(self, trainer: pl.Trainer, module: Detector, outputs: Any, batch: Any, batch_idx: int):
        batches = trainer.num_training_batches
        self.advance("training", trainer.current_epoch * batches + batch_idx + 1, trainer.max_epochs * batches)

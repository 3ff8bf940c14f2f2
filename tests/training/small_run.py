"""A training run of a few seconds on real digits, shared by the tests and started by them as a process of its own."""

import os
import signal
import sys

import vitalloy  # noqa: F401  isort: skip  it lets torchvision import beside a CPU PyTorch
import timm
import torch
from lightning.pytorch.callbacks import Callback

from vitalloy.data import ImageSet, Splits, load_data
from vitalloy.training.recipe import Recipe
from vitalloy.training.trainer import TrainResult, train

QUICK = {"threads": 1, "num_workers": 0, "accelerator": "cpu", "img_size": 16, "batch_size": 32, "epochs": 4}


def digits(train: int = 160, val: int = 60) -> Splits:
    whole = load_data("digits")
    parts = whole.train.subset(range(train)), whole.val.subset(range(val)), whole.test.subset(range(val))
    return Splits(whole.name, whole.classes, *parts, whole.native_size, whole.flip)


def tiny_vit(**options) -> torch.nn.Module:
    torch.manual_seed(0)
    size = {"img_size": 16, "patch_size": 4, "depth": 2, "embed_dim": 32, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=10, **size, **options)


def recipe(splits: Splits | None = None, **choices) -> Recipe:
    images = len(splits.train) if splits else 160
    return Recipe(**{**QUICK, **choices}).resolve(images, 10, (8, 8), False)


def whole(images: ImageSet) -> list[str]:
    return [images.describe(i) for i in range(len(images))]


class KillAt(Callback):
    def __init__(self, epoch: int, batch: int):
        self.at = (epoch, batch)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def mixed_run(folder: str, *, resume: bool = False, callbacks=()) -> tuple[torch.nn.Module, TrainResult]:
    """With everything on that is random or has a memory: mixing, dropout, stochastic depth, averaging."""
    splits = digits()
    model = tiny_vit(drop_path_rate=0.1, proj_drop_rate=0.1)
    choices = recipe(splits, mixup=0.4, cutmix=1.0, ema=True, ema_decay=0.9, randaugment=5)
    return model, train(model, splits, choices, folder, resume=resume, progress=False, callbacks=callbacks)


def shared_run(folder: str) -> None:
    """Under torchrun: each process writes what it was left with."""
    splits = digits()
    open_choices = QUICK | {"epochs": 1, "batch_size": 16, "ema": True}
    settled = Recipe(**open_choices).resolve(len(splits.train), 10, splits.native_size, splits.flip)
    model = tiny_vit()
    result = train(model, splits, settled, folder, progress=False)
    left = {"state": model.state_dict(), "history": result.history, "strategy": settled.strategy}
    torch.save(left, f"{folder}/left.{os.environ['RANK']}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    how, folder = sys.argv[1:3]
    if how == "killed":
        mixed_run(folder, callbacks=[KillAt(2, 2)])
    elif how == "resumed":
        mixed_run(folder, resume=True)
    else:
        shared_run(folder)

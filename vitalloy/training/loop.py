"""The training loop of a classifier, as a Lightning module.

What happens in an epoch is a function of (seed, epoch) and of the weights at its start: the random number generators
are set anew at each epoch, so a run that was killed and resumed from its last epoch ends with the very same weights.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from vitalloy.errors import RecipeError, TrainingError
from vitalloy.training.objectives.distillation.deit import DistillationLoss
from vitalloy.training.objectives.supervised import SupervisedLoss, full_precision, soft_targets
from vitalloy.training.recipe import Recipe

NAMED = 8  # samples that an error message lists


class Classifier(pl.LightningModule):
    """Trains `model` by a resolved `recipe`; batches are (images, labels, indices).

    describe: index of a training sample -> its file, for messages. teacher: a model of the same classes, frozen here.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        num_classes: int,
        describe: Callable[[int], str] = str,
        teacher: nn.Module | None = None,
    ):
        super().__init__()
        if recipe.automatic:
            raise RecipeError(f"The recipe is not resolved: {', '.join(recipe.automatic)}.")
        self.model, self.recipe, self.num_classes, self.describe = model, recipe, num_classes, describe
        self.history: list[dict[str, Any]] = []
        self.stopped_early = False
        self.probed = _freeze_all_but_classifier(model) if recipe.probe else None
        self.average = None
        if recipe.ema:  # frozen: DDP waits for the gradient of every parameter that asks for one
            self.average = ModelEmaV3(model, decay=recipe.ema_decay, use_warmup=True).requires_grad_(False)
        self.mixing = _mixing(recipe, num_classes)
        self.loss = SupervisedLoss(recipe.label_smoothing)
        self._teacher: list[nn.Module] = []  # in a list, so that its weights stay out of the checkpoints
        if recipe.distillation != "none":
            self._accept(teacher)

    def _accept(self, teacher: nn.Module | None) -> None:
        if teacher is None:
            raise RecipeError("The recipe distils: give `train` the teacher module.")
        self._teacher = [teacher.eval().requires_grad_(False)]
        self.loss = DistillationLoss(
            self.recipe.distillation,
            self.recipe.distillation_alpha,
            self.recipe.distillation_tau,
            self.recipe.label_smoothing,
        )
        if hasattr(self.model, "set_distilled_training"):  # timm's name for "return both answers in training"
            self.model.set_distilled_training(True)

    # ---- what the rest of the library takes from here

    @property
    def kept_kind(self) -> str:
        """Which weights are validated and kept: "ema" or "raw"."""
        return "raw" if self.average is None else "ema"

    def weights_to_keep(self) -> dict[str, Tensor]:
        """The state dict of the model as it was validated, on the CPU."""
        prefix = "model." if self.average is None else "average.module."
        state = self.trainer.strategy.lightning_module_state_dict()
        return {k.removeprefix(prefix): v.detach().cpu() for k, v in state.items() if k.startswith(prefix)}

    # ---- the loop

    def train(self, mode: bool = True) -> Classifier:
        super().train(mode)
        if self.average is not None:
            self.average.eval()
        if self.probed is not None:  # a frozen backbone keeps its norm statistics too
            self.model.eval()
            for part in self.probed:
                part.train(mode)
        return self

    def on_fit_start(self) -> None:
        for teacher in self._teacher:
            teacher.to(self.device)
        self._updates = self.global_step

    def on_train_epoch_start(self) -> None:
        seed_epoch(self.recipe.seed, self.current_epoch, self.global_rank)
        self.train()
        self._started, self._losses, self._seen = time.monotonic(), torch.zeros((), device=self.device), 0

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels, indices = batch
        images = self._layout(images)
        mixed, target = self._mix(images, labels)
        outputs = self.model(mixed)
        if self._teacher:
            with torch.no_grad():
                lesson = self._teacher[0](mixed)
            loss = self.loss(outputs, target, lesson)
        else:
            loss = self.loss(outputs, target)
        if not torch.isfinite(loss):
            raise TrainingError(self._lost(float(loss.detach()), outputs, mixed, indices))
        self._losses += loss.detach() * len(labels)
        self._seen += len(labels)
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=len(labels))
        self.log("lr", self._rate(), batch_size=1)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.average is not None and self.global_step > self._updates:  # not while gradients are gathered
            self.average.update(self.model, step=self.global_step)
        self._updates = self.global_step

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        images, labels, _ = batch
        model = self.model if self.average is None else self.average.module
        outputs = model(self._layout(images))
        logits = full_precision(_one_answer(outputs))
        loss = nn.functional.cross_entropy(logits, labels)
        top1 = (logits.argmax(dim=1) == labels).float().mean()
        values = {"val_loss": loss, "val_top1": top1}
        self.log_dict(values, on_epoch=True, prog_bar=True, batch_size=len(labels), sync_dist=True)

    def on_train_epoch_end(self) -> None:
        metrics = self.trainer.callback_metrics
        sums = torch.stack([self._losses.double().cpu(), torch.tensor(float(self._seen)).double()])
        loss, seen = self._over_all(sums).tolist()
        row = {
            "epoch": self.current_epoch,
            "train_loss": loss / max(seen, 1),
            "val_loss": float(metrics.get("val_loss", math.nan)),
            "val_top1": round(float(metrics.get("val_top1", math.nan)), 6),  # float32 until here
            "lr": self._rate(),
            "seconds": time.monotonic() - self._started,
        }
        if not math.isfinite(row["val_loss"]):
            raise TrainingError(
                f"The validation loss is {row['val_loss']} after epoch {self.current_epoch + 1} (learning rate "
                f"{row['lr']:.3g}). {self._mend()}"
            )
        self.history = [r for r in self.history if r["epoch"] < self.current_epoch] + [row]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["history"], checkpoint["stopped_early"] = self.history, self.stopped_early
        checkpoint["recipe"] = self.recipe.model_dump(mode="json")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.history = list(checkpoint.get("history", []))

    # ---- the optimizer and its schedule

    def configure_optimizers(self) -> dict[str, Any]:
        recipe = self.recipe
        optimizer = make_optimizer(self.model, recipe)
        total = int(self.trainer.estimated_stepping_batches)
        warmup = min(recipe.warmup_epochs / recipe.epochs, 0.5) * total
        floor = recipe.min_lr / recipe.lr
        factor = lr_factor(recipe.scheduler, total, warmup, floor)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        whole = self.trainer.strategy.model
        if gradient_clip_val and hasattr(whole, "clip_grad_norm_"):  # a sharded model knows the norm of all its parts
            whole.clip_grad_norm_(gradient_clip_val)
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    # ---- details

    def _layout(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=torch.channels_last) if self.recipe.channels_last else images

    def _mix(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mixup and cutmix over pairs of the batch; the odd one out stays as it is."""
        even = len(images) // 2 * 2
        if self.mixing is None or even == 0:
            return images, labels
        mixed, target = self.mixing(images[:even].clone(), labels[:even])
        rest = soft_targets(labels[even:], self.num_classes, self.recipe.label_smoothing)
        return torch.cat([mixed, images[even:]]), torch.cat([target, rest])

    def _rate(self) -> float:
        return max(group["lr"] for group in self.trainer.optimizers[0].param_groups)

    def _over_all(self, sums: Tensor) -> Tensor:
        if self.trainer.world_size == 1:
            return sums
        return self.trainer.strategy.reduce(sums.to(self.device), reduce_op="sum")

    def _lost(self, loss: float, outputs: Any, images: Tensor, indices: Tensor) -> str:
        """The message for a loss that is not finite: where it happened and which samples to look at."""
        bad = ~images.flatten(1).isfinite().all(dim=1)
        where = "These images hold values that are no numbers"
        if not bad.any():
            bad = ~_one_answer(outputs).isfinite().all(dim=1)
            where = "The model's answers are no numbers for"
        if not bad.any() or bad.all():
            bad, where = torch.ones_like(bad), "The batch held"
        names = [self.describe(int(i)) for i in indices[bad][:NAMED]]
        more = int(bad.sum()) - len(names)
        return (
            f"The loss is {loss} in epoch {self.current_epoch + 1}, step {self.global_step}, "
            f"at learning rate {self._rate():.3g}. {where}: {', '.join(names)}"
            f"{f' and {more} more' if more else ''}. {self._mend()}"
        )

    def _mend(self) -> str:
        tips = ["a lower `lr`", "a longer `warmup_epochs`"]
        if "16" in self.recipe.precision:
            tips.append("`precision = '32-true'`")
        kept = "The checkpoint of the last whole epoch is good. " if self.history else ""
        return f"{kept}Try {' or '.join(tips)}."


def seed_epoch(seed: int, epoch: int, rank: int = 0) -> None:
    """Set Python's, NumPy's and PyTorch's generators to a state that depends on nothing else."""
    state = np.random.SeedSequence([seed, epoch, rank]).generate_state(3)
    random.seed(int(state[0]))
    np.random.seed(int(state[1]))
    torch.manual_seed(int(state[2]))


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """timm's optimizer by name; no weight decay for biases, norms and what `model.no_weight_decay()` names.

    With `layer_decay`, each group's rate is scaled by its distance from the output (`model.group_matcher`).
    """
    extra: dict[str, Any] = {}
    if "adam" in recipe.optimizer.lower():
        extra["betas"] = tuple(recipe.betas)
    try:
        optimizer = create_optimizer_v2(
            model,
            opt=recipe.optimizer,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            layer_decay=recipe.layer_decay,
            **extra,
        )
    except (ValueError, AssertionError, TypeError) as error:
        raise RecipeError(f"The optimizer {recipe.optimizer!r} cannot be made: {error}.") from error
    for group in optimizer.param_groups:
        group["lr"] = recipe.lr * group.get("lr_scale", 1.0)
    return optimizer


def lr_factor(kind: str, total: int, warmup: float, floor: float) -> Callable[[int], float]:
    """Update number -> share of the peak learning rate: a linear rise over `warmup`, then the fall to `floor`."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        part = min(1.0, (step - warmup) / max(1.0, total - warmup))
        fall = {"cosine": 0.5 * (1 + math.cos(math.pi * part)), "linear": 1 - part, "constant": 1.0}[kind]
        return floor + (1 - floor) * fall

    return factor


def _mixing(recipe: Recipe, num_classes: int) -> Mixup | None:
    if not recipe.mixup and not recipe.cutmix:
        return None
    return Mixup(
        mixup_alpha=recipe.mixup,
        cutmix_alpha=recipe.cutmix,
        prob=recipe.mixup_prob,
        switch_prob=recipe.mixup_switch_prob,
        label_smoothing=recipe.label_smoothing,
        num_classes=num_classes,
    )


def _freeze_all_but_classifier(model: nn.Module) -> list[nn.Module]:
    heads = model.get_classifier() if hasattr(model, "get_classifier") else None
    heads = [h for h in (heads if isinstance(heads, tuple | list) else [heads]) if h is not None]
    if not any(True for h in heads for _ in h.parameters()):
        raise RecipeError("A linear probe trains the classifier, and this model has none: give it num_classes.")
    model.requires_grad_(False)
    for head in heads:
        head.requires_grad_(True)
    return heads


def _one_answer(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The prediction of a model that answers with one tensor, or the mean of a pair."""
    return outputs if isinstance(outputs, Tensor) else torch.stack(list(outputs)).mean(dim=0)

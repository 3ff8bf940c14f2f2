"""How a recipe's open choices are made: from the images, the start (new, fine-tuned or frozen weights) and the machine.

The amounts of augmentation and the learning rates are those that small and medium data sets need; the large end
follows the settings of DeiT (arXiv 2012.12877). A rule is one line, so that it can be read and disputed.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from vitalloy.training.recipe import Recipe

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALL = 64  # pixels: below it an image is an icon, not a photograph
FEW, MANY = 5_000, 100_000  # training images

# start -> (steps that a run should have, fewest epochs, most epochs)
LENGTH = {"scratch": (600, 30, 100), "finetune": (400, 5, 30), "probe": (400, 5, 30)}
# start -> learning rate of AdamW at 64 images a step; it grows with the root of the batch up to 2.25 times
RATE = {"scratch": 1e-3, "finetune": 1e-4, "probe": 3e-3}
# what other optimizers' rates are to AdamW's
RATE_FACTOR = {"sgd": 50.0, "momentum": 50.0, "nesterov": 50.0, "lion": 0.2, "lamb": 4.0, "adan": 1.0, "muon": 10.0}
ALPHA = {"none": 0.5, "hard": 0.5, "soft": 0.1}


@dataclass(frozen=True)
class Facts:
    """What is known of the data and the model."""

    images: int
    classes: int
    native_size: tuple[int, int]
    flip: bool
    config: dict[str, Any]

    @property
    def small(self) -> bool:
        return max(self.native_size) <= SMALL


@dataclass(frozen=True)
class Machine:
    """What is known of the machine."""

    accelerator: str  # cpu | gpu | mps
    bf16: bool = False
    cores: int = 1
    devices: int = 1
    nodes: int = 1


def this_machine(accelerator: str = "auto") -> Machine:
    """The machine this runs on; torchrun's variables say how many processes and machines share the work."""
    if accelerator == "auto":
        mps = torch.backends.mps.is_available()
        accelerator = "gpu" if torch.cuda.is_available() else "mps" if mps else "cpu"
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    world = int(os.environ.get("WORLD_SIZE", local)) if "LOCAL_WORLD_SIZE" in os.environ else local
    bf16 = accelerator == "gpu" and torch.cuda.is_available() and torch.cuda.is_bf16_supported(False)
    return Machine(accelerator, bf16, max(1, torch.get_num_threads()), local, max(1, world // local))


def model(native_size: tuple[int, int]) -> str:
    return "cvt_nano" if max(native_size) <= SMALL else "cvt_13"


def settle(recipe: Recipe, facts: Facts, machine: Machine) -> Recipe:
    """The recipe with every "auto" replaced; choices that others rest on are made first."""
    start = "probe" if recipe.probe else "finetune" if recipe.weights or recipe.pretrained else "scratch"
    chosen: dict[str, Any] = {}

    def choose(name: str, value: Any) -> Any:
        given = getattr(recipe, name)
        chosen[name] = value if given == "auto" else given
        return chosen[name]

    choose("model", model(facts.native_size))
    _machine(recipe, facts, machine, choose)
    _image(recipe, facts, choose)
    steps = _schedule(recipe, facts, start, chosen, choose)
    averages = start != "probe" and steps >= 200 and chosen["strategy"] != "fsdp"
    choose("ema", averages)
    choose("ema_decay", round(min(max(1 - 10 / max(steps, 1), 0.9), 0.9999), 6))  # looks back over a tenth of the run
    _augmentation(facts, start, choose)
    choose("distillation_alpha", ALPHA[recipe.distillation])
    return recipe.with_overrides(chosen)


def _machine(recipe: Recipe, facts: Facts, machine: Machine, choose: Any) -> None:
    on = choose("accelerator", machine.accelerator)
    devices, nodes = choose("devices", machine.devices), choose("num_nodes", machine.nodes)
    choose("strategy", "ddp" if devices * nodes > 1 else "single")
    choose("precision", "32-true" if on != "gpu" else "bf16-mixed" if machine.bf16 else "16-mixed")
    choose("channels_last", on == "gpu")
    choose("threads", machine.cores)
    readers = 0 if facts.small and facts.images < FEW else machine.cores - 1 if on == "cpu" else machine.cores
    choose("num_workers", max(0, min(readers, 2 if on == "cpu" else 8)))


def _image(recipe: Recipe, facts: Facts, choose: Any) -> None:
    config, longest = facts.config, max(facts.native_size)
    published = config.get("test_input_size") or config.get("input_size")
    if published and (recipe.pretrained or recipe.weights or config.get("fixed_input_size")):
        size = tuple(published[-2:])
    else:
        side = 224 if longest > SMALL else max(32, math.ceil(longest / 32) * 32)
        size = (side, side)
    choose("img_size", size[0] if size[0] == size[1] else size)
    # fresh weights have no habits: ImageNet's numbers serve as well as any
    for name, usual in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
        values = [float(v) for v in (config.get(name) or usual)]
        if len(values) != recipe.in_chans:
            values = [round(sum(values) / len(values), 6)] * recipe.in_chans
        choose(name, values)
    known = config.get("interpolation")
    choose("interpolation", known if known in ("bicubic", "bilinear", "nearest", "lanczos") else "bicubic")
    choose("crop_pct", 1.0 if facts.small else float(config.get("crop_pct") or 0.9))


def _schedule(recipe: Recipe, facts: Facts, start: str, chosen: dict[str, Any], choose: Any) -> int:
    """Batch, epochs and rates; returns the number of optimizer steps."""
    most = 64 if chosen["accelerator"] != "gpu" else 256 if facts.small else 128
    if not facts.small and chosen["accelerator"] != "gpu":
        most = 32
    fitting = 2 ** int(math.log2(max(facts.images // 16, 1)))  # at least sixteen steps an epoch
    batch = choose("batch_size", max(8, min(fitting, most)))
    step_images = batch * recipe.accumulate * chosen["devices"] * chosen["num_nodes"]
    per_epoch = max(1, facts.images // step_images)
    wanted, fewest, longest = LENGTH[start]
    if start == "scratch" and facts.images >= FEW:  # a long way to go for fresh weights
        fewest = longest if facts.images >= MANY else 30
    epochs = choose("epochs", min(max(math.ceil(wanted / per_epoch), fewest), longest))
    choose("warmup_epochs", round(min(5.0, 0.1 * epochs), 2))
    growth = min(max(math.sqrt(step_images / 64), 0.5), 2.25)
    rate = RATE[start] * growth * RATE_FACTOR.get(recipe.optimizer.lower(), 1.0)
    lr = choose("lr", float(f"{rate:.2g}"))
    choose("min_lr", float(f"{lr / 100:.2g}"))
    choose("patience", max(10, epochs // 2))
    return per_epoch * epochs


def _augmentation(facts: Facts, start: str, choose: Any) -> None:
    frozen, few, many, small = start == "probe", facts.images < FEW, facts.images >= MANY, facts.small
    signs = small and not facts.flip  # digits, letters: shape is all, and a strong change makes another class of it
    choose("drop_path", 0.0 if few or frozen else 0.1)
    choose("mixup", 0.0 if few or frozen else 0.8 if many else 0.2)
    choose("cutmix", 0.0 if few or frozen or signs else 1.0 if many else 0.5)
    choose("randaugment", 0.0 if frozen or signs else 5.0 if few or small else 9.0)
    choose("color_jitter", 0.0 if frozen else 0.4 if small else 0.2)
    choose("random_erasing", 0.0 if few or frozen or signs else 0.25 if many else 0.1)
    choose("hflip", facts.flip)
    least = 0.8 if frozen or signs else 0.6 if small else 0.08 if many else 0.35
    choose("crop_scale", (least, 1.0))

"""The one-shot search: weights are trained under formats that change at every step, and a controller learns which ones.

A step samples a format for every decision, trains the weights one step under them, and rewards the controller for the
quality on that batch against the cost of the sample. The weights are shared by all formats; at the end every decision
keeps its likeliest option, and the weights serve as they are.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitalloy.errors import CompressionError

from .controller import REWARDS, Controller, named
from .costs import CostTable, measure
from .formats import options
from .layers import formats_of, grouped, searchable, set_format

log = logging.getLogger("vitalloy")
Batches = Iterable[tuple[Tensor, Tensor]]
Progress = Callable[[int, int], None]
NO_IMAGES = "There are no training images: `train` gave no batch."
SNAPSHOTS = 100  # of the probabilities, over the whole search


@dataclass
class Found:
    """What a search found.

    Attributes:
        formats: name of the layer -> format (the bit map).
        cost, target, reach: the cost of that map, the target, and the cheapest and dearest map, all in `unit`.
        average_bits: the width of uniform formats that would cost the same.
        history: one value a step under "loss", "quality", "cost", "reward", "entropy" (mean over the decisions, nats)
            and "entropy_weight"; under "probabilities" about a hundred snapshots (decisions, options), taken at the
            steps under "probabilities_step"; "decisions" and "options" name their axes.
        model: with these formats, after the shared training, in evaluation mode; None when read from a file.
    """

    formats: dict[str, str]
    cost: float
    target: float
    reach: tuple[float, float]
    unit: str
    average_bits: float
    history: dict[str, list[Any]]
    model: nn.Module | None = field(default=None, repr=False, compare=False)

    def save(self, path: str | Path) -> None:
        """Write all but the model as JSON."""
        about = asdict(without_model(self))
        Path(path).write_text(json.dumps(about, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Found:
        """What `save` wrote.

        Raises:
            CompressionError: the file is missing or no such record.
        """
        try:
            about = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(**{**about, "reach": tuple(about["reach"])})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CompressionError(
                f"{path}: no record of a format search ({type(error).__name__}: {error})."
            ) from error


def without_model(found: Found) -> Found:
    """The record alone."""
    return Found(**{**vars(found), "model": None})


class Search:
    """A search that can be stopped and gone on with; `search` is the short way to it.

    Args:
        model: changed in place: its plain linear layers and convolutions get formats and are trained.
        image: (1, C, H, W), by which the work of the layers is measured.
        formats: a preset of `formats.SPACES` or a list such as ["INT4", "INT8"]; "INT4/INT8" gives weights and
            activations their own.
        target: the wanted cost, in GBOPs or MiB; None: the geometric mean of the cheapest and the dearest choice.
        target_bits: instead of `target`: the cost of uniform formats of that many bits.
        cost: "bops", "memory" or "code_compute" (`costs`).
        attention: the format in which attention's two products are counted, as a cost without choice; they compute in
            float. None leaves them out, as the published costs do.
        reward: "tunas_abs", "one_sided_tunas_abs", "soft_exponential" or "hard_exponential"; `beta` is its weight or
            exponent (None: 1 for the first two, -0.07 for the others).
        quality: what is rewarded: "loss", minus the training loss of the batch (the authors' code), or "accuracy", its
            share of right answers (the paper). The exponential rewards need "accuracy".
        steps: training steps in all. delay: steps before the controller starts to learn; None: a tenth of `steps`.
        lr, weight_decay: of AdamW for the weights.
        controller_lr: None: 5e-3 (the authors' command), or more in searches of less than 4000 steps, so that the
            logits have the way to certainty. Short searches tend to end somewhat below the target.
        entropy, entropy_weight: schedule and final weight of the entropy penalty.
        per: "layer", "block", "model" or patterns (`layers.grouped`). exclude: layers to leave in float.
        loss: of logits and labels.
        seed: of sampling, dropout and shuffling by PyTorch's own generator; the global state is not changed.

    Raises:
        CompressionError: an option that does not exist, or a target out of reach.
    """

    def __init__(
        self,
        model: nn.Module,
        image: Tensor,
        *,
        formats: str | Sequence[str] = ("INT4", "INT8"),
        target: float | None = None,
        target_bits: float | None = None,
        cost: str = "bops",
        attention: str | None = None,
        reward: str = "tunas_abs",
        beta: float | None = None,
        quality: str = "loss",
        steps: int = 1000,
        delay: int | None = None,
        lr: float = 5e-5,
        weight_decay: float = 0.01,
        controller_lr: float | None = None,
        entropy: str = "cosine",
        entropy_weight: float = 0.5,
        per: str | Sequence[str] = "layer",
        exclude: Sequence[str] = (),
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        seed: int = 0,
        **scales: Any,
    ) -> None:
        self.reward, self.beta = REWARDS[named(reward, "reward", REWARDS)], {} if beta is None else {"beta": beta}
        self.quality, self.loss, self.seed = named(quality, "quality", ("loss", "accuracy")), loss, seed
        if "exponential" in reward and quality == "loss":
            raise CompressionError(f"{reward} needs a quality above 0: use quality='accuracy'.")
        if steps < 1:
            raise CompressionError(f"A search takes at least one step, not {steps}.")
        self.steps, delay = steps, steps // 10 if delay is None else delay
        if delay >= steps:
            raise CompressionError(f"delay={delay} leaves the controller none of the {steps} steps to learn in.")
        if controller_lr is None:
            controller_lr = max(5e-3, 20 / (steps - delay))
        self.options = options(formats)
        self.model, self.layers = model, searchable(model, exclude, **scales)
        work, attention_macs = measure(model, self.layers, image)
        running = [name for name in self.layers if work[name].macs]
        self.groups = grouped(running, model, per)
        self.costs = CostTable.of(work, self.groups, self.options, cost, attention_macs, attention)
        if target is None and target_bits is not None:
            target = self.costs.uniform(target_bits)
        self.target = self.costs.target(target)
        self.controller = Controller(
            len(self.groups),
            len(self.options),
            steps=steps,
            delay=delay,
            lr=controller_lr,
            entropy=entropy,
            max_entropy_weight=entropy_weight,
        )
        self.optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=weight_decay
        )
        self.device = image.device
        self.generator = torch.Generator().manual_seed(seed)
        self.history: dict[str, list[Any]] = {"decisions": list(self.groups), "options": list(self.options)}
        self._place: dict[str, Any] = {"batch": 0}  # in the epoch, with the generators' states at its start and now

    def run(
        self,
        train: Batches,
        *,
        progress: Progress | None = None,
        checkpoint: str | Path | None = None,
        checkpoint_every: int = 100,
    ) -> Found:
        """Search to the end, from where it stands.

        Args:
            train: batches (images, labels), iterated once an epoch: a DataLoader or a list.
            progress: is told (steps done, steps).
            checkpoint: a file to which the state is written every so many steps.

        Raises:
            CompressionError: no batches, or a loss that is not a number.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            if not self._place["batch"]:
                torch.manual_seed(self.seed)
            for images, labels in self._batches(train):
                self._step(images.to(self.device), labels.to(self.device))
                self._place["now"] = self._states()
                if checkpoint and (self.controller.step % checkpoint_every == 0 or self.controller.step == self.steps):
                    self.save(checkpoint)
                if progress:
                    progress(self.controller.step, self.steps)
        return self.found()

    def _step(self, images: Tensor, labels: Tensor) -> None:
        policy, sampled = self.controller.probabilities(), self.controller.sample(self.generator)
        self.apply(sampled)
        logits = self.model.train()(images)
        loss = self.loss(logits, labels)
        step = self.controller.step
        if not loss.isfinite():
            raise CompressionError(f"The loss is {loss.item()} in step {step + 1}: use a smaller lr.")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        right = (logits.argmax(-1) == labels).float().mean().item() if self.quality == "accuracy" else 0.0
        quality, cost = right if self.quality == "accuracy" else -loss.item(), self.costs.cost(sampled)
        reward = self.reward(quality, cost, self.target, **self.beta)
        update = self.controller.update(sampled, reward)
        row = {"loss": loss.item(), "quality": quality, "cost": cost, "reward": reward}
        for name, value in {**row, "entropy": update.entropy, "entropy_weight": update.entropy_weight}.items():
            self.history.setdefault(name, []).append(value)
        if step % max(self.steps // SNAPSHOTS, 1) == 0 or step + 1 == self.steps:
            self.history.setdefault("probabilities_step", []).append(step)
            self.history.setdefault("probabilities", []).append(policy.tolist())

    def apply(self, choice: Tensor) -> None:
        """Set the layers to an option (decisions,) a decision."""
        for names, option in zip(self.groups.values(), choice.tolist(), strict=True):
            for name in names:
                set_format(self.layers[name], self.options[option])

    def found(self) -> Found:
        """The likeliest formats as things stand, set in the model, which is put into evaluation mode."""
        choice = self.controller.choice()
        self.apply(choice)
        self.model.eval()
        cost = self.costs.cost(choice)
        log.info("Formats found: %.4g %s for a target of %.4g.", cost, self.costs.unit, self.target)
        formats = {name: kind for name, kind in formats_of(self.layers).items() if kind != "float"}
        average = self.costs.average_bits(cost)
        return Found(formats, cost, self.target, self.costs.reach, self.costs.unit, average, self.history, self.model)

    def _batches(self, train: Batches) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches up to the last step. A search that goes on repeats the epoch's shuffling and skips what it had."""
        place, loader = self._place, getattr(train, "generator", None)
        while self.controller.step < self.steps:
            done = place["batch"]
            if done:
                self._restore(place["start"], loader)
            else:
                place["start"] = self._states(loader)
            batches = iter(train)
            for _ in range(done):
                next(batches, None)
            if done:
                self._restore(place["now"])
            for images, labels, *_ in batches:
                place["batch"] += 1
                yield images, labels
                if self.controller.step == self.steps:
                    return
            if not place["batch"]:
                raise CompressionError(NO_IMAGES)
            place["batch"] = 0

    def _states(self, loader: torch.Generator | None = None) -> list[Tensor]:
        cuda = [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        return [torch.get_rng_state(), *cuda, *([loader.get_state()] if loader else [])]

    def _restore(self, states: list[Tensor], loader: torch.Generator | None = None) -> None:
        torch.set_rng_state(states[0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(states[1], self.device)
        if loader:
            loader.set_state(states[-1])

    def save(self, path: str | Path) -> None:
        """Write all that `load` needs to go on: weights, controller, optimizers, generators, history."""
        state = {
            "search": self._about(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "controller": self.controller.state_dict(),
            "generator": self.generator.get_state(),
            "place": self._place,
            "history": self.history,
        }
        part = Path(f"{path}.part")  # a kill while writing leaves the old file
        torch.save(state, part)
        os.replace(part, path)

    def load(self, path: str | Path) -> None:
        """Go on where `save` was called. The search must have been made with the same arguments.

        Raises:
            CompressionError: the file is damaged, or of another search.
        """
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            about = state["search"]
        except Exception as error:  # on damaged bytes the reader fails in every way there is
            raise CompressionError(f"{path}: no checkpoint of a format search ({type(error).__name__}).") from error
        for name, mine in self._about().items():
            if about.get(name) != mine:
                raise CompressionError(
                    f"{path} is of another search: its {name} was {_short(about.get(name))}, now it is {_short(mine)}. "
                    "Delete it, or search with the same arguments."
                )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.controller.load_state_dict(state["controller"])
        self.generator.set_state(state["generator"].cpu())
        self._place = {k: [s.cpu() for s in v] if isinstance(v, list) else v for k, v in state["place"].items()}
        self.history = state["history"]

    def _about(self) -> dict[str, Any]:
        return {
            "decisions": self.groups,
            "formats": list(self.options),
            "target": self.target,
            "steps": self.steps,
            "seed": self.seed,
        }


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 60 else f"{text[:57]}..."


def search(
    model: nn.Module,
    train: Batches,
    *,
    image: Tensor | None = None,
    progress: Progress | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
    **options: Any,
) -> Found:
    """Search a format for every layer of a classifier while it trains.

    Args:
        model: logits (B, classes) from images; changed in place, best from trained weights with folded batch norms.
        train: batches (images, labels), iterated once an epoch: a DataLoader or a list, not a generator.
        image: (1, C, H, W), by which the work of the layers is measured; None: the first of `train`.
        progress: is told (steps done, steps).
        checkpoint: a file for the state of the search, written every `checkpoint_every` steps. If it exists, the search
            goes on from it, to the same result as without the interruption.
        **options: of `Search`: formats, target, cost, reward, steps, delay, lr, controller_lr, entropy, per, exclude...

    With a single format this is quantization-aware training in it.

    Raises:
        CompressionError: an option that does not exist, a target out of reach, no batches, or a loss that is not a
            number.
    """
    if iter(train) is train:
        raise CompressionError("`train` can be iterated only once: give a DataLoader or a list of batches.")
    if image is None:
        with torch.random.fork_rng():
            first = next(iter(train), None)
        if first is None:
            raise CompressionError(NO_IMAGES)
        image = first[0][:1].to(next(model.parameters()))
    made = Search(model, image, **options)
    if checkpoint and Path(checkpoint).exists():
        made.load(checkpoint)
    return made.run(train, progress=progress, checkpoint=checkpoint, checkpoint_every=checkpoint_every)

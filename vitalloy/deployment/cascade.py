"""A model with early exits as a cascade of ONNX files: an image that leaves costs nothing further on.

Each file takes the state of the computation where the one before ended, and returns the logits of the exit at its end
and the next state; the last returns logits alone. Between files the images that leave are taken out of the batch. A
small JSON file says in which order, and when an image leaves.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vitalloy.deployment._common import at_rest, example_batch, reason, written_whole
from vitalloy.deployment.int8 import quantize_onnx
from vitalloy.deployment.onnx import OnnxModel, Verification, opened, saved, traced
from vitalloy.errors import ExportError

ABOUT = "cascade.json"
FEWEST = 32  # images by which a file is quantized, where there are so many


def export_cascade(model: nn.Module, example: torch.Tensor, folder: str | Path, *, opset: int | None = None) -> Path:
    """Write a model with early exits, as it computes in eval mode, as one ONNX file for each stretch between exits.

    Args:
        model: an `EarlyExit`. Exits whose thresholds let nobody leave are left out.
        example: a batch (B, C, H, W) of the image size to export for; its values do not matter.
        folder: where the files go; those of an earlier cascade there are replaced.
        opset: as in `export_onnx`.

    Returns:
        The folder.

    Raises:
        ExportError: the model has no exits, cannot be traced, or the files cannot be written.
    """
    if not callable(getattr(model, "segments", None)):
        raise ExportError(f"{type(model).__name__} has no early exits: use export_onnx.")
    folder = Path(folder)
    state = example_batch(model, example, least=2)
    exits = [exit for exit in range(len(model.heads)) if model.policy.asks(exit)]
    names = []
    for number, segment in enumerate(model.segments(state.shape[1:], exits)):
        graph = traced(segment, opened, state, opset, dynamic_batch=True)
        names.append(f"{number}.onnx")
        saved(graph, folder / names[-1], f"piece {number} of {type(model).__name__}")
        with at_rest(segment):
            state = segment(state)[1] if number < len(exits) else state
    about = {
        "files": names,
        "exits": exits,
        "end": len(model.heads),
        "policy": model.policy.name,
        "thresholds": [model.policy.thresholds[exit] for exit in exits],
        "macs": [model.costs[exit] for exit in [*exits, -1]],
    }
    _describe(folder, about)
    return folder


def quantize_cascade(folder: str | Path, int8_folder: str | Path, images: Any, **options: Any) -> Path:
    """Quantize each file of a cascade to int8, by the images that reach it.

    A file that fewer than 32 images reach is quantized by those that reach the one before.

    Args:
        folder: what `export_cascade` wrote.
        int8_folder: where the int8 files go.
        images: real images as the model takes them: a tensor (N, C, H, W), or batches of them; a hundred or more.
        options: of `quantize_onnx`.

    Returns:
        `int8_folder`.

    Raises:
        ExportError: no cascade there, no images, or images that do not fit.
    """
    cascade, int8_folder = CascadeModel(folder), Path(int8_folder)
    parts = [_array(part) for part in (images.split(FEWEST) if isinstance(images, torch.Tensor) else images)]
    if not parts:
        raise ExportError(f"{folder} cannot be quantized without calibration images: pass at least one batch.")
    state = np.concatenate(parts)
    memory = cascade.policy.start(len(state))
    for number, piece in enumerate(cascade.pieces):
        chunks = [state[start : start + FEWEST] for start in range(0, len(state), FEWEST)]
        quantize_onnx(piece.path, int8_folder / piece.path.name, chunks, **options)
        if number == len(cascade.pieces) - 1:
            break
        results = [cascade.run(number, chunk) for chunk in chunks]
        logits, state = (np.concatenate(column) for column in zip(*results, strict=True))
        reading = cascade.policy.reading(torch.from_numpy(logits))
        gone, memory = cascade.policy.leaving(number, reading, memory)
        if int((~gone).sum()) >= min(FEWEST, len(state)):
            state, memory = state[~gone.numpy()], memory[~gone]
    _describe(int8_folder, cascade.manifest)
    return int8_folder


class CascadeModel:
    """A cascade as a callable: images in, logits out, on ONNX Runtime; called like `OnnxModel`.

    Args:
        folder: what `export_cascade` or `quantize_cascade` wrote.
        threads, providers: as in `OnnxModel`.

    Attributes:
        depths: the exits at which the images of the last call left, (B,), by their numbers in the exported model.
        manifest: what `cascade.json` says.
        policy: when an image leaves; `calibrate` of `vitalloy.compression.tokens.lgvit` sets it, `save` keeps it.

    Raises:
        ExportError: when a file is missing or damaged, or a batch does not fit.
    """

    batch = None  # any number of images

    def __init__(
        self,
        folder: str | Path,
        threads: int | None = None,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ) -> None:
        from vitalloy.compression.tokens.lgvit.policies import Policy

        self.path = Path(folder)
        try:
            self.manifest = json.loads((self.path / ABOUT).read_text())
            self.policy = Policy(self.manifest["policy"], tuple(self.manifest["thresholds"]))
            self._numbers = [*self.manifest["exits"], self.manifest["end"]]
            files, self.trunk_macs = self.manifest["files"], tuple(self.manifest["macs"])
        except FileNotFoundError as error:
            raise ExportError(f"There is no cascade at {self.path}. Export the model first.") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ExportError(f"{self.path / ABOUT} does not describe a cascade: {reason(error)}.") from error
        self.pieces = [OnnxModel(self.path / name, threads, providers, spinning=False) for name in files]
        self._inputs = [piece.session.get_inputs()[0] for piece in self.pieces]
        self.head_macs = (0.0,) * len(self.manifest["exits"])  # each file holds its head
        self.depths: torch.Tensor | None = None

    def __call__(self, images: torch.Tensor | np.ndarray) -> torch.Tensor:
        """Images (B, C, H, W) -> logits (B, classes), on the CPU."""
        logits, self.depths = self.exit_with_depths(images)
        return logits

    @torch.no_grad()
    def exit_with_depths(self, images: torch.Tensor | np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, classes), and the exit at which each image left, (B,)."""
        state = _array(images)
        here, memory = torch.arange(len(state)), self.policy.start(len(state))
        left: list[tuple[torch.Tensor, int, torch.Tensor]] = []  # numbers, exit, logits
        for number in range(len(self.pieces) - 1):
            found, state = self.run(number, state)
            logits = torch.from_numpy(found)
            gone, memory = self.policy.leaving(number, self.policy.reading(logits), memory)
            count = int(gone.sum())
            if count == len(gone):
                left.append((here, number, logits))
                break
            if count:
                left.append((here[gone], number, logits[gone]))
                here, memory, state = here[~gone], memory[~gone], state[~gone.numpy()]
        else:
            left.append((here, -1, torch.from_numpy(self.run(-1, state)[0])))
        numbers, exits, logits = zip(*left, strict=True)
        if len(exits) == 1:
            return logits[0], torch.full_like(numbers[0], self._numbers[exits[0]])
        order = torch.cat(numbers).argsort()
        depths = torch.cat([torch.full_like(n, self._numbers[exit]) for n, exit in zip(numbers, exits, strict=True)])
        return torch.cat(logits)[order], depths[order]

    def every_exit(self, images: torch.Tensor | np.ndarray) -> torch.Tensor:
        """The logits of all exits and of the end, (exits + 1, B, classes); nothing leaves."""
        said, state = [], _array(images)
        for number in range(len(self.pieces)):
            logits, *rest = self.run(number, state)
            said.append(torch.from_numpy(logits))
            state = rest[0] if rest else state
        return torch.stack(said)

    def times(self, image: torch.Tensor) -> tuple[list[float], list[float], None]:
        """Milliseconds for one image (1, C, H, W) up to each exit and the end, heads included; zeros; None."""
        from vitalloy.benchmark import compare

        states = [_array(image)]
        for number in range(len(self.pieces) - 1):
            states.append(self.run(number, states[-1])[1])
        timed = compare(
            {str(n): partial(self.run, n, state) for n, state in enumerate(states)}, repeats=50, budget_s=0.3
        )
        each = [timed[str(number)].median_ms for number in range(len(states))]
        return np.cumsum(each).tolist(), [0.0] * (len(each) - 1), None

    def save(self) -> None:
        """Keep the thresholds of `policy` beside the files."""
        self.manifest = {**self.manifest, "policy": self.policy.name, "thresholds": list(self.policy.thresholds)}
        _describe(self.path, self.manifest)

    def run(self, number: int, state: np.ndarray) -> list[np.ndarray]:
        """What one file returns: [logits, next state], the last one [logits]."""
        try:
            return self.pieces[number].session.run(None, {self._inputs[number].name: state})
        except Exception as error:  # the runtime's own exception types are private
            wanted = ", ".join(map(str, self._inputs[number].shape))
            raise ExportError(
                f"{self.pieces[number].path} takes ({wanted}) and failed on {state.shape}: {reason(error)}."
            ) from error


def verify_cascade(
    model: nn.Module, cascade: str | Path | CascadeModel, batches: Iterable[Any], *, tolerance: float | None = 1e-3
) -> Verification:
    """Hold a cascade against the model it came from, at every exit.

    Args:
        model: the `EarlyExit`, run in eval mode on its own device.
        cascade: the folder, or the cascade already open.
        batches: real images as the model takes them, tensors (B, C, H, W) or tuples that start with one.
        tolerance: the largest difference of a logit, at any exit, that passes; None only measures.

    Returns:
        The largest difference at any exit, and the share of images with the same answer at the same exit.

    Raises:
        ExportError: beyond the tolerance, or without images.
    """
    cascade = cascade if isinstance(cascade, CascadeModel) else CascadeModel(cascade)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    asked = [*cascade.manifest["exits"], len(model.heads)]
    worst, equal, images = 0.0, 0, 0
    with at_rest(model):
        for batch in batches:
            batch = batch[0] if isinstance(batch, (tuple, list)) else batch
            ours, theirs = model.every_exit(batch.to(device))[asked].float().cpu(), cascade.every_exit(batch)
            difference = (ours - theirs).abs().max().item()
            worst = difference if not difference <= worst else worst  # lets a NaN through
            (mine, at), (other, there) = model.exit_with_depths(batch.to(device)), cascade.exit_with_depths(batch)
            same = (mine.argmax(-1).cpu() == other.argmax(-1)) & (at.cpu() == there)
            equal, images = equal + int(same.sum()), images + len(same)
    if images == 0:
        raise ExportError(f"{cascade.path} cannot be verified without images: pass at least one batch.")
    if tolerance is not None and not worst <= tolerance:
        raise ExportError(
            f"{cascade.path} does not compute what {type(model).__name__} computes: logits differ by up to "
            f"{worst:.3g} (tolerance {tolerance:g}), answers and exits agree on {equal} of {images} images."
        )
    return Verification(worst, equal / images, images)


def _array(images: Any) -> np.ndarray:
    images = images[0] if isinstance(images, (tuple, list)) else images
    if isinstance(images, torch.Tensor):
        images = images.detach().cpu().float().numpy()
    return np.ascontiguousarray(images, dtype=np.float32)


def _describe(folder: Path, about: dict[str, Any]) -> None:
    """Write what holds the files together; files of an earlier cascade go."""
    with written_whole(folder / ABOUT) as unfinished:
        unfinished.write_text(json.dumps(about, indent=1) + "\n")
    for file in folder.glob("*.onnx"):
        if file.name not in about["files"] and file.stem.isdigit():
            file.unlink()

"""What every exporter of this room needs: a model at rest, silent tools, whole files or none, and one-line reasons."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from vitalloy.errors import ExportError
from vitalloy.layers.backbone import Backbone
from vitalloy.layers.fusion import fuse


@contextlib.contextmanager
def at_rest(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode without gradients; afterwards every module has its own training flag back."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        for module, mode in training.items():
            module.training = mode


def deployable(model: nn.Module) -> nn.Module:
    """What to write into a file: a copy with norms and scales folded if there is a backbone of ours, else the model."""
    if isinstance(model, Backbone):
        return copy.deepcopy(model).fuse()
    ours = any(isinstance(part, Backbone) for part in model.modules())
    return fuse(copy.deepcopy(model)) if ours else model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop what third-party tools print, warn and log below errors."""
    root, sink = logging.getLogger(), logging.NullHandler()
    level = root.manager.disable
    root.addHandler(sink)  # else `logging.warning` in a tool would install a handler for the whole process
    logging.disable(max(level, logging.WARNING))
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        root.removeHandler(sink)


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path in a scratch folder beside `path`; what is there at the end takes the place of `path` in one step."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.stem}-", dir=path.parent) as scratch:
            unfinished = Path(scratch) / path.name
            yield unfinished
            os.replace(unfinished, path)
    except OSError as error:
        raise ExportError(
            f"{path} could not be written: {error.strerror or reason(error)}. Check the folder and the space."
        ) from error


def example_batch(model: nn.Module, example: torch.Tensor, least: int) -> torch.Tensor:
    """`example` on the model's device, repeated to at least `least` images."""
    if not isinstance(example, torch.Tensor) or example.ndim < 2 or len(example) == 0:
        got = tuple(example.shape) if isinstance(example, torch.Tensor) else type(example).__name__
        raise ExportError(
            f"The example must be a batch of images, a tensor (B, C, H, W); it is {got}. "
            "Pass one batch as the model takes it."
        )
    device = next((p.device for p in model.parameters()), example.device)
    missing = least - len(example)
    if missing > 0:
        example = torch.cat([example, example[:1].expand(missing, *example.shape[1:])])
    return example.detach().to(device)


def other_batch(example: torch.Tensor, size: int) -> torch.Tensor:
    """`size` images of noise with the example's own mean and spread: to ask an exported file something new."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(size, *example.shape[1:], generator=generator).to(example)
    spread = example.float().std() if example.numel() > 1 else torch.tensor(1.0)
    return values * spread.clamp_min(1e-3).to(example) + example.float().mean().to(example)


def reason(error: BaseException) -> str:
    """The first line of the deepest cause that says anything, shortened to read in a sentence."""
    text = type(error).__name__
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        lines = [line.strip() for line in str(current).splitlines() if line.strip()]
        if lines:
            text = f"{type(current).__name__}: {lines[0]}"
        current = current.__cause__
    return (text if len(text) <= 300 else f"{text[:297]}...").rstrip(".")

"""PyTorch's own files: TorchScript (old, runs in C++ and on phones) and PT2 (`torch.export`, its successor)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from vitalloy.deployment._common import at_rest, deployable, example_batch, other_batch, quiet, reason, written_whole
from vitalloy.errors import ExportError

TOLERANCE = 1e-4  # of the largest output: the same kernels run, in nearly the same order


@dataclass(frozen=True)
class TorchExport:
    """A saved program: where it is, its size, and the largest difference of an output seen when it was verified."""

    path: Path
    size_bytes: int
    max_abs_diff: float


def export_torchscript(model: nn.Module, example: torch.Tensor, path: str | Path) -> TorchExport:
    """Trace `model` in eval mode into a TorchScript file, load it again, and compare it on a batch of another size.

    Raises:
        ExportError: when tracing fails, or the file computes something else (a trace fixes every Python branch and
            number: a model whose path depends on its input or its batch size cannot be traced).
    """
    example = example_batch(model, example, least=2)

    def save(file: Path) -> None:
        torch.jit.trace(deployable(model), example, check_trace=False).save(str(file))

    def load(file: Path) -> Callable[[torch.Tensor], torch.Tensor]:
        return torch.jit.load(str(file), map_location=example.device).eval()

    return _export(model, Path(path), save, load, other_batch(example, len(example) + 1), "TorchScript")


def export_pt2(model: nn.Module, example: torch.Tensor, path: str | Path, dynamic_batch: bool = True) -> TorchExport:
    """Save `model` in eval mode as a PT2 program (`torch.export.load(path).module()`), load it again, and compare.

    Args:
        dynamic_batch: let the program take any number of images (it is compared on another number). Otherwise it
            takes as many as `example` holds, and is compared on other images.

    Raises:
        ExportError: when the export fails or the file computes something else.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise ExportError(f"A PT2 file must end in .pt2, and {path.name!r} does not.")
    example = example_batch(model, example, least=2 if dynamic_batch else 1)
    shapes = ({0: torch.export.Dim("batch")},) if dynamic_batch else None

    def save(file: Path) -> None:
        torch.export.save(torch.export.export(deployable(model), (example,), dynamic_shapes=shapes), file)

    def load(file: Path) -> Callable[[torch.Tensor], torch.Tensor]:
        return torch.export.load(file).module()

    size = len(example) + 1 if dynamic_batch else len(example)
    return _export(model, path, save, load, other_batch(example, size), "PT2")


def _export(
    model: nn.Module,
    path: Path,
    save: Callable[[Path], None],
    load: Callable[[Path], Callable[[torch.Tensor], torch.Tensor]],
    batch: torch.Tensor,
    kind: str,
) -> TorchExport:
    """Save, load, compare; the file appears at `path` only when it passed."""
    with at_rest(model), written_whole(path) as unfinished:
        expected = model(batch)
        try:
            with quiet():
                save(unfinished)
        except Exception as error:  # any model code may run here, so anything may be raised
            raise ExportError(f"{type(model).__name__} could not be exported to {kind}: {reason(error)}.") from error
        try:
            with quiet():
                got = load(unfinished)(batch)
        except Exception as error:
            raise ExportError(
                f"The {kind} file of {type(model).__name__} fails on a batch of {len(batch)}: {reason(error)}."
            ) from error
        if got.shape != expected.shape:
            raise ExportError(
                f"The {kind} file of {type(model).__name__} returns {tuple(got.shape)} for a batch of {len(batch)}, "
                f"the model {tuple(expected.shape)}."
            )
        difference = (got - expected).abs().max().item()
        if not difference <= TOLERANCE * max(1.0, expected.abs().max().item()):
            raise ExportError(
                f"The {kind} file of {type(model).__name__} does not compute what the model computes: outputs differ "
                f"by up to {difference:.3g} on a batch of {len(batch)}. The model may depend on its batch size."
            )
    return TorchExport(path, path.stat().st_size, difference)

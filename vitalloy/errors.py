"""What a user can get wrong, as exceptions: the message says what was wrong, where, and what to do.

The command line prints the message alone and exits with 2; anything that is not a `VitalloyError` is a bug.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VitalloyError(Exception):
    """The root of every error that Vitalloy raises on purpose."""


class ModelError(VitalloyError):
    """An unknown model name, or an argument that the model cannot take."""


class CheckpointError(VitalloyError):
    """A weight file that is missing, damaged, unsafe, or made for another model."""


class DataError(VitalloyError):
    """A data set, folder or image that cannot be read or used."""


class RecipeError(VitalloyError):
    """A recipe with an unknown key or a value that makes no sense."""


class RunError(VitalloyError):
    """A run folder that is missing, incomplete or in the way."""


class TrainingError(VitalloyError):
    """Training that cannot go on, such as a loss that is no longer a number."""


class CompressionError(VitalloyError):
    """A model, calibration set or bit width that a compression method cannot work with."""


class ExportError(VitalloyError):
    """A model that could not be exported, or whose export computes something else."""


def suggest(name: str, known: Iterable[str]) -> str:
    """A "did you mean" clause for a misspelt `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""

"""The run folder: what lies where, and writing that survives a kill."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from vitalloy.errors import RunError


class Reporter(Protocol):
    """Who is told how a run goes on; the command line draws it, a script may leave it out."""

    def stage(self, text: str) -> None:
        """A new stage begins."""

    def advance(self, done: int, total: int) -> None:
        """How far the stage is."""

    def result(self, text: str) -> None:
        """What the stage found."""


class Silent:
    """A reporter that says nothing."""

    def stage(self, text: str) -> None: ...

    def advance(self, done: int, total: int) -> None: ...

    def result(self, text: str) -> None: ...


@dataclass(frozen=True)
class RunFolder:
    """The files of a run by their names."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.toml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def onnx(self) -> Path:
        return self.path / "model.onnx"

    @property
    def int8(self) -> Path:
        return self.path / "model.int8.onnx"

    @property
    def images(self) -> Path:
        return self.path / "images"

    @classmethod
    def create(cls, root: str | Path, name: str | None, data: str, model: str, overwrite: bool = False) -> RunFolder:
        """A new folder; without a name it is called after the data, the model and the time.

        Raises:
            RunError: a run of that name exists, or the folder cannot be made.
        """
        stem = name or f"{Path(data).name.replace(':', '-')}-{model}-{datetime.now():%Y%m%d-%H%M%S}"
        path = Path(root) / stem
        try:
            if path.exists() and any(path.iterdir()):
                if not overwrite:
                    raise RunError(
                        f"{path} exists. Go on with it (vitalloy fit --resume {path}), give another --name, "
                        "or replace it with --overwrite."
                    )
                if not (path / "recipe.toml").is_file():
                    raise RunError(f"{path} is not a run folder, so --overwrite leaves it alone. Give another --name.")
                shutil.rmtree(path)
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"{path}: cannot be made ({error.strerror}).") from error
        return cls(path)

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """An existing run. Raises RunError where there is none."""
        path = Path(path)
        if not path.is_dir():
            raise RunError(f"{path}: there is no such run folder.")
        if not (path / "recipe.toml").is_file():
            raise RunError(f"{path}: no recipe.toml here, so this is no run folder.")
        return cls(path)

    def read_metrics(self) -> dict[str, Any]:
        """The metrics written so far; empty where there are none or the file is damaged."""
        try:
            return json.loads(self.metrics.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def write_metrics(self, metrics: dict[str, Any]) -> None:
        self.write(self.metrics, json.dumps(metrics, indent=1, ensure_ascii=False, allow_nan=False))

    def write(self, path: Path, text: str) -> None:
        """Replace a file at once: a reader sees the old text or the new one."""
        part = path.with_name(path.name + ".part")
        try:
            part.write_text(text, encoding="utf-8")
            os.replace(part, path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise RunError(f"{path}: cannot be written ({error.strerror}); what was there is unharmed.") from error

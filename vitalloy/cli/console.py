"""What the commands share: drawing a run's progress, and printing results."""

from __future__ import annotations

import json
import logging
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

err = Console(stderr=True, highlight=False)
out = Console(highlight=False)


class Drawn:
    """A run's reporter on the terminal: a line a stage, a bar while it lasts, its result below."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task: Any = None
        self._text = ""

    def stage(self, text: str) -> None:
        self.close()
        self._text = text
        err.print(f"[bold cyan]•[/] {text}")

    def advance(self, done: int, total: int) -> None:
        if not err.is_terminal:
            return
        if self._bar is None:
            columns = (TextColumn("  "), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=err, transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self._text, total=total)
        self._bar.update(self._task, completed=done, total=total)
        if done >= total:
            self.close()

    def result(self, text: str) -> None:
        self.close()
        err.print(f"  [dim]{text}[/]")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def log_to_terminal() -> None:
    """Show the library's own remarks, and nothing of what other libraries say."""
    handler = RichHandler(console=err, show_time=False, show_path=False, show_level=False)
    logger = logging.getLogger("vitalloy")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)


def print_json(value: Any) -> None:
    """Machine-readable, on standard output alone."""
    print(json.dumps(value, indent=1, ensure_ascii=False))


def percent(value: float) -> str:
    return f"{100 * value:.2f}%"

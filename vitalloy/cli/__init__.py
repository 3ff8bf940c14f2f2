"""The command line: one file a command, no logic of its own. Heavy imports wait until a command runs."""

from __future__ import annotations

import importlib
import sys

import typer

from vitalloy.errors import VitalloyError

app = typer.Typer(
    name="vitalloy",
    help="Hybrid convolution-transformer vision: from a folder of images to a trained, compressed, verified, explained "
    "model with a report.",
    epilog="Add --debug to any command to see the traceback of an error.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
COMMANDS = ("fit", "compress", "exits", "predict", "evaluate", "export", "models", "systems")
GROUPS = ("deepfake",)
for _name in COMMANDS:
    _command = getattr(importlib.import_module(f"vitalloy.cli.{_name}"), _name)
    app.command(_name, no_args_is_help=_name in ("compress", "exits", "predict", "evaluate", "export"))(_command)
for _name in GROUPS:
    app.add_typer(importlib.import_module(f"vitalloy.cli.{_name}").app, name=_name)


def main() -> None:
    """Run the command line. A user's mistake is one line and exit code 2; a traceback needs --debug."""
    debug = "--debug" in sys.argv
    sys.argv = [a for a in sys.argv if a != "--debug"]
    try:
        app()
    except VitalloyError as error:
        if debug:
            raise
        _say(str(error))
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        if debug:
            raise
        _say("interrupted")
        raise SystemExit(130) from None
    except Exception as error:
        if debug:
            raise
        _say(f"this is a bug in Vitalloy: {type(error).__name__}: {error}\nAdd --debug to see where.")
        raise SystemExit(1) from None


def _say(text: str) -> None:
    sys.stderr.write(f"error: {text}\n")

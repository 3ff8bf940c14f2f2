"""`vitalloy export`: a run's model in another format."""

from pathlib import Path
from typing import Annotated, Optional

import typer


def export(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    format: Annotated[str, typer.Option(help="onnx, torchscript or pt2.")] = "onnx",
    output: Annotated[Optional[Path], typer.Option(help="The file; in the run folder if not given.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write a run's model as ONNX, TorchScript or PT2, verified against PyTorch.

    Example: vitalloy export runs/birds --format torchscript
    """
    from vitalloy import runs as pipelines
    from vitalloy.cli.console import log_to_terminal, out, print_json

    log_to_terminal()
    made = pipelines.export(run, format, output)
    if json:
        print_json(made)
        return
    size, difference = made["size_bytes"] / 1e6, made["max_abs_diff"]
    out.print(f"{made['path']}  {size:.2f} MB, largest difference from PyTorch {difference:.1e}", soft_wrap=True)

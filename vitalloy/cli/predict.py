"""`vitalloy predict`: classes of images."""

from pathlib import Path
from typing import Annotated, Optional

import typer


def predict(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    top: Annotated[int, typer.Option(min=1, help="Classes to show for each image.")] = 3,
    explain: Annotated[
        Optional[Path], typer.Option(help="Write where the model looked: a .png for one image, a folder for several.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Classify images with a trained run; probabilities are calibrated.

    Example: vitalloy predict runs/birds photo.jpg --explain why.png
    """
    from rich.table import Table

    from vitalloy import runs as pipelines
    from vitalloy.cli.console import Drawn, err, log_to_terminal, out, percent, print_json

    log_to_terminal()
    reporter = Drawn()
    try:
        found = pipelines.predict(run, images, top_k=top, explain_to=explain, reporter=reporter)
    finally:
        reporter.close()
    if json:
        print_json([p.as_dict() for p in found])
        return
    table = Table("image", "class", "probability", box=None, pad_edge=False)
    for prediction in found:
        for k, (name, probability) in enumerate(prediction.top):
            table.add_row("" if k else prediction.file, name, percent(probability), style="dim" if k else "")
    out.print(table)
    if explain:
        err.print(f"overlay  {explain}", soft_wrap=True)

"""`vitalloy evaluate`: a run's model on labelled data."""

from pathlib import Path
from typing import Annotated, Optional

import typer


def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    data: Annotated[
        Optional[str],
        typer.Argument(help="Labelled data with the model's classes; the run's own test images if left out."),
    ] = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch the data set if it is not here.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Accuracy with its interval, per-class scores and calibration on labelled data.

    Example: vitalloy evaluate runs/birds more_photos/
    """
    from rich.table import Table

    from vitalloy import runs as pipelines
    from vitalloy.cli.console import Drawn, log_to_terminal, out, percent, print_json

    log_to_terminal()
    reporter = Drawn()
    try:
        found = pipelines.evaluate(run, data, download=download, reporter=reporter)
    finally:
        reporter.close()
    if json:
        print_json(found)
        return
    low, high = found["top1_interval"]
    out.print(f"{found['data']}: [bold]{percent(found['top1'])}[/] of {found['n']} images right", soft_wrap=True)
    out.print(f"95% interval {percent(low)} to {percent(high)}; calibration error {percent(found['ece_calibrated'])}")
    table = Table("class", "precision", "recall", "F1", "images", box=None, pad_edge=False)
    for row in found["per_class"]:
        if row["support"]:
            table.add_row(row["name"], *(percent(row[k]) for k in ("precision", "recall", "f1")), str(row["support"]))
    out.print(table)

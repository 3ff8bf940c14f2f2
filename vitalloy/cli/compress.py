"""`vitalloy compress`: a run's model made smaller and faster, measured."""

from pathlib import Path
from typing import Annotated, Optional

import typer


def compress(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    method: Annotated[
        str,
        typer.Option(
            help="auto (measure what runs here and take the fastest that keeps the budget), int8, int8_dynamic, "
            "openvino, inductor, torchao; a published quantizer: easyquant, fq_vit, ptq4vit, repq_vit, aphq, q_hyvit, "
            "i_vit, bivit, fliqs; what leaves work out: sit, sparsifiner, lgvit, lpvit. Join several: sit+lpvit+int8."
        ),
    ] = "auto",
    budget: Annotated[
        Optional[str], typer.Option(help="Limits, such as '3ms, 1MB, -0.5%' (half a point of accuracy).")
    ] = None,
    weights: Annotated[Optional[int], typer.Option(help="Bits of a weight, for a published method.")] = None,
    activations: Annotated[Optional[int], typer.Option(help="Bits of an activation, for a published method.")] = None,
    epochs: Annotated[
        Optional[int],
        typer.Option(help="Epochs of training, for methods that learn (fliqs: --set steps=N); 0 trains nothing."),
    ] = None,
    calibration_images: Annotated[int, typer.Option(help="Training images that ranges are read from.")] = 128,
    set_: Annotated[
        Optional[list[str]],
        typer.Option("--set", help="An option of a method: --set iterations=500, --set sit.macs=0.7."),
    ] = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch the data set if it is not here.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the measurements as JSON.")] = False,
) -> None:
    """Make a run's model smaller or faster, measure what that gave and cost, and add it to the report.

    Example: vitalloy compress runs/birds --budget "3ms, 1MB, -0.5%"
    """
    from rich.table import Table

    from vitalloy import runs as pipelines
    from vitalloy.cli.console import Drawn, err, log_to_terminal, out, percent, print_json

    log_to_terminal()
    reporter = Drawn()
    try:
        made = pipelines.compress_run(
            run,
            method,
            weights=weights,
            activations=activations,
            budget=budget,
            calibration_images=calibration_images,
            epochs=epochs,
            download=download,
            reporter=reporter,
            **pipelines.options_from(set_ or []),
        )
    finally:
        reporter.close()
    report = made.report
    if json:
        print_json(report.as_dict())
        return
    work = any(trial.batch_ms for trial in report.tried)
    columns = ("", "what", "runs as", "top-1", *(("work", "batch of 16") if work else ()), "one image", "size")
    table = Table(*columns, box=None, pad_edge=False)
    for trial in report.tried:
        if trial.call is None:
            table.add_row("", trial.name, f"[dim]{trial.problem}[/]")
            continue
        table.add_row(
            "[bold]→[/]" if trial is report.after else "",
            trial.name,
            trial.execution,
            "–" if trial.top1 is None else percent(trial.top1),
            *((f"{trial.macs / report.before.macs:.0%}", _ms(trial.batch_ms)) if work else ()),
            _ms(trial.latency_ms),
            "–" if trial.size_bytes is None else f"{trial.size_bytes / 1e6:.2f} MB",
        )
    out.print(table)
    if report.met is not None:
        out.print(f"budget {report.budget.asked}: {'met' if report.met else 'not met'}")
    err.print(f"\nreport  {run}/report.html")
    if report.after.file or report.steps:
        err.print(f"use it  vitalloy predict {run / report.folder} IMAGE", soft_wrap=True)


def _ms(value: Optional[float]) -> str:
    return "–" if value is None else f"{value:.2f} ms"

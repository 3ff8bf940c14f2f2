"""`vitalloy exits`: at which confidence images leave a model early."""

from pathlib import Path
from typing import Annotated, Optional

import typer


def exits(
    bundle: Annotated[Path, typer.Argument(help="What `compress --method lgvit` made: RUN/compressed/lgvit.")],
    budget: Annotated[
        str,
        typer.Option(help="One limit: '-1%' (a point of accuracy may go), '90%' (to keep) or '2ms' (mean time)."),
    ] = "-1%",
    policy: Annotated[
        Optional[str], typer.Option(help="confidence, entropy, patience or patient_and_confident; the model's own.")
    ] = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch the data set if it is not here.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the curve as JSON.")] = False,
) -> None:
    """Find the thresholds of a model with early exits for a wanted accuracy or mean time, and draw the curve.

    Example: vitalloy exits runs/birds/compressed/lgvit --budget "-0.5%"
    """
    from rich.table import Table

    from vitalloy import runs as pipelines
    from vitalloy.cli.console import Drawn, err, log_to_terminal, out, percent, print_json
    from vitalloy.compression.tokens.lgvit.policies import NEVER

    log_to_terminal()
    reporter = Drawn()
    try:
        found = pipelines.calibrate_exits(bundle, budget, policy=policy, download=download, reporter=reporter)
    finally:
        reporter.close()
    if json:
        print_json(found)
        return
    chosen, test = found["chosen"], found["test"]
    table = Table("exit", "threshold", "right alone", "leave here", "one image", box=None, pad_edge=False)
    levels = ["nobody" if value == NEVER[found["policy"]] else f"{value:.3f}" for value in chosen["thresholds"]]
    for number, (level, alone, share, ms) in enumerate(
        zip([*levels, "–"], found["exit_accuracy"], test["shares"], found["exit_ms"], strict=True), 1
    ):
        name = "end" if number > len(levels) else str(number)
        table.add_row(name, level, percent(alone), percent(share), f"{ms:.2f} ms")
    out.print(table)
    faster = f", {found['plain_ms'] / chosen['latency_ms']:.2f}x as fast as all" if found["plain_ms"] else ""
    out.print(
        f"test images: {percent(test['top1'])} instead of {percent(test['full_top1'])}, "
        f"{percent(test['macs'])} of the work, {chosen['latency_ms']:.2f} ms in the mean{faster}"
    )
    err.print(f"\nuse it  vitalloy predict {bundle} IMAGE", soft_wrap=True)

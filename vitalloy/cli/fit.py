"""`vitalloy fit`: the main job."""

from pathlib import Path
from typing import Annotated, Optional

import typer


def fit(
    data: Annotated[
        Optional[str],
        typer.Argument(
            help="digits, a folder of class folders, a torchvision name, or hf:owner/name. Default: digits."
        ),
    ] = None,
    model: Annotated[
        Optional[str], typer.Option(help="A name from `vitalloy models`; chosen by image size if not given.")
    ] = None,
    budget: Annotated[
        Optional[str], typer.Option(help="Limits to choose the model by, such as '10ms, 5MB, 92%'.")
    ] = None,
    recipe: Annotated[Optional[Path], typer.Option(help="A recipe.toml to repeat.")] = None,
    set_: Annotated[
        Optional[list[str]], typer.Option("--set", help="Change a key of the recipe: --set epochs=4.")
    ] = None,
    weights: Annotated[Optional[Path], typer.Option(help="A checkpoint to fine-tune from.")] = None,
    probe: Annotated[bool, typer.Option("--probe", help="Train the classifier only, on a frozen backbone.")] = False,
    name: Annotated[Optional[str], typer.Option(help="What the run is called.")] = None,
    runs: Annotated[Path, typer.Option(help="Where runs go.")] = Path("runs"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run of that name.")] = False,
    resume: Annotated[Optional[Path], typer.Option(help="Go on with an interrupted run folder.")] = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch the data set if it is not here.")] = False,
    devices: Annotated[Optional[int], typer.Option(help="Devices to train on.")] = None,
    strategy: Annotated[Optional[str], typer.Option(help="ddp or fsdp, for several devices.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON.")] = False,
) -> None:
    """Train, test, export, quantize, explain and stress-test a model; write a run folder with a report.

    Example: vitalloy fit photos/ --name birds --set epochs=20

    After a kill: vitalloy fit --resume runs/birds
    """
    from vitalloy import runs as pipelines
    from vitalloy.cli.console import Drawn, err, log_to_terminal, percent, print_json
    from vitalloy.errors import RecipeError

    log_to_terminal()
    given = {"model": model, "budget": budget, "weights": weights, "devices": devices, "strategy": strategy}
    changes = [f"{k}={v}" for k, v in given.items() if v is not None]
    changes += [f"{k}=true" for k, on in (("probe", probe), ("download", download)) if on]
    changes += set_ or []
    reporter = Drawn()
    try:
        if resume is not None:
            if data or recipe or name or model or weights or budget:
                raise RecipeError("--resume goes on with a run as it was: leave out the data, model, recipe and name.")
            run = pipelines.resume(resume, overrides=changes, reporter=reporter)
        else:
            run = pipelines.fit(
                data, recipe=recipe, overrides=changes, name=name, runs=runs, overwrite=overwrite, reporter=reporter
            )
    finally:
        reporter.close()
    if json:
        print_json(run.metrics)
        return
    test = run.metrics["test"]
    low, high = test["top1_interval"]
    interval = f"95% interval {percent(low)} to {percent(high)}"
    err.print(f"\n[bold]{percent(test['top1'])}[/] of {test['n']} test images right ({interval})")
    err.print(f"report  {run.report}\nuse it  vitalloy predict {run.folder} IMAGE", soft_wrap=True)

"""`vitalloy models`: the zoo."""

from typing import Annotated, Optional

import typer


def models(
    pattern: Annotated[Optional[str], typer.Argument(help="A shell pattern, such as 'pvt*'.")] = None,
    timm: Annotated[bool, typer.Option("--timm", help="List the names that timm adds, too.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the models: parameters, multiply-accumulates, input, published accuracy, and which checkpoints load.

    Example: vitalloy models 'cvt*'
    """
    from rich.progress import track
    from rich.table import Table

    from vitalloy.benchmark import about_models
    from vitalloy.cli.console import err, out, print_json
    from vitalloy.errors import ModelError, suggest
    from vitalloy.registry import list_models

    names = list_models(pattern)
    others = [n for n in list_models(pattern, timm_models=True) if n not in names] if timm else []
    if not names and not others:
        raise ModelError(f"no model matches {pattern!r}.{suggest(pattern or '', list_models())}")
    counting = track(names, "counting", console=err, transient=True, disable=not err.is_terminal)
    rows = [row for name in counting for row in about_models([name])]
    if json:
        print_json(rows + [{"name": n, "source": "timm"} for n in others])
        return
    table = Table(box=None, pad_edge=False)
    for title in ("model", "params M", "MACs G", "input", "top-1 %", "checkpoints that load"):
        table.add_column(title, justify="left" if title in ("model", "checkpoints that load") else "right")
    for row in rows:
        note = f" ({row['note']})" if row["note"] else ""
        table.add_row(
            row["name"],
            f"{row['params'] / 1e6:.2f}",
            f"{row['macs'] / 1e9:.2f}",
            "x".join(map(str, row["input"])),
            "-" if row["top1"] is None else f"{row['top1']:.1f}",
            (", ".join(row["checkpoints"]) or "-") + note,
        )
    out.print(table)
    for name in others:
        out.print(name)
    err.print("[dim]top-1: published, ImageNet-1k; - where we have not read it at its source[/]")

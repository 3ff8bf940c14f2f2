"""`vitalloy systems`: the catalog."""

from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
    from vitalloy.catalog import Card


def systems(
    name: Annotated[Optional[str], typer.Argument(help="A system, or a pattern such as '*vit'.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """The catalog: every published system, what works and what is planned; with a name, its card and its errata.

    Example: vitalloy systems cvt
    """
    from rich.table import Table

    from vitalloy import catalog
    from vitalloy.cli.console import out, print_json

    if name and not any(c in name for c in "*?["):
        card = catalog.card(name)
        if json:
            print_json(card.model_dump())
        else:
            _show(card)
        return
    cards = catalog.systems(name)
    if json:
        print_json([card.model_dump() for card in cards])
        return
    table = Table("system", "name", "family", "status", "what it is", box=None, pad_edge=False)
    for card in cards:
        table.add_row(
            card.system,
            card.name,
            card.family,
            f"[{'green' if card.status == 'works' else 'dim'}]{card.status}[/]",
            card.summary,
        )
    out.print(table)
    working = sum(card.status == "works" for card in cards)
    out.print(f"\n{working} of {len(cards)} work; `vitalloy systems NAME` shows a card.")


def _show(card: "Card") -> None:
    from vitalloy.cli.console import out

    where = ", ".join(filter(None, (card.authors, card.venue, f"arXiv {card.arxiv}" if card.arxiv else "")))
    out.print(f"[bold]{card.name}[/] ({card.family}), {card.status}")
    for line in [card.title or "; ".join(card.papers or []), where, "", card.summary, ""]:
        out.print(line, markup=False)
    for title, values in (
        ("in the code", card.code),
        ("goldens it is held to" if card.status == "works" else "goldens it will be held to", card.goldens),
        ("tests", card.tests),
        ("authors' code", [card.source]),
        ("weights", card.checkpoints),
        ("licence of the weights", [card.weights_licence]),
    ):
        if values and values != [""]:
            out.print(f"[cyan]{title}[/]")
            for value in values:
                out.print(f"  {value}", markup=False)
    if card.results:
        out.print("[cyan]published results[/]")
        for r in card.results:
            out.print(f"  {r.model}: {r.metric} {r.value}{f' ({r.note})' if r.note else ''}", markup=False)
    if card.errata:
        out.print("[cyan]errata[/] (where paper, code and weights disagree)")
        for e in card.errata:
            out.print(f"  {e.what}\n    we follow: {e.default}", markup=False)
            if e.switch:
                out.print(f"    the other reading: {e.switch}", markup=False)

"""Rewrite the parts of the documentation that are made from the code: run `python docs/gallery.py`.

A generated part stands between `<!-- generated: NAME -->` and `<!-- end -->`; the text around it is written by hand.
`python docs/gallery.py --check` changes nothing and exits with 1 if a page is out of date.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitalloy.catalog import Card

DOCS = Path(__file__).resolve().parent
_BLOCK = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def recipe_table() -> str:
    """Every key of a recipe, with its default and its meaning, a table a group."""
    from vitalloy import Recipe

    lines = []
    fields = Recipe.model_fields.items()
    for group, members in groupby(fields, key=lambda item: item[1].json_schema_extra["group"]):
        lines += [f"**{group}**", "", "| key | default | meaning |", "| --- | --- | --- |"]
        lines += [f"| `{name}` | {_default(field.default)} | {_cell(field.description)} |" for name, field in members]
        lines.append("")
    return "\n".join(lines)


def model_table() -> str:
    """Our models: size, work, input, published accuracy and the checkpoints that load."""
    from vitalloy import list_models
    from vitalloy.benchmark import about_models

    lines = [
        "| model | parameters (M) | MACs (G) | input | top-1 (%) | checkpoints that load |",
        "| --- | ---: | ---: | --- | ---: | --- |",
        *(model_row(row) for row in about_models(list_models())),
    ]
    return "\n".join(lines) + "\n"


def model_row(row: dict[str, Any]) -> str:
    """A row of `about_models` as a row of the table."""
    height, width = row["input"]
    top1 = "" if row["top1"] is None else f"{row['top1']:.1f}"
    note = f" ({_cell(row['note'])})" if row["note"] else ""
    files = ", ".join(f"`{_cell(name)}`" for name in row["checkpoints"])
    work = f"{row['params'] / 1e6:.2f} | {row['macs'] / 1e9:.2f}"
    return f"| `{row['name']}` | {work} | {height} × {width} | {top1}{note} | {files} |"


def gallery() -> str:
    """Every system of the catalog by family: whether it works, what it is, and its errata."""
    from vitalloy import systems
    from vitalloy.catalog import FAMILIES

    cards = systems()
    working = [card for card in cards if card.status == "works"]
    parts = [f"{len(working)} of {len(cards)} systems work in this version; the others are planned.", ""]
    families = [(family, [card for card in cards if card.family == family]) for family in FAMILIES]
    families = [(family, members) for family, members in families if members]
    for family, members in families:
        count = sum(card.status == "works" for card in members)
        link = family.replace(" ", "-")
        systems_ = "1 system" if len(members) == 1 else f"{len(members)} systems"
        parts.append(f"- [{family.capitalize()}](#{link}): {systems_}, {count} working")
    parts.append("")
    for family, members in families:
        parts += [f"## {family.capitalize()}", ""]
        for card in members:
            parts += _system(card)
    return "\n".join(parts).rstrip() + "\n"


PARTS: dict[str, Callable[[], str]] = {"recipe": recipe_table, "models": model_table, "systems": gallery}


def rendered(page: Path) -> str:
    """The page as it should be: its own text, with the generated parts made anew."""
    return _BLOCK.sub(lambda m: f"{m[1]}{PARTS[m[2]]()}{m[3]}", page.read_text(encoding="utf-8"))


def generated_pages() -> list[Path]:
    """The pages that have a generated part."""
    return [page for page in sorted(DOCS.glob("*.md")) if _BLOCK.search(page.read_text(encoding="utf-8"))]


def main(check: bool) -> int:
    stale = [(page, text) for page in generated_pages() if (text := rendered(page)) != page.read_text(encoding="utf-8")]
    for page, text in stale:
        if not check:
            page.write_text(text, encoding="utf-8")
        sys.stdout.write(f"{page.name}: {'out of date' if check else 'written'}\n")
    return int(check and bool(stale))


def _system(card: Card) -> list[str]:
    works = card.status == "works"
    title = _text(card.title or "; ".join(card.papers))
    facts = ", ".join(filter(None, (card.authors, card.venue, card.arxiv and f"arXiv {card.arxiv}")))
    source = f"{title}. {_text(facts)}" if title and facts else title or _text(facts)
    lines = [f"### {card.name}", "", f"`{card.system}` · **{card.status}** · {_text(card.summary)}", ""]
    if source:
        lines += [f"{source}.".replace("..", "."), ""]
    if works:
        lines += [f"In the code: {', '.join(f'`{name}`' for name in card.code)}.", ""]
    if card.errata:
        lines += ["| where paper, code and weights disagree | what Vitalloy follows | switch |", "| --- | --- | --- |"]
        lines += [
            f"| {_cell(e.what)} | {_cell(e.default)} | {f'`{_cell(e.switch)}`' if e.switch else ''} |"
            for e in card.errata
        ]
        lines.append("")
    return lines


def _default(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, (list, tuple)):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value}`"


def _text(text: str) -> str:
    """Plain text as Markdown: what could be read as markup is escaped."""
    return re.sub(r"([*_<>\[\]|])", r"\\\1", text)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))

"""The catalog: one card (a TOML file beside this one) for every published system.

A card says what the system is and for whom, where it lives in the code, which goldens hold it to the authors'
numbers, what was published, under which licences, and where paper, code and weights disagree. This is data:
nothing here imports a method, and nothing but the command line and the documentation reads it.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import tomlkit
from pydantic import BaseModel, ConfigDict, ValidationError

from ..errors import ModelError, suggest

__all__ = ["FAMILIES", "Card", "Erratum", "Result", "card", "systems"]

Family = Literal[
    "base model",
    "backbone",
    "pooling and adapters",
    "quantization",
    "fewer tokens and blocks",
    "search and design",
    "training",
    "self-supervision",
    "explanation",
    "robustness",
    "application",
    "measuring",
    "data",
]
FAMILIES: tuple[str, ...] = get_args(Family)


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Result(_Entry):
    """A published number: `value` is printed as the authors gave it, so it is text."""

    model: str
    metric: str
    value: str
    note: str = ""


class Erratum(_Entry):
    """Where paper, authors' code and released weights disagree, what we follow, and the switch to the other reading."""

    what: str
    default: str
    switch: str = ""


class Stage(_Entry):
    """One box in the drawing of a backbone: what it holds and at which stride its map leaves it."""

    name: str
    holds: str  # such as "2 x local block"
    stride: int
    kind: Literal["embedding", "convolution", "attention", "both", "other"]


class Block(_Entry):
    """One kind of block in the drawing: its parts in order. A part that starts with "+" ends a residual branch."""

    name: str
    parts: list[str]


class Card(_Entry):
    """One published system. `system` is the stem of its file and of its folder of goldens."""

    system: str
    name: str
    title: str = ""
    papers: list[str] = []  # instead of `title` where a system stands on several papers
    authors: str = ""
    venue: str = ""
    arxiv: str = ""
    family: Family
    summary: str
    status: Literal["works", "planned"]
    code: list[str]  # dotted names under vitalloy
    goldens: list[str]
    tests: list[str]  # paths from the root of the repository
    source: str  # the authors' code and its licence
    weights_licence: str
    checkpoints: list[str]
    how: str = ""  # how the architecture works, a paragraph
    stages: list[Stage] = []
    blocks: list[Block] = []
    results: list[Result] = []
    errata: list[Erratum] = []


def systems(pattern: str | None = None) -> list[Card]:
    """The cards, sorted by family and name; `pattern` (such as `"*vit"`) picks by file stem or display name.

    Case does not matter. A pattern that fits nothing gives an empty list.
    """
    cards = [_read(path) for path in _folder().glob("*.toml")]
    if pattern is not None:
        wanted = pattern.casefold()
        cards = [c for c in cards if any(fnmatchcase(n.casefold(), wanted) for n in (c.system, c.name))]
    return sorted(cards, key=lambda c: (c.family, c.name.casefold()))


def card(name: str) -> Card:
    """The card of one system, by file stem (`"cas_vit"`) or display name (`"CAS-ViT"`), in any case.

    Raises:
        ModelError: there is no such system; the message suggests near names.
    """
    wanted = name.casefold()
    stems = sorted(path.stem for path in _folder().glob("*.toml"))
    if wanted in stems:
        return _read(_folder() / f"{wanted}.toml")
    for found in systems():
        if found.name.casefold() == wanted:
            return found
    raise ModelError(
        f"No system named {name!r} in the catalog.{suggest(wanted, stems)} vitalloy.systems() lists all {len(stems)}."
    )


def _folder() -> Path:
    return Path(__file__).parent


@cache
def _read(path: Path) -> Card:
    fields = tomlkit.parse(path.read_text(encoding="utf-8")).unwrap()
    try:
        return Card(system=path.stem, **fields)
    except ValidationError as error:
        raise ValueError(f"{path.name} is not a valid card: {error}") from error

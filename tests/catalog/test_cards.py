"""The cards say only what is so: they parse, and what they claim to work can be imported and is tested."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from vitalloy import catalog
from vitalloy.errors import ModelError

ROOT = Path(__file__).parents[2]
FILES = sorted(Path(catalog.__file__).parent.glob("*.toml"))
SHARED = ROOT.parent / "shared"

MINIMAL = """
name = "Some"
family = "backbone"
summary = "Does something."
status = "planned"
code = []
goldens = []
tests = []
source = "none published"
weights_licence = "unknown"
checkpoints = []
"""


def resolve(dotted: str) -> object:
    """The module, class or function that a dotted name stands for."""
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError as error:
            if error.name is None or not dotted.startswith(error.name):
                raise  # the module exists and misses something else
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(dotted)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_card_holds_what_it_claims(path):
    card = catalog.card(path.stem)
    assert card.system == path.stem
    assert card.family in catalog.FAMILIES
    assert card.name and card.summary and card.source and card.weights_licence
    assert card.title or card.papers or not card.arxiv, "a card with a paper gives its title"
    for listed in (card.code, card.goldens, card.tests, card.checkpoints):
        assert len(set(listed)) == len(listed) and all(listed)
    for result in card.results:
        assert result.model and result.metric and result.value
    for erratum in card.errata:
        assert erratum.what and erratum.default

    if card.status == "planned":
        assert not card.code and not card.tests, "a planned card names no code and no tests"
        return
    assert card.code and card.tests
    for dotted in card.code:
        assert dotted.startswith("vitalloy.")
        resolve(dotted)
    for test in card.tests:
        assert test.startswith("tests/") and (ROOT / test).is_file()
    for case in card.goldens:
        assert (ROOT / "tests" / "parity" / "goldens" / card.system / f"{case}.json").is_file()


def test_resolve_refuses_what_does_not_exist():
    assert resolve("vitalloy.catalog.card") is catalog.card
    for dotted in ("vitalloy.catalog.nothing", "vitalloy.nothing.at_all"):
        with pytest.raises((AttributeError, ModuleNotFoundError)):
            resolve(dotted)


def test_systems_are_sorted_and_matched_by_stem_or_name():
    cards = catalog.systems()
    assert len(cards) == len(FILES) and len({card.name.casefold() for card in cards}) == len(cards)
    assert [(c.family, c.name.casefold()) for c in cards] == sorted((c.family, c.name.casefold()) for c in cards)
    assert [c.system for c in catalog.systems("CVT")] == ["cvt"]
    assert [c.system for c in catalog.systems("cas-*")] == ["cas_vit"]  # the display name, CAS-ViT
    assert [c.system for c in catalog.systems("cas_*")] == ["cas_vit"]  # the file stem
    assert catalog.systems("no such thing") == []


def test_card_by_either_name_and_a_helpful_error():
    assert catalog.card("cas_vit") == catalog.card("CAS-ViT")
    with pytest.raises(ModelError, match=r"'caz_vit'.*Did you mean 'cas_vit'"):
        catalog.card("caz_vit")


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (("name =", 'colour = "red"\nname ='), "colour"),
        (('source = "none published"', ""), "source"),
        (('"backbone"', '"back bone"'), "family"),
        (('"planned"', '"soon"'), "status"),
        (("checkpoints = []", "checkpoints = [1]"), "checkpoints"),
        (("tests = []", 'tests = []\nresults = [{model = "A", metric = "top-1", value = 81.6}]'), "value"),
    ],
)
def test_a_bad_card_is_refused_by_file_and_key(tmp_path, change, names):
    good, bad = tmp_path / "good.toml", tmp_path / "bad.toml"
    good.write_text(MINIMAL)
    assert catalog._read(good).system == "good"
    bad.write_text(MINIMAL.replace(*change))
    with pytest.raises(ValueError, match=rf"bad\.toml[\s\S]*{names}"):
        catalog._read(bad)


def test_catalog_does_not_load_torch():
    code = "import sys, vitalloy; vitalloy.systems(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.skipif(not (SHARED / "specs").is_dir(), reason="the specification sheets are not beside the repository")
def test_every_sheet_has_a_card_with_its_goldens():
    sheets = {path.stem for path in (SHARED / "specs").glob("*.md")} - {"README"}
    assert {path.stem for path in FILES} == sheets
    for card in catalog.systems():
        cases = {path.stem for path in (SHARED / "parity" / card.system).glob("*.json")}
        assert set(card.goldens) == cases, card.system

"""The documentation says only what is so: generated parts are up to date, links lead somewhere, examples are valid.

A Python block below `<!-- run -->` is run, one below `<!-- check -->` is held against the signatures that it calls.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomlkit
import typer
from PIL import Image

import vitalloy
from vitalloy.cli import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
WRITTEN = [page for page in PAGES if page.name != "benchmarks.md"]
FENCE = re.compile(r"(?:<!-- (run|check) -->\n)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

_spec = importlib.util.spec_from_file_location("gallery", DOCS / "gallery.py")
gallery = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(gallery)


def blocks(page: Path, language: str) -> list[tuple[str, str]]:
    """(how it is checked, text) of the blocks in a language."""
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    return [(how, text) for how, kind, text in found if kind == language]


def part(name: str) -> str:
    """A generated part as it stands on its page."""
    pages = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    return re.search(rf"<!-- generated: {name} -->\n(.*?)<!-- end -->", pages, re.DOTALL)[1]


def commands(page: Path) -> list[list[str]]:
    lines = "\n".join(text for _, text in blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


# ---- what is generated


MEASURED = [
    "compression_study",
    "quantized",
    "perturbation",
    "less_work_accuracy",
    "less_work_speed",
    "sparse_crossover",
    "block_crossover",
]


@pytest.mark.parametrize("name", ["recipe", "systems", "architectures", *MEASURED])
def test_generated_parts_are_up_to_date(name):
    assert part(name) == gallery.PARTS[name](), "run `python docs/gallery.py`"


def test_drawings_are_up_to_date():
    for path, text in gallery.drawings_of_cards().items():
        assert path.read_text(encoding="utf-8") == text, "run `python docs/gallery.py`"


def test_the_zoo_shows_every_family():
    from vitalloy.registry import entry, list_models

    published = [name for name in list_models() if entry(name).variant.top1 is not None]
    for family in set(gallery.zoo_families(published).values()):
        for picture in ("zoo_parameters.svg", "zoo_latency.svg"):
            assert f">{family}</text>" in (DOCS / "pictures" / picture).read_text(encoding="utf-8"), family


def test_table_of_models_is_up_to_date():
    """Every row's name, input, accuracy and files; its sizes for the small models, as counting all takes a minute."""
    from vitalloy.benchmark import about_models
    from vitalloy.registry import entry, list_models

    rows = {line.split("`")[1]: line for line in part("models").splitlines()[2:]}
    assert list(rows) == list_models(), "run `python docs/gallery.py`"
    for name, line in rows.items():
        found = entry(name)
        if name.endswith("_nano"):
            (about,) = about_models([name])
        else:
            params, macs = (float(cell) for cell in line.split("|")[2:4])
            about = {"name": name, "params": params * 1e6, "macs": macs * 1e9, "input": found.cfg["input_size"][1:]}
            about |= {"top1": found.variant.top1, "note": found.variant.note, "checkpoints": found.variant.checkpoints}
        assert line == gallery.model_row(about), "run `python docs/gallery.py`"


def test_generator_replaces_only_what_stands_between_its_marks(tmp_path, monkeypatch):
    monkeypatch.setitem(gallery.PARTS, "recipe", lambda: "new\n")
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- generated: recipe -->\nold\n<!-- end -->\nafter\n")
    assert gallery.rendered(page) == "before\n<!-- generated: recipe -->\nnew\n<!-- end -->\nafter\n"


# ---- links


def anchors(page: Path) -> set[str]:
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL), re.M
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file) if file else page
        assert there.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(there), f"{page.name} links to {target}"


def test_every_page_is_in_the_index():
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in WRITTEN if page.name != "README.md" and f"({page.name})" not in index] == []


# ---- commands


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_shell_commands_are_valid(page):
    known = typer.main.get_command(app).commands
    project = tomlkit.parse((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for words in commands(page):
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.M), words
        elif words[0] == "pip":
            assert words[1] == "install" and words[2].startswith("."), words
            assert set(re.findall(r"\[(\w+)\]", words[2])) <= set(project["optional-dependencies"])
        else:
            name, *args = words[words.index("vitalloy") + 1 :]
            context = known[name].make_context(name, args)  # an unknown option or a missing argument raises
            if isinstance(known[name], typer.core.TyperGroup):
                name, inner, args = known[name].resolve_command(context, [*context._protected_args, *context.args])
                inner.make_context(name, args)
                continue
            if name == "compress":
                _check_compress(**context.params)
            elif name == "exits":
                _check_compress("lgvit", context.params["budget"], None, weights=None, activations=None)
            else:
                vitalloy.Recipe().with_overrides(_settings(context.params))


def _check_compress(method: str, budget: str | None, set_: list[str] | None, **given: Any) -> None:
    """Its settings are options of the methods, and its budget may be relative."""
    from vitalloy.runs.budget import Budget
    from vitalloy.runs.compressing_run import options_from
    from vitalloy.runs.plan import Plan

    Plan.of(method, given["weights"], given["activations"], options_from(set_ or []))
    if budget:
        Budget.parse(budget, relative=True)


def _settings(given: dict[str, Any]) -> list[str]:
    """The recipe keys that a command line sets, a kind of distillation's teacher and all."""
    settings = list(given.get("set_") or [])
    settings += [f"{key}={given[key]}" for key in ("model", "budget", "devices", "strategy") if given.get(key)]
    if given.get("budget"):
        importlib.import_module("vitalloy.runs.budget").Budget.parse(given["budget"])
    if given.get("model"):
        importlib.import_module("vitalloy.registry").default_cfg(given["model"])
    return settings


# ---- Python


@pytest.mark.parametrize("page", [page for page in WRITTEN if blocks(page, "python")], ids=lambda page: page.name)
def test_python_blocks_are_valid(page):
    for how, text in blocks(page, "python"):
        assert how in ("run", "check"), f"{page.name}: mark the block with <!-- run --> or <!-- check -->"
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("vitalloy"):
                exec(ast.unparse(node), {})
            if isinstance(node, ast.Call) and re.fullmatch(r"vitalloy\.\w+", called := ast.unparse(node.func)):
                function = getattr(vitalloy, called.removeprefix("vitalloy."))
                keywords = {k.arg: None for k in node.keywords}
                inspect.signature(function).bind(*[None] * len(node.args), **keywords)


def test_the_models_page_runs_and_prints_what_it_says(capsys):
    pytest.importorskip("segmentation_models_pytorch")
    space: dict[str, Any] = {}
    for how, text in blocks(DOCS / "models.md", "python"):
        if how == "run":
            exec(compile(text, "models.md", "exec"), space)
    assert space["logits"].shape == (2, 7) and space["tokens"].shape == (2, 65, 384)
    assert space["masks"].shape == (1, 2, 128, 128)
    assert space["scores"].shape == (2, 5, 128, 128) and set(space["losses"]) == {"classes", "boxes"}
    assert space["second"].boxes.shape[1] == 4
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "[(2, 64, 32, 32), (2, 192, 16, 16), (2, 384, 8, 8)]"
    assert printed[1] == "[64, 192, 384] [4, 8, 16]"
    assert printed[2] == "torch.Size([1, 3, 197, 197])"
    assert printed[3] == "torch.Size([1, 7])"
    assert printed[4].startswith("Consistency(consistency=1.0, ")
    assert printed[5] == "rollout torch.Size([1, 224, 224])"
    assert type(space["theirs"]).__module__.startswith("timm.")
    assert type(space["ours"]).__module__ == "vitalloy.backbones.vit"


# ---- what is said about runs and mistakes


def test_the_keys_of_metrics_json_are_those_of_the_code():
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", (DOCS / "runs.md").read_text(encoding="utf-8"), re.M)
    names = {key for key, _ in rows} | {name for _, text in rows for name in re.findall(r"`(\w+)`", text)}
    folders = ("runs", "training", "benchmark", "robustness")
    code = "\n".join(file.read_text(encoding="utf-8") for f in folders for file in (ROOT / "vitalloy" / f).glob("*.py"))
    assert len(names) > 50
    unknown = [n for n in sorted(names) if f'"{n}"' not in code and not re.search(rf"^    {n}: ", code, re.M)]
    assert unknown == []


@pytest.fixture
def mistakes(tmp_path, monkeypatch):
    """What a user may do wrong -> a call that does it."""

    monkeypatch.chdir(tmp_path)  # names that are near a wrong one are looked for here

    def folder(name: str, *files: str) -> str:
        for file in files:
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / name / file)
        return str(tmp_path / name)

    both = ("finch/1.png", "finch/2.png", "robin/1.png", "robin/2.png")
    flat = folder("flat", "1.png", "2.png", "3.png")
    one = folder("one", *both[1:])
    no_train = folder("no_train", *(f"val/{f}" for f in both))
    differ = folder("differ", *(f"train/{f}" for f in both), *(f"val/{f}" for f in both[:2]))
    text = tmp_path / "text.png"
    text.write_text("not an image")
    budget = importlib.import_module("vitalloy.runs.budget").Budget
    return {
        "a folder of images without class folders": lambda: vitalloy.load_data(flat),
        "a class folder with one image": lambda: vitalloy.load_data(one),
        "`val/` without `train/`": lambda: vitalloy.load_data(no_train),
        "parts with other classes": lambda: vitalloy.load_data(differ),
        "a file that is not an image": lambda: importlib.import_module("vitalloy.data").read_image(text),
        "a name that is no data set": lambda: vitalloy.load_data("digit"),
        "`--set epoch=4`": lambda: vitalloy.Recipe().with_overrides(["epoch=4"]),
        "`--set epochs=many`": lambda: vitalloy.Recipe().with_overrides(["epochs=many"]),
        "`--budget fast`": lambda: budget.parse("fast"),
        "`--model cvt_14`": lambda: vitalloy.create_model("cvt_14"),
        "a teacher without a kind of distillation": lambda: vitalloy.Recipe(teacher="runs/birds"),
    }


def test_messages_are_quoted_as_they_are(mistakes):
    table = dict(re.findall(r"^\| (.+?) \| `(.+)` \|$", (DOCS / "fit.md").read_text(encoding="utf-8"), re.M))
    for what, make in mistakes.items():
        with pytest.raises(vitalloy.VitalloyError) as caught:
            make()
        for piece in table[what].split("…"):
            assert piece.strip() in str(caught.value), what

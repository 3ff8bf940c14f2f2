"""Rewrite the parts of the documentation that are made from the code: run `python docs/gallery.py`.

A generated part stands between `<!-- generated: NAME -->` and `<!-- end -->`; the text around it is written by hand.
The pictures are drawn from the cards of the catalog and from the newest results of `make bench`.
`python docs/gallery.py --check` changes nothing and exits with 1 if a page is out of date.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import cache
from itertools import groupby, takewhile
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent))
import drawings

if TYPE_CHECKING:
    from vitalloy.catalog import Card

DOCS = Path(__file__).resolve().parent
PICTURES = DOCS / "pictures"
RESULTS = DOCS.parent / "benchmarks" / "results"
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
    lines = [
        "| model | parameters (M) | MACs (G) | input | top-1 (%) | checkpoints that load |",
        "| --- | ---: | ---: | --- | ---: | --- |",
        *(model_row(row) for row in all_models()),
    ]
    return "\n".join(lines) + "\n"


@cache
def all_models() -> list[dict[str, Any]]:
    """The rows of `about_models` for every model of ours; counting takes minutes, so it is done once."""
    from vitalloy import list_models
    from vitalloy.benchmark import about_models

    return about_models(list_models())


def model_row(row: dict[str, Any]) -> str:
    """A row of `about_models` as a row of the table."""
    size = " × ".join(map(str, row["input"]))
    top1 = "" if row["top1"] is None else f"{row['top1']:.1f}"
    note = f" ({_cell(row['note'])})" if row["note"] else ""
    files = ", ".join(f"`{_cell(name)}`" for name in row["checkpoints"])
    work = f"{row['params'] / 1e6:.2f} | {row['macs'] / 1e9:.2f}"
    return f"| `{row['name']}` | {work} | {size} | {top1}{note} | {files} |"


def compression_study() -> str:
    """Accuracy, size and latency of every quantizer on the bundled models, as the study measured them."""
    rows = json.loads((RESULTS / "compression_study.json").read_text(encoding="utf-8"))["rows"]
    lines = []
    for model, members in groupby(rows, key=lambda row: row["model"]):
        members = list(members)
        methods = list(dict.fromkeys(row["method"] for row in members))
        members.sort(key=lambda row: (methods.index(row["method"]), -row["weights"], -row["activations"]))
        first = next(row for row in members if "float" in row)
        low, high = first["float"]["top1_interval"]
        lines += [
            f"**`{model}`**: {first['float']['top1']:.1%} of {first['images']} test images in float "
            f"(95 % interval {low:.1%} to {high:.1%}), {first['float']['size_bytes'] / 1e6:.2f} MB, one image in "
            f"{first['float']['latency_ms']:.2f} ms in PyTorch and "
            f"{first['onnx']['latency_ms']:.2f} ms in ONNX Runtime.",
            "",
            "| method | bits W/A | top-1 (%) | change (points) | size (MB) | one image (ms) | runs as |",
            "| --- | --- | ---: | ---: | ---: | ---: | --- |",
            *(_study_row(row) for row in members),
            "",
        ]
    return "\n".join(lines)


def _study_row(row: dict[str, Any]) -> str:
    head = f"| `{row['method']}` | {row['weights']}/{row['activations']} |"
    if "top1" not in row:
        return f"{head} | | | | {_cell(row['problem'])} |"
    change = 100 * (row["top1"] - row["float"]["top1"])
    latency = "" if row["execution"] == "simulation" else f"{row['latency_ms']:.2f}"
    size = "" if row["size_bytes"] is None else f"{row['size_bytes'] / 1e6:.2f}"
    where = row["execution"] if row["execution"] == "simulation" else f"{row['execution']}, {row['runtime']}"
    return f"{head} {100 * row['top1']:.1f} | {change:+.1f} | {size} | {latency} | {where} |"


WAYS = {
    "eager_fp32": "PyTorch, ours",
    "timm_eager_fp32": "PyTorch, timm's",
    "onnx_fp32": "ONNX Runtime",
    "openvino_fp32": "OpenVINO",
    "onnx_static_int8": "ONNX Runtime int8, static",
    "onnx_dynamic_int8": "ONNX Runtime int8, dynamic",
    "onnx_our_scales_int8": "ONNX Runtime int8, our scales",
    "openvino_int8": "OpenVINO int8, NNCF",
    "openvino_our_scales_int8": "OpenVINO int8, our scales",
    "inductor_int8": "Inductor int8",
}


def quantized() -> str:
    """How fast int8 runs on each runtime, as `benchmarks/quantized.py` measured it."""
    lines = []
    for path in sorted(RESULTS.glob("quantized-*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        rows = result["rows"]
        lines += [
            f"{result['machine']['cpu']}, one thread, one image, {result['date']}. The first row is in milliseconds, "
            "the others are times as fast as it.",
            "",
            "".join(["| |", *(f" `{row['model']}` |" for row in rows)]),
            f"| --- |{' ---: |' * len(rows)}",
        ]
        for way, words in WAYS.items():
            ways = [row["ways"].get(way) for row in rows]
            kind = "median_ms" if way == "eager_fp32" else "speed_up"
            unit = " ms" if way == "eager_fp32" else ""
            cells = ["" if found is None else f"{found[kind]:.{1 if unit else 2}f}{unit}" for found in ways]
            lines.append(f"| {words} | {' | '.join(cells)} |")
        lines += ["", "Where the time of OpenVINO's int8 form goes:", "", *(_profile(row) for row in rows), ""]
    return "\n".join(lines)


def _profile(row: dict[str, Any], shown: int = 5) -> str:
    spent = row["profile_openvino_int8"]
    parts = [f"{kind} {ms / sum(spent.values()):.0%}" for kind, ms in list(spent.items())[:shown]]
    return f"- `{row['model']}`: {', '.join(parts)}"


def perturbation() -> str:
    """What the two perturbations behind APHQ-ViT's Hessian measure, as `benchmarks/perturbation.py` found it."""
    rows = json.loads((RESULTS / "perturbation.json").read_text(encoding="utf-8"))["rows"]
    lines = [
        "| model | push | kept in float64: median layer | least | most | top-1 at 3/3 bits (%) |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        for kind, words in (("rademacher", "random signs"), ("ones", "as published"), ("no Hessian", "none: squares")):
            found = [layer.get(f"{kind}_survives") for layer in row["layers"].values()]
            kept = [f"{f(found):.2g}" for f in (median, min, max)] if None not in found else [""] * 3
            scores = ", ".join(f"{100 * top1:.1f}" for top1 in row["top1"][kind])
            lines.append(f"| `{row['model']}` | {words} | {' | '.join(kept)} | {scores} |")
    return "\n".join([*lines, ""])


REDUCTIONS = {
    "whole": "none, trained on",
    "sit": "`sit`",
    "sit_without_tokens": "`sit`, `token_weight=0`",
    "sparsifiner": "`sparsifiner`",
    "lgvit": "`lgvit`",
    "lpvit": "`lpvit`",
    "lpvit_blocks": '`lpvit`, `pattern="blocks"`',
    "lpvit_blocks_exact": '`lpvit`, `pattern="blocks"`, `as_published=False`',
}
FORMS = {"eager": "PyTorch", "onnx": "ONNX Runtime", "int8": "ONNX Runtime int8"}
SAVED = "".join(f"| time saved in {words}, one / 16 images " for words in FORMS.values())


def less_work_accuracy() -> str:
    """Work, accuracy and time of reduced bundled models, as `benchmarks/less_work.py accuracy` measured them."""
    lines = []
    for model, members in groupby(_less_work("accuracy"), key=lambda row: row["model"]):
        rows = list(members)
        full = rows[0]["full_top1"]
        lines += [
            f"**`{model}`**: {full['eager']:.2%} in float, {full['int8']:.2%} in int8.",
            "",
            f"| method | work saved | top-1 (change), % | in int8, % {SAVED}| training |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for row in rows:
            top1, change = row["top1"]["eager"], row["top1"]["eager"] - full["eager"]
            int8 = f"{100 * row['top1']['int8']:.2f}" if "int8" in row["top1"] else ""
            more = row["training"]["reverse_parameters"] / 1e6
            lines.append(
                f"| {_reduction(row)} | {_percent(1 - row['macs'])} | {100 * top1:.2f} ({100 * change:+.2f}) "
                f"| {int8} | {_saved(row['ms'])} | {row['training']['seconds'] / 60:.0f} min"
                f"{f', {more:.2f} M in reverse modules' if more else ''} |"
            )
        lines.append("")
    return "\n".join(lines)


def less_work_speed() -> str:
    """Work and time of published models that were reduced, as `benchmarks/less_work.py speed` measured them."""
    lines = []
    for model, members in groupby(_less_work("speed"), key=lambda row: row["model"]):
        rows = list(members)
        times = next(row["ms"] for row in rows if "ms" in row)
        whole = ", ".join(f"{times[f'full {form}']['one']:.0f} ms in {words}" for form, words in FORMS.items())
        lines += [
            f"**`{model}`**: {whole} for one image.",
            "",
            f"| method | work saved {SAVED}|",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        for row in rows:
            found = _cell(row["problem"]) + " | | | |" if "problem" in row else f"{_percent(1 - row['macs'])} | "
            lines.append(f"| {_reduction(row)} | {found}" + (f"{_saved(row['ms'])} |" if "ms" in row else ""))
        lines.append("")
    return "\n".join(lines)


def _reduction(row: dict[str, Any]) -> str:
    """The method, with its budget where that is not the work that still runs."""
    knob = {"sparsifiner": "keep", "lpvit_blocks": "macs", "lpvit_blocks_exact": "macs"}.get(row["method"])
    return REDUCTIONS[row["method"]] + (f", `{knob}={row['budget']:g}`" if knob else "")


def _percent(share: float) -> str:
    return f"{round(share, 2) + 0.0:.0%}"  # no "-0%"


def _saved(ms: dict[str, dict[str, float]]) -> str:
    """Cells: the share of the full model's time that each form saves, one image and sixteen."""
    cells = []
    for form in FORMS:
        full, reduced = ms[f"full {form}"], ms.get(f"reduced {form}")
        shares = [_percent(1 - reduced[key] / full[key]) for key in ("one", "batch")] if reduced else []
        cells.append(" / ".join(shares))
    return " | ".join(cells)


def sparse_crossover() -> str:
    """How many times as fast as dense attention the skipping one is, as `benchmarks/less_work.py crossover` saw it."""
    rows = [row for row in _less_work("crossover") if row["kind"] == "attention"]
    keeps = list(dict.fromkeys(row["keep"] for row in rows))
    lines = [
        "| tokens " + "".join(f"| {keep:.0%} of the keys " for keep in keeps) + "|",
        "| ---: " + "| ---: " * len(keeps) + "|",
    ]
    for tokens, members in groupby(rows, key=lambda row: row["tokens"]):
        found = {row["keep"]: row["speedup"] for row in members}
        lines.append(f"| {tokens} | " + " | ".join(f"{found[keep]:.2f}" for keep in keeps) + " |")
    return "\n".join([*lines, ""])


def block_crossover() -> str:
    """How many times as fast as the dense one each block-sparse product is, as the same study saw it."""
    lines = ["| blocks that stay | BSR | gathered |", "| ---: | ---: | ---: |"]
    for row in _less_work("crossover"):
        if row["kind"] == "blocks":
            ratios = " | ".join(f"{row['dense'] / row[way]:.2f}" for way in ("bsr", "gather"))
            lines.append(f"| {row['density']:.0%} | {ratios} |")
    return "\n".join([*lines, ""])


def _less_work(study: str) -> list[dict[str, Any]]:
    return json.loads((RESULTS / f"less_work_{study}.json").read_text(encoding="utf-8"))["rows"]


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


def architectures() -> str:
    """How every working backbone works: a paragraph and a drawing."""
    parts = []
    for card in drawn_cards():
        where = ", ".join(f"`{name}`" for name in card.code if name.startswith("vitalloy.backbones"))
        parts += [f"## {card.name}", "", _text(card.how), "", f"![{card.name}](pictures/{card.system}.svg)", ""]
        parts += [f"{_source(card)} In the code: {where}.", ""]
    return "\n".join(parts)


def drawn_cards() -> list[Card]:
    from vitalloy import systems

    return sorted((card for card in systems() if card.stages), key=lambda card: card.name.casefold())


def drawings_of_cards() -> dict[Path, str]:
    """The drawing of each architecture, by file."""
    return {PICTURES / f"{card.system}.svg": drawings.architecture(card) for card in drawn_cards()}


def drawings_of_zoo() -> dict[Path, str]:
    """Published accuracy against parameters and, where `make bench` has run, against latency; by file."""
    rows = [row for row in all_models() if row["top1"] is not None]
    costs = {"parameters": ("parameters (M)", {row["name"]: row["params"] / 1e6 for row in rows})}
    found = sorted(RESULTS.glob("*.json"), key=lambda path: path.stat().st_mtime)
    if timed := [result for path in found if "latency_ms" in (result := json.loads(path.read_text(encoding="utf-8")))]:
        result = timed[-1]
        label = f"latency of one image, fp32, fused, {result['threads']} thread(s) (ms)"
        costs["latency"] = (label, result.get("latency_ms", {}))
    families = zoo_families([row["name"] for row in rows])
    return {
        PICTURES / f"zoo_{cost}.svg": drawings.zoo(
            [
                drawings.Point(row["name"], families[row["name"]], values[row["name"]], row["top1"])
                for row in rows
                if row["name"] in values
            ],
            label,
        )
        for cost, (label, values) in costs.items()
        if values
    }


def zoo_families(names: list[str]) -> dict[str, str]:
    """The family of each model: what the names of its class have in common."""
    from vitalloy.registry import entry

    members: dict[type, list[str]] = {}
    for name in names:
        members.setdefault(entry(name).cls, []).append(name)
    return {name: _shared(group) for group in members.values() for name in group}


PARTS: dict[str, Callable[[], str]] = {
    "recipe": recipe_table,
    "models": model_table,
    "systems": gallery,
    "architectures": architectures,
    "compression_study": compression_study,
    "quantized": quantized,
    "perturbation": perturbation,
    "less_work_accuracy": less_work_accuracy,
    "less_work_speed": less_work_speed,
    "sparse_crossover": sparse_crossover,
    "block_crossover": block_crossover,
}


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
    old = {
        path: text
        for path, text in (drawings_of_cards() | drawings_of_zoo()).items()
        if not path.is_file() or text != path.read_text(encoding="utf-8")
    }
    for path, text in old.items():
        if not check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        sys.stdout.write(f"{path.name}: {'out of date' if check else 'drawn'}\n")
    return int(check and bool(stale or old))


def _system(card: Card) -> list[str]:
    works = card.status == "works"
    lines = [f"### {card.name}", "", f"`{card.system}` · **{card.status}** · {_text(card.summary)}", ""]
    if source := _source(card):
        lines += [source, ""]
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


def _shared(names: list[str]) -> str:
    """The words that all names begin with: `pvt_v2_b0`, `pvt_v2_b1` -> `pvt_v2`; a single name is its own."""
    words = takewhile(lambda column: len(set(column)) == 1, zip(*(name.split("_") for name in names), strict=False))
    return "_".join(column[0] for column in words)


def _source(card: Card) -> str:
    """Where a system was published, as a sentence."""
    title = _text(card.title or "; ".join(card.papers))
    facts = ", ".join(filter(None, (card.authors, card.venue, card.arxiv and f"arXiv {card.arxiv}")))
    source = f"{title}. {_text(facts)}" if title and facts else title or _text(facts)
    return f"{source}.".replace("..", ".") if source else ""


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

"""The report page: complete, self-contained, safe with hostile names, and atomic on disk."""

from __future__ import annotations

import itertools
import os
import re
from html.parser import HTMLParser

import pytest
from metrics_samples import HOSTILE, sample, without
from PIL import Image

from vitalloy.errors import RunError
from vitalloy.report import write_report

SECTIONS = ["answer", "training", "errors", "confidence", "saliency", "corruptions", "speed", "budget", "repeat"]
VOID = {"meta", "br", "img", "link", "hr", "input"}


class Page(HTMLParser):
    """Parses a page and keeps its tags, its text and what does not nest."""

    def __init__(self, html: str):
        super().__init__()
        self.html, self.open, self.wrong, self.tags, self.words = html, [], [], [], []
        self.feed(html)
        self.close()
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def sections(self):
        return [a["id"] for a in self.all("section")]


def write(folder, metrics) -> Page:
    path = write_report(metrics, folder)
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(9):
        Image.new("RGB", (8, 8), (20 * i, 90, 40)).save(tmp_path / "images" / f"{i}.png")
    return tmp_path


VARIANTS = {
    "digits": sample(),
    "many": sample([f"class {i}" for i in range(120)], epochs=300),
    "one epoch": sample(epochs=1),
    "no int8": without(sample(), "int8"),
    "no budget": sample() | {"budget": None},
    "hostile": sample(HOSTILE),
    "nothing": {},
    "name only": {"run": {"name": "x"}},
}


@pytest.mark.parametrize("kind", VARIANTS)
def test_page_is_well_formed_and_self_contained(folder, kind):
    page = write(folder, VARIANTS[kind])
    assert not page.wrong and not page.open
    assert len(page.html) < 1_500_000
    for _, attrs in page.tags:
        for name, value in attrs.items():
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                assert value.startswith(("data:image/", "#")), (name, value[:80])
            if name != "title" and name != "aria-label":
                assert "url(" not in (value or "")
    style = page.html[page.html.index("<style>") : page.html.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    assert "default-src 'none'" in page.html
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert all(a["href"][1:] in ids for a in page.all("a"))
    assert "nan" not in page.text.lower().split() and "None" not in page.text and "Undefined" not in page.text


def test_full_page_has_every_section_and_its_numbers(folder):
    page = write(folder, sample())
    assert page.sections == SECTIONS
    heading = (
        "97.8% of 270 test images right (95% interval 95.2 to 99.1); int8 is 3.6× smaller and 1.4× faster at 97.4%"
    )
    assert heading in page.text.replace("97.8%  of", "97.8% of")
    for number in ("5.49 M", "3.29 ms", "6.20 MB", "1.2 points", "3.81e-6", "27.4 points below clean", "3 min 12 s"):
        assert number in page.text, number
    assert "3 of 27 images, 11.1%" in page.text  # 8 taken for 1
    assert "best: epoch 26" in page.text and "meets it" in page.text
    assert "vitalloy fit --recipe" in page.text and "vitalloy fit digits --budget '10ms, 25MB'" in page.text
    levels = [int(t[1]) for t, _ in page.tags if re.fullmatch("h[1-6]", t)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))


def test_every_picture_and_plot_has_words(folder):
    page = write(folder, sample())
    assert len(page.all("img")) == 9 and all(a["alt"] for a in page.all("img"))
    plots = page.all("svg")
    assert len(plots) == 8 and all(a["role"] == "img" and a["aria-label"] and a["viewbox"] for a in plots)


@pytest.mark.parametrize(
    ("missing", "section"),
    [
        ("history", "training"),
        ("explanation", "saliency"),
        ("corruptions", "corruptions"),
        ("budget", "budget"),
        ("run", "repeat"),
    ],
)
def test_a_missing_part_takes_its_section_along(folder, missing, section):
    for metrics in (without(sample(), missing), sample() | {missing: None}):
        assert write(folder, metrics).sections == [s for s in SECTIONS if s != section]


def test_missing_test_and_runtimes(folder):
    page = write(folder, without(sample(), "test", "runtimes", "int8", "onnx"))
    assert page.sections == ["answer", "training", "saliency", "corruptions", "budget", "repeat"]
    assert "digits-1 has no test result yet" in page.text


def test_hostile_names_stay_text(folder):
    metrics = sample(HOSTILE)
    metrics["run"]["command"] = "vitalloy fit '<img src=x onerror=alert(1)>'"
    metrics["explanation"]["images"][0]["file"] = '"><img src=http://example.org/x.png>'
    page = write(folder, metrics)
    assert not page.wrong and not page.all("script")
    assert "<script" not in page.html and "<img src=" not in page.html.replace('<img src="data:', "")
    assert "<script>alert('x')</script>" in page.text and "{{ 7 * 7 }}" in page.text and "猫 кот 🐈" in page.text
    assert page.html.count("</style>") == 1
    assert "\x07" not in page.html and "lone\N{REPLACEMENT CHARACTER}" in page.text
    shown = [w for w in page.words if w.startswith("xxx")]
    assert shown and any(w.endswith("…") for w in shown)  # 300 letters are cut where space is short


def test_many_classes_show_the_weakest_and_no_labels(folder):
    page = write(folder, VARIANTS["many"])
    assert page.text.count("class 119") == 0 and "105 stronger classes are not shown" in page.text
    rows = re.findall(r'<tr><td class="who"><bdi>(class \d+)</bdi>', page.html)
    assert len(rows) == 15 and rows[0] == "class 8"


def test_a_thousand_classes_stay_small(folder):
    n = 1000
    confusion = [[0] * n for _ in range(n)]
    for i in range(n):
        for k in range(8):
            confusion[i][(i * k * 7 + k) % n] += 1
    metrics = sample()
    metrics["data"]["classes"] = [f"c{i}" for i in range(n)]
    metrics["test"]["confusion"] = confusion
    page = write(folder, metrics)
    assert len(page.html) < 700_000 and "adds up 9 neighbouring classes" in page.text


def test_both_colour_schemes_have_every_colour_and_enough_contrast(folder):
    html = write(folder, sample()).html
    roots = r":root \{(.*?)\n\}.*?prefers-color-scheme: dark\) \{\s*:root \{(.*?)\}"
    light, dark = (dict(re.findall(r"--(\w+): (#\w+);", part)) for part in re.search(roots, html, re.S).groups())
    assert set(light) == set(dark) == {"paper", "card", "ink", "muted", "rule", "teal", "copper", "empty"}
    for scheme in (light, dark):
        for text in ("ink", "muted", "teal", "copper"):
            assert _contrast(scheme[text], scheme["paper"]) > 4.5, text
            assert _contrast(scheme[text], scheme["card"]) > 4.5, text
    used = set(re.findall(r"var\(--(\w+)\)", html))
    assert used <= set(light) | {"serif", "sans", "mono"}
    assert not re.search(r'(fill|stroke)="(?!none)', html)  # plots take their colours from the page
    assert "@media print" in html


def _contrast(one: str, other: str) -> float:
    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((light(one), light(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_pictures_that_cannot_be_read_leave_a_note(folder):
    (folder / "images" / "1.png").unlink()
    (folder / "images" / "2.png").write_bytes(b"not a picture")
    secret = folder.parent / "outside.png"
    Image.new("RGB", (8, 8)).save(secret)
    metrics = sample()
    metrics["explanation"]["images"][3]["file"] = "../outside.png"
    page = write(folder, metrics)
    assert len(page.all("img")) == 6
    assert "3 pictures could not be read and are left out" in page.text


def test_large_pictures_are_made_smaller_and_the_page_stays_bounded(folder):
    noise = Image.frombytes("RGB", (500, 500), os.urandom(500 * 500 * 3))
    noise.save(folder / "images" / "0.png")
    metrics = sample()
    metrics["explanation"]["images"] = [metrics["explanation"]["images"][0]] * 12
    page = write(folder, metrics)
    assert 0 < len(page.all("img")) < 12 and len(page.html) < 1_200_000
    assert page.all("img")[0]["src"].startswith("data:image/jpeg")
    assert f"{12 - len(page.all('img'))} more lie in the run folder" in page.text


def test_images_may_lie_in_another_folder(folder, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    html = write_report(sample(), run, images=folder).read_text(encoding="utf-8")
    assert len(Page(html).all("img")) == 9


def test_writing_replaces_whole_files_and_leaves_nothing_behind(folder, monkeypatch):
    write(folder, sample())
    before = (folder / "report.html").read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(RunError, match="No space left"):
        write_report(sample(epochs=2), folder)
    assert (folder / "report.html").read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == ["images", "report.html"]


def test_missing_folder_is_a_run_error(tmp_path):
    with pytest.raises(RunError, match="no such folder"):
        write_report(sample(), tmp_path / "nowhere")

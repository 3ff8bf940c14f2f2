"""`vitalloy deepfake` as a person runs it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import clips
import numpy as np
import pytest
import torch
import typer
from PIL import Image

from vitalloy.applications.deepfake import NetworkA, NetworkB, save_network
from vitalloy.cli import app, main


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def run(*words: object, folder: Path) -> Done:
    """The command in this process: starting one takes longer than what is tested."""
    out, err, code, before = io.StringIO(), io.StringIO(), 0, sys.argv
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), inside(folder):
        sys.argv = ["vitalloy", "deepfake", *map(str, words)]
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        finally:
            sys.argv = before
    return Done(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Weights of both networks, and a folder of videos: a face, no face, no video."""
    folder = tmp_path_factory.mktemp("deepfake")
    torch.manual_seed(0)
    for network in (NetworkA("pvt_v2_nano", 64), NetworkB("pvt_v2_nano", 64)):
        save_network(network, folder / f"{network.net}.safetensors", {"summary": "trained on nothing"})
    (folder / "videos").mkdir()
    clips.write(folder / "videos" / "face.mp4", clips.moving(clips.portrait(), 12, (256, 256)))
    clips.write(folder / "videos" / "wall.mp4", clips.no_face(12))
    (folder / "videos" / "text.mp4").write_text("no video")
    return folder


def test_a_folder_with_both_networks_and_a_report(place):
    done = run(
        "videos",
        "--weights",
        "a.safetensors",
        "b.safetensors",
        "--frames",
        3,
        "--report",
        "out.html",
        "--json",
        folder=place,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [Path(v["file"]).name for v in found["verdicts"]] == ["face.mp4", "text.mp4", "wall.mp4"]
    assert [v["label"] for v in found["verdicts"]][1:] == ["unreadable", "no face"]
    assert set(found["verdicts"][0]["networks"]) == {"a", "b"}
    assert [n["about"] for n in found["setup"]["networks"]] == ["trained on nothing"] * 2
    page = (place / "out.html").read_text(encoding="utf-8")
    assert found["setup"]["networks"][0]["sha256"] in page
    assert "meaningless" not in page


def test_the_scores_are_printed_frame_by_frame(place):
    done = run("scan", "videos/face.mp4", "--weights", "a.safetensors", "--frames", 3, folder=place)
    assert done.returncode == 0, done.stderr
    verdict, frames = done.stdout.splitlines()
    assert "3 faces in 3 frames" in verdict
    assert " ± " in verdict
    assert len(frames.split()) == 6  # a time and a score each


def test_without_weights_there_is_no_verdict(place, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = run("videos", folder=place)
    assert done.returncode == 2
    assert "Deressa/GenConViT" in done.stderr
    assert done.stdout == ""


def test_demo_marks_every_output(place):
    done = run("videos/face.mp4", "--demo", "--net", "a", "--frames", 1, "--report", "demo.html", folder=place)
    assert done.returncode == 0, done.stderr
    assert "demo: meaningless" in done.stdout
    assert "meaningless" in done.stderr
    assert "meaningless" in (place / "demo.html").read_text(encoding="utf-8")
    found = json.loads(run("videos/face.mp4", "--demo", "--net", "a", "--frames", 1, "--json", folder=place).stdout)
    assert found["setup"]["demo"] is True
    assert found["verdicts"][0]["demo"] is True


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothing.mp4", "--weights", "a.safetensors"], "nothing.mp4"),
        (["videos/text.mp4", "--weights", "a.safetensors"], "not a video"),
        (["videos", "--weights", "a.safetensors", "a.safetensors"], "second file for network A"),
        (["videos", "--weights", "videos/text.mp4"], "text.mp4"),
        (["videos", "--weights", "a.safetensors", "--detector", "eyes"], "eyes"),
        (["videos", "--weights", "a.safetensors", "--frames", "0"], "frames=0"),
        (["videos", "--weights", "a.safetensors", "--device", "abacus"], "device 'abacus'"),
        (["videos", "--weights", "a.safetensors", "--report", "videos"], "no report can be written"),
        (["evaluate", "videos", "--weights", "a.safetensors"], "none of the known ways"),
    ],
)
def test_mistakes_are_one_line(place, words, said):
    done = run(*words, folder=place)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_evaluate_goes_on_from_its_results(place, tmp_path):
    rng = np.random.default_rng(0)
    for kind in ("fake", "real"):
        (tmp_path / kind).mkdir()
        for i in range(2):
            noise = rng.integers(0, 30, clips.portrait().shape, np.uint8)
            Image.fromarray(np.minimum(clips.portrait(), 225) + noise).save(tmp_path / kind / f"{i}.png")
    words = ["evaluate", tmp_path, "--weights", place / "a.safetensors", "--results", tmp_path / "seen.jsonl", "--json"]
    first = run(*words, "--published-results", tmp_path / "theirs.json", folder=place)
    assert first.returncode == 0, first.stderr
    found = json.loads(first.stdout)
    assert found["videos"]["videos"] == 4
    assert found["faces"]["n_fake"] == found["faces"]["n_real"] == 2
    lines = (tmp_path / "seen.jsonl").read_text()
    again = json.loads(run(*words, "--report", tmp_path / "out.html", folder=place).stdout)
    assert (tmp_path / "seen.jsonl").read_text() == lines
    assert again["videos"] == found["videos"]
    assert "0.png" in (tmp_path / "out.html").read_text(encoding="utf-8")
    recomputed = run("evaluate", tmp_path / "theirs.json", "--json", folder=place)
    assert json.loads(recomputed.stdout)["accuracy"] == pytest.approx(found["videos"]["accuracy"])


def test_train_then_use_then_export(place, tmp_path):
    faces = tmp_path / "faces"
    faces.mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        crop = clips.portrait()[60:220, 150:310]
        Image.fromarray(np.roll(crop, rng.integers(-8, 8, 2), (0, 1))).save(faces / f"person{i}.png")
    trained = run(
        "train",
        faces,
        "--out",
        tmp_path / "out",
        "--backbone",
        "pvt_v2_nano",
        "--img-size",
        64,
        "--epochs",
        1,
        "--batch-size",
        4,
        "--json",
        folder=place,
    )
    assert trained.returncode == 0, trained.stderr
    weights = Path(json.loads(trained.stdout)["file"])
    assert weights.is_file()
    used = run(place / "videos" / "face.mp4", "--weights", weights, "--json", folder=place)
    assert "forgeries made from them" in json.loads(used.stdout)["setup"]["networks"][0]["about"]
    made = run(
        "export",
        place / "videos" / "face.mp4",
        "--weights",
        weights,
        "--int8",
        "--output",
        tmp_path,
        "--json",
        folder=place,
    )
    assert made.returncode == 0, made.stderr
    (report,) = json.loads(made.stdout)
    assert report["max_change"] < 0.2
    exported = run(place / "videos" / "face.mp4", "--weights", report["path"], "--json", folder=place)
    ours, theirs = (json.loads(d.stdout)["verdicts"][0]["score"] for d in (used, exported))
    assert theirs == pytest.approx(ours, abs=0.2)
    twice = run("export", place / "videos" / "face.mp4", "--weights", report["path"], folder=tmp_path)
    assert twice.returncode == 2
    assert "ONNX file already" in twice.stderr


def test_one_file_or_two_behind_weights():
    group = typer.main.get_command(app).commands["deepfake"]
    for words in (["--weights", "a.pth", "b.onnx", "x.mp4"], ["x.mp4", "--weights", "a.pth", "--weights", "b.onnx"]):
        context = group.make_context("deepfake", list(words))
        name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
        given = command.make_context(name, rest).params
        assert [str(w) for w in given["weights"]] == ["a.pth", "b.onnx"]
        assert [str(v) for v in given["videos"]] == ["x.mp4"]

"""The main job on the embedded digits, small: one short run is made once and used by most tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vitalloy
from vitalloy.errors import CheckpointError, DataError, ExportError, RecipeError, RunError
from vitalloy.runs import resume, stages
from vitalloy.training.recipe import Recipe

QUICK = {"epochs": 3, "threads": 1, "explain_images": 4, "corruptions": ["contrast", "gaussian_noise"], "seed": 3}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return vitalloy.fit("digits", name="quick", runs=tmp_path_factory.mktemp("runs"), overrides=QUICK)


def test_run_folder_is_complete(run):
    files = {p.relative_to(run.folder).as_posix() for p in run.folder.rglob("*") if p.is_file()}
    wanted = {"recipe.toml", "model.safetensors", "model.json", "model.onnx", "model.int8.onnx", "metrics.json"}
    assert wanted | {"report.html", "checkpoints/last.ckpt", "checkpoints/best.ckpt"} <= files
    assert any(f.startswith("logs/events") for f in files)
    assert not any(f.endswith(".part") for f in files)


def test_metrics_are_real(run):
    metrics = json.loads((run.folder / "metrics.json").read_text())
    test = metrics["test"]
    assert test["n"] == 269 and test["top1"] > 0.6
    assert test["top1_interval"][0] < test["top1"] < test["top1_interval"][1]
    assert sum(map(sum, test["confusion"])) == 269
    assert sum(test["confusion"][i][i] for i in range(10)) == round(test["top1"] * 269)
    assert 0 <= test["ece_calibrated"] < test["ece"]
    assert metrics["onnx"]["max_abs_diff"] < 1e-3 and metrics["onnx"]["agreement"] == 1
    int8 = metrics["int8"]
    assert abs(int8["top1"] - test["top1"]) < 0.05
    assert int8["size_bytes"] == (run.folder / "model.int8.onnx").stat().st_size < 0.4 * metrics["onnx"]["size_bytes"]
    assert int8["speedup"] == pytest.approx(metrics["onnx"]["latency_ms"] / int8["latency_ms"])
    assert [r["name"] for r in metrics["runtimes"]] == ["PyTorch fp32", "ONNX Runtime fp32", "ONNX Runtime int8"]
    assert {c["name"] for c in metrics["corruptions"]} == {"contrast", "gaussian_noise"}
    assert [row["epoch"] for row in metrics["history"]] == [1, 2, 3]
    assert len(metrics["explanation"]["images"]) == 4


def test_explanations_and_report_show_the_run(run):
    for row in run.metrics["explanation"]["images"]:
        assert min(Image.open(run.folder / row["file"]).size) >= 160
    page = run.report.read_text()
    assert f"{100 * run.metrics['test']['top1']:.1f}" in page and run.metrics["int8"]["verdict"][:20] in page


def test_evaluate_gives_the_same_number_on_the_same_images(run):
    found = vitalloy.evaluate(run.folder)
    assert found["top1"] == run.metrics["test"]["top1"] and found["n"] == 269
    assert vitalloy.evaluate(run.folder, "digits")["n"] == 269  # its own data: never its training images


def test_bundle_and_exports_agree(run, tmp_path):
    model = vitalloy.load(run.folder)
    assert model.classes == [str(i) for i in range(10)] and not model.training
    made = vitalloy.export(run.folder, "pt2", tmp_path / "m.pt2")
    images = torch.randn(3, 3, 32, 32)
    loaded = torch.export.load(made["path"]).module()
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), model(images), atol=1e-4, rtol=1e-4)
    made = vitalloy.export(run.folder, "torchscript", tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.load(made["path"])(images), model(images), atol=1e-4, rtol=1e-4)
    with pytest.raises(ExportError, match=r"'tflite' is not one of onnx"):
        vitalloy.export(run.folder, "tflite")


def test_predict_files(run, tmp_path):
    from sklearn.datasets import load_digits

    digits = load_digits()
    for i in range(12):
        Image.fromarray(np.uint8(digits.images[i] * 255 / 16)).save(tmp_path / f"{i:02d}.png")
    found = vitalloy.predict(run.folder, [tmp_path], top_k=3, explain_to=tmp_path / "why")
    assert sum(p.label == str(digits.target[i]) for i, p in enumerate(found)) >= 8
    assert all(1 >= p.top[0][1] >= p.top[1][1] >= p.top[2][1] >= 0 for p in found)
    assert len(list((tmp_path / "why").iterdir())) == 12
    (tmp_path / "broken.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"broken\.png"):
        vitalloy.predict(run.folder, [tmp_path / "broken.png"])
    with pytest.raises(CheckpointError, match="no such run folder"):
        vitalloy.predict(tmp_path / "nowhere", [tmp_path / "00.png"])


def test_recipe_repeats_the_run(run, tmp_path):
    recipe = Recipe.from_toml(run.folder / "recipe.toml")
    assert recipe.automatic == []
    again = vitalloy.fit(
        recipe=recipe,
        runs=tmp_path,
        name="again",
        overrides={"export": False, "corruptions": [], "explain_images": 0},
    )
    ours, theirs = run.load().state_dict(), again.load().state_dict()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert again.metrics["test"]["top1"] == run.metrics["test"]["top1"]
    assert "onnx" not in again.metrics and again.report.is_file()


def test_a_failed_export_does_not_take_the_test_results_with_it(tmp_path, monkeypatch):
    def fail(*_args):
        raise ExportError("no such operator")

    monkeypatch.setattr(stages, "export_float", fail)
    short = {"epochs": 1, "threads": 1, "corruptions": [], "explain_images": 0, "model": "vit_nano"}
    with pytest.raises(ExportError, match="no such operator"):
        vitalloy.fit("digits", name="half", runs=tmp_path, overrides=short)
    assert json.loads((tmp_path / "half" / "metrics.json").read_text())["test"]["n"] == 269
    assert (tmp_path / "half" / "report.html").is_file()
    assert vitalloy.load(tmp_path / "half").classes == [str(i) for i in range(10)]


def test_a_run_is_not_overwritten_by_accident(run):
    with pytest.raises(RunError, match="--overwrite"):
        vitalloy.fit("digits", name="quick", runs=run.folder.parent, overrides=QUICK)
    with pytest.raises(RunError, match="no such run folder"):
        resume(run.folder / "nowhere")


def folder_of_shapes(root: Path, per_class: int = 14) -> Path:
    rng = np.random.default_rng(0)
    for name, box in (("rote Kreise", False), ("zelené čtverce", True)):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            canvas = rng.integers(0, 60, (40, 48, 3), dtype=np.uint8)
            y, x = rng.integers(5, 20, 2)
            canvas[y : y + 14, x : x + 14, int(box)] = 230
            Image.fromarray(canvas).save(root / name / f"bild {i}.png")
    return root


def test_a_folder_of_images_with_a_broken_one(tmp_path):
    data = folder_of_shapes(tmp_path / "data")
    broken = data / "rote Kreise" / "bild 3.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:60])
    with pytest.raises(DataError, match=r"bild 3\.png"):
        vitalloy.fit(data, runs=tmp_path / "runs", name="shapes")
    assert not (tmp_path / "runs").exists()
    broken.write_bytes(whole)
    short = {"epochs": 2, "threads": 1, "export": False, "corruptions": [], "explain_images": 2, "model": "vit_nano"}
    run = vitalloy.fit(data, runs=tmp_path / "runs", name="shapes", overrides=short)
    assert run.metrics["data"]["classes"] == ["rote Kreise", "zelené čtverce"]
    assert run.metrics["explanation"]["method"] == "rollout"
    assert vitalloy.predict(run.folder, [broken])[0].label in run.metrics["data"]["classes"]


def test_fine_tuning_and_probing_from_weights(run, tmp_path):
    data = folder_of_shapes(tmp_path / "data")
    short = {"epochs": 1, "threads": 1, "export": False, "corruptions": [], "explain_images": 0, "model": "cvt_nano"}
    short |= {"img_size": 32, "weights": str(run.folder / "model.safetensors")}
    probed = vitalloy.fit(data, runs=tmp_path, name="probe", overrides={**short, "probe": True}).load().state_dict()
    start = run.load().state_dict()
    body = [k for k in start if not k.startswith("head.")]
    assert body and all(torch.equal(probed[k], start[k]) for k in body)
    assert probed["head.weight"].shape[0] == 2
    tuned = vitalloy.fit(data, runs=tmp_path, name="tune", overrides=short).load().state_dict()
    assert any(not torch.equal(tuned[k], start[k]) for k in body)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights(tmp_path):
    script = (
        "import vitalloy; from vitalloy.runs import resume; import sys\n"
        "over = {'epochs': 2, 'img_size': 16, 'threads': 1, 'export': False, 'corruptions': [], 'explain_images': 0, 'ema': True,"
        " 'mixup': 0.2, 'seed': 5, 'model': 'vit_nano'}\n"
        "resume(sys.argv[2]) if sys.argv[1] == 'resume' else"
        " vitalloy.fit('digits', name=sys.argv[1], runs=sys.argv[2], overrides=over)\n"
    )

    def start(*args: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-c", script, *args], env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL
        )

    assert start("whole", str(tmp_path)).wait() == 0
    killed = start("killed", str(tmp_path))
    last = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 300
    while not last.exists() and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)  # into the next epoch
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL and not (tmp_path / "killed" / "model.safetensors").exists()
    assert start("resume", str(tmp_path / "killed")).wait() == 0
    ours = vitalloy.load(tmp_path / "whole").state_dict()
    theirs = vitalloy.load(tmp_path / "killed").state_dict()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    raw = [
        torch.load(tmp_path / n / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for n in ("whole", "killed")
    ]
    assert all(torch.equal(raw[0][k], raw[1][k]) for k in raw[0])


def test_a_model_for_clips_is_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(RecipeError, match="uniformer_video_nano takes clips"):
        vitalloy.fit("digits", name="clips", runs=tmp_path, overrides={"model": "uniformer_video_nano"})

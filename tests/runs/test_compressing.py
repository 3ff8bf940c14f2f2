"""Compressing a run on the embedded digits: everything that is promised is measured, kept and can be used."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import vitalloy
from vitalloy.errors import CompressionError, ExportError, ModelError, RecipeError, RunError
from vitalloy.runs.budget import Budget

QUICK = {"epochs": 4, "threads": 1, "explain_images": 0, "corruptions": [], "seed": 3, "export": False}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return vitalloy.fit("digits", name="quick", runs=tmp_path_factory.mktemp("runs"), overrides=QUICK).folder


def batches(run):
    from vitalloy.data import load_data, make_loader
    from vitalloy.runs import transform_of

    test = load_data("digits", seed=3).test.with_transform(transform_of(vitalloy.load(run)))
    return make_loader(test, 64, train=False)


def test_auto_takes_the_fastest_that_keeps_the_budget_and_reports_the_rest(run):
    made = vitalloy.compress_run(run, budget="1s, 1MB, -3%")
    report = made.report
    assert report.met and report.after.execution == "integer layers" and report.after.size_bytes < 1e6
    assert report.before.top1 - report.after.top1 <= 0.03
    measured = [t for t in report.tried if t.latency_ms is not None]
    assert {"float", "onnx", "int8", "int8_dynamic"} <= {t.method for t in measured}
    assert all(t.images == 269 and t.top1_interval[0] <= t.top1 <= t.top1_interval[1] for t in measured)
    assert {t.method: t.problem is None for t in report.tried if t not in measured} in ({}, {"openvino": False})

    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["compression"][0]["chosen"] == report.after.name
    page = (run / "report.html").read_text()
    assert "What compression gives and costs" in page and report.verdict.split(":")[0] in page


def test_the_result_is_a_bundle_that_predicts_and_evaluates(run, tmp_path):
    made = vitalloy.compress_run(run, "int8")
    folder = run / made.report.folder
    assert made.report.folder == "compressed/int8"
    assert vitalloy.evaluate(folder)["top1"] == pytest.approx(made.report.after.top1)
    images = torch.stack([image for image, *_ in batches(run).dataset][:4])
    torch.testing.assert_close(vitalloy.load(folder)(images), made.model(images))
    assert {p.name for p in folder.iterdir()} == {"int8.onnx", "model.json", "recipe.toml"}
    with pytest.raises(ExportError, match="already"):
        vitalloy.export(folder)
    picture = tmp_path / "five.png"
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(picture)
    assert len(vitalloy.predict(folder, [picture])[0].top) == 5
    with pytest.raises(ModelError, match="outside PyTorch"):
        vitalloy.predict(folder, [picture], explain_to=tmp_path / "why.png")


def test_a_published_method_gives_a_module_its_layers_and_a_file_that_runs(run):
    made = vitalloy.compress_run(run, "easyquant", weights=8, activations=8)
    after = made.report.after
    assert isinstance(made.model, torch.nn.Module) and after.execution == "integer layers" and after.file
    assert abs(after.top1 - made.report.before.top1) < 0.05
    assert len(made.report.layers) > 20 and all(row["weight_bits"] == 8 for row in made.report.layers)
    assert vitalloy.evaluate(run / made.report.folder)["top1"] == pytest.approx(after.top1)


def test_without_labels_the_answers_are_held_to_the_float_model(run):
    model = vitalloy.load(run).train()
    images = torch.cat([batch for batch, *_ in batches(run)])[:48]
    made = vitalloy.compress(model, images, "int8")
    assert made.report.after.top1 is None and made.report.after.agreement > 0.9 and made.report.met is None
    assert made.model(images[:2]).shape == (2, 10) and model.training


def test_auto_goes_on_without_a_runtime_that_is_not_installed(run, monkeypatch):
    def missing(*args, **kwargs):
        raise ExportError("OpenVINO is not installed")

    monkeypatch.setattr("vitalloy.runs.trials.quantize_openvino", missing)
    images = torch.cat([batch for batch, *_ in batches(run)])[:32]
    made = vitalloy.compress(vitalloy.load(run), images, budget="-10%")
    failed = made.report.tried[-1]
    assert failed.method == "openvino" and failed.problem == "OpenVINO is not installed" and failed.latency_ms is None
    assert made.report.after.runtime == "ONNX Runtime" and made.model(images[:2]).shape == (2, 10)


def test_what_cannot_work_is_refused_before_anything_is_made(run):
    wrong = [
        {"method": "int9"},
        {"method": "int8", "weights": 4},
        {"method": "int8", "rounds": 3},
        {"method": "aphq", "epochs": 3},
        {"method": "fliqs", "rounds": 3},
    ]
    for arguments in wrong:
        with pytest.raises(CompressionError):
            vitalloy.compress_run(run, **arguments)
    with pytest.raises(RecipeError):
        vitalloy.compress_run(run, budget="fast")
    with pytest.raises(RunError):
        vitalloy.compress_run(run / "nowhere")
    assert not list((run / "compressed").glob(".*"))


def test_a_budget_may_be_relative_to_the_float_model():
    assert Budget.parse("3ms, 1MB, -0.5%", relative=True) == Budget("3ms, 1MB, -0.5%", 3.0, 1.0, None, 0.005)
    with pytest.raises(RecipeError):
        Budget.parse("-0.5%")

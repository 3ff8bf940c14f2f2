"""Less work per image on a run of the embedded digits: chains of methods, bundles, exits, and the report's pictures."""

from __future__ import annotations

import json

import pytest
import torch

import vitalloy
from vitalloy.compression.tokens.lgvit import EarlyExit
from vitalloy.errors import CheckpointError, CompressionError

QUICK = {
    "model": "efficientformer_nano",
    "epochs": 4,
    "threads": 1,
    "explain_images": 0,
    "corruptions": [],
    "seed": 3,
    "export": False,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return vitalloy.fit("digits", name="quick", runs=tmp_path_factory.mktemp("runs"), overrides=QUICK).folder


def images(run):
    from vitalloy.data import load_data
    from vitalloy.runs import transform_of

    test = load_data("digits", seed=3).test.with_transform(transform_of(vitalloy.load(run)))
    return torch.stack([test[i][0] for i in range(48)])


@pytest.mark.slow
def test_a_chain_is_one_report_and_its_result_runs_from_a_file(run):
    made = vitalloy.compress_run(run, "sit+lpvit+int8", macs=0.8, epochs=1)
    report = made.report
    assert [t.method for t in report.tried] == [
        "float", "onnx", "sit", "sit", "sit+lpvit", "sit+lpvit", "sit+lpvit+int8",
    ]  # fmt: skip
    float_, sit, lpvit, last = (report.tried[i] for i in (0, 2, 4, 6))
    assert last is report.after and last.macs == lpvit.macs < sit.macs < float_.macs
    assert last.macs / float_.macs < 0.7 and last.size_bytes < float_.size_bytes / 3
    assert all(t.batch_ms > 0 for t in report.tried)
    assert "less work" in report.verdict and "time for a batch" in report.verdict
    assert report.folder == "compressed/sit+lpvit+int8"
    assert vitalloy.evaluate(run / report.folder)["top1"] == pytest.approx(last.top1)
    part = json.loads((run / "metrics.json").read_text())["compression"][-1]
    assert [step["method"] for step in part["steps"]] == ["sit", "lpvit"] and len(part["pictures"]) == 4
    page = (run / "report.html").read_text()
    assert "What sit and lpvit left out" in page and "Patches of one colour" in page and "multiply-adds stay" in page


def test_a_reduced_model_is_explained_exported_and_trained_on(run, tmp_path):
    made = vitalloy.compress_run(run, "lpvit", macs=0.7, epochs=1)
    folder, x = run / made.report.folder, images(run)[:4]
    loaded = vitalloy.load(folder)
    torch.testing.assert_close(loaded(x), made.model(x))
    assert {p.name for p in folder.iterdir()} == {"model.safetensors", "model.json", "lpvit.onnx", "recipe.toml"}
    assert vitalloy.evaluate(folder)["top1"] == pytest.approx(made.report.after.top1)
    assert vitalloy.export(folder, output=tmp_path)["max_abs_diff"] < 1e-3
    assert vitalloy.explain(loaded, x).maps.shape == (4, *x.shape[2:])
    logits = loaded.train()(x)
    logits.sum().backward()
    assert all(p.grad is not None for p in loaded.get_classifier().parameters())


def test_exits_are_calibrated_for_a_budget_and_stay_so(run):
    made = vitalloy.compress_run(run, "lgvit", epochs=1, exits=(4,))
    folder = run / made.report.folder
    assert isinstance(made.model, EarlyExit) and (folder / "lgvit" / "cascade.json").is_file()
    found = vitalloy.calibrate_exits(folder, "-20%")
    test = found["test"]
    assert sum(test["shares"]) == pytest.approx(1) and test["images"] == 269
    assert found["chosen"]["accuracy"] >= found["rows"][0]["accuracy"] - 0.2
    again = vitalloy.load(folder)
    assert list(again.policy.thresholds) == pytest.approx(list(found["chosen"]["thresholds"]))
    from vitalloy.deployment import CascadeModel

    x = images(run)
    cascade = CascadeModel(folder / "lgvit")
    torch.testing.assert_close(cascade(x), again(x), atol=1e-3, rtol=1e-3)
    assert torch.equal(cascade.depths, again.depths)
    page = (run / "report.html").read_text()
    assert "Exits: accuracy against the mean work" in page and "by the exit at which they left" in page
    with pytest.raises(CompressionError, match="nearest"):
        vitalloy.calibrate_exits(folder, "0.001ms")
    with pytest.raises(CompressionError, match="one limit"):
        vitalloy.calibrate_exits(folder, "1ms, 90%")
    with pytest.raises(CompressionError, match="no exits"):
        vitalloy.calibrate_exits(run)


def test_exits_of_an_int8_cascade_are_calibrated_too(run):
    folder = run / vitalloy.compress_run(run, "lgvit+int8", epochs=1, exits=(4,)).report.folder
    found = vitalloy.calibrate_exits(folder, "-20%")
    again = vitalloy.load(folder)
    assert list(again.policy.thresholds) == pytest.approx(list(found["chosen"]["thresholds"]))
    assert (again(images(run)).argmax(1) >= 0).all() and set(again.depths.tolist()) <= {0, 1}


def test_a_bundle_of_a_method_that_is_not_known_is_refused(run, tmp_path):
    vitalloy.save(vitalloy.load(run), tmp_path, {})
    about = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps({**about, "steps": [{"method": "magic", "settings": {}}]}))
    with pytest.raises((CompressionError, CheckpointError), match="magic"):
        vitalloy.load(tmp_path)

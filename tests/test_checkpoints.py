"""Weights: read safely whatever the file, converted, reported in one message; bundles that survive a full disk."""

from __future__ import annotations

import argparse
import errno
import io
import json
import os
import pickle
import random
import zipfile

import huggingface_hub
import pytest
import safetensors.torch
import torch

import vitalloy
from vitalloy import create_model, load_checkpoint
from vitalloy.checkpoints import Loaded, publish, read_state
from vitalloy.errors import CheckpointError, ModelError
from vitalloy.layers.positions import resample_positions

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.zeros(2)}
SMALL = {"depth": 1, "embed_dim": 24, "num_heads": 2}


def vit(num_classes: int = 4, **kwargs):
    return create_model("vit_nano", num_classes=num_classes, **{**SMALL, **kwargs}).eval()


def same(state, wanted=STATE) -> bool:
    return state.keys() == wanted.keys() and all(torch.equal(state[k], wanted[k]) for k in wanted)


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        {"model": STATE},
        {"model": STATE, "epoch": torch.tensor(3), "optimizer": {"lr": torch.tensor(0.1)}},
        {"state_dict": {f"module.{k}": v for k, v in STATE.items()}},
        {"state_dict": {"model": {f"_orig_mod.module.{k}": v for k, v in STATE.items()}}},
        {"model": STATE, "args": argparse.Namespace(lr=0.1, name="run"), "epoch": 3},
        {"model_ema": STATE, "epoch": 1},
    ],
    ids=["plain", "model", "tensors beside", "module", "nested", "arguments", "only averaged"],
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old style"])
def test_the_usual_wrappings_of_a_torch_file(tmp_path, content, zipped):
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    assert same(read_state(tmp_path / "w.pth"))


def test_averaged_weights_are_preferred_when_asked(tmp_path):
    averaged = {k: v + 1 for k, v in STATE.items()}
    torch.save({"model": STATE, "model_ema": averaged}, tmp_path / "w.pth")
    assert same(read_state(tmp_path / "w.pth"))
    assert same(read_state(tmp_path / "w.pth", averaged=True), averaged)


def test_safetensors(tmp_path):
    safetensors.torch.save_file({f"module.{k}": v for k, v in STATE.items()}, tmp_path / "w.safetensors")
    assert same(read_state(tmp_path / "w.safetensors"))


def _torch_file(**kwargs) -> bytes:
    out = io.BytesIO()
    torch.save({"model": STATE}, out, **kwargs)
    return out.getvalue()


def _zip() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("notes.txt", "no weights")
    return out.getvalue()


OLD = {"_use_new_zipfile_serialization": False}
BROKEN = {
    "half.pth": lambda: _torch_file()[:900],
    "half_old.pth": lambda: _torch_file(**OLD)[:300],
    "half.safetensors": lambda: safetensors.torch.save(STATE)[:-5],
    "header.safetensors": lambda: safetensors.torch.save(STATE)[:20],
    "zero.pth": lambda: b"",
    "zero.safetensors": lambda: b"",
    "text.pth": lambda: b"<html>404 Not Found</html>\n" * 20,
    "text.safetensors": lambda: b"<html>404 Not Found</html>\n" * 20,
    "archive.pth": _zip,
    "list.pth": lambda: pickle.dumps([1, 2, 3]),
    "numbers.pth": lambda: pickle.dumps({"lr": 0.1}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_is_no_checkpoint_is_an_error_that_names_it(tmp_path, name):
    (tmp_path / name).write_bytes(BROKEN[name]())
    with pytest.raises(CheckpointError, match=name):
        read_state(tmp_path / name)


@pytest.mark.parametrize("kind", ["zip", "old", "safetensors"])
def test_whatever_the_damage_the_error_is_ours(tmp_path, kind):
    data = {"zip": _torch_file(), "old": _torch_file(**OLD), "safetensors": safetensors.torch.save(STATE)}[kind]
    path, rng = tmp_path / f"w.{'safetensors' if kind == 'safetensors' else 'pth'}", random.Random(0)
    refused = 0
    for trial in range(150):
        damaged = bytearray(data)
        if trial % 3:
            for _ in range(3):
                damaged[rng.randrange(len(data))] = rng.randrange(256)
        else:
            del damaged[rng.randrange(1, len(data)) :]
        path.write_bytes(damaged)
        try:
            read_state(path)
        except CheckpointError:
            refused += 1
    assert refused >= 50  # every truncation at least; other damage may have hit the numbers alone


def test_a_missing_file_or_a_folder_is_an_error(tmp_path):
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(CheckpointError, match="no such file"):
            read_state(path)


class _Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("kind", ["zip", "old style", "bare", "bare, newer protocol"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, kind):
    path, created = tmp_path / "w.pth", tmp_path / "created"
    content = {"model": STATE, "extra": _Harmful(str(created))}
    if kind.startswith("bare"):
        path.write_bytes(pickle.dumps(_Harmful(str(created)), protocol=2 if kind == "bare" else 4))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    told = "not a checkpoint" if kind == "bare, newer protocol" else "refused.*mkdir"
    with pytest.raises(CheckpointError, match=rf"w\.pth: {told}"):
        read_state(path)
    assert not created.exists()
    with pytest.raises(CheckpointError):
        load_checkpoint(vit(), path)
    assert not created.exists()


def test_one_error_names_what_is_missing_unexpected_and_of_another_shape():
    model = vit()
    state = dict(model.state_dict())
    state["norm.gain"] = state.pop("norm.weight")
    state["head.weight"] = torch.zeros(9, 24)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(model, state)
    text = str(raised.value)
    assert "1 missing: norm.weight" in text and "1 unexpected: norm.gain" in text
    assert "head.weight (9, 24) instead of (4, 24)" in text
    assert same(model.state_dict(), before), "a refused file changed the model"
    state["head.weight"] = torch.ones(4, 24)
    loaded = load_checkpoint(model, state, strict=False)
    assert loaded == Loaded(("norm.weight",), ("norm.gain",)) and model.head.weight.eq(1).all()


def test_a_file_of_another_network_is_refused_even_when_not_strict():
    with pytest.raises(CheckpointError, match="does not fit VisionTransformer"):
        load_checkpoint(vit(), STATE, strict=False)


def test_a_classifier_for_other_classes_is_an_error_or_reset():
    source, target = vit(10), vit(4)
    with pytest.raises(CheckpointError, match=r"head\.weight \(10, 24\) instead of \(4, 24\)"):
        load_checkpoint(target, source.state_dict())
    start = target.head.weight.clone()
    loaded = load_checkpoint(target, source.state_dict(), reset_head=True)
    assert set(loaded.reset) == {"head.weight", "head.bias"} and torch.equal(target.head.weight, start)
    assert torch.equal(target.blocks[0].mlp.fc1.weight, source.blocks[0].mlp.fc1.weight)
    assert load_checkpoint(vit(10), source.state_dict(), reset_head=True).reset == ()
    load_checkpoint(vit(0), source.state_dict(), reset_head=True)  # features only


def test_a_position_table_is_resized_to_the_model():
    source = vit(patch_size=16, img_size=224)
    for size in (384, (160, 240)):
        target = vit(patch_size=16, img_size=size)
        load_checkpoint(target, source.state_dict())
        assert torch.equal(target.pos_embed, resample_positions(source.pos_embed, target.grid, prefix=1))
    x = torch.randn(1, 3, 160, 240)
    assert torch.allclose(source(x), target(x), atol=1e-6)
    bad = dict(source.state_dict(), pos_embed=torch.zeros(1, 51, 24))
    with pytest.raises(CheckpointError, match="50 rows"):
        load_checkpoint(target, bad)


def test_the_transformers_librarys_cvt_weights_load_with_equal_logits(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.CvtConfig(embed_dim=[16, 32, 48], num_heads=[1, 2, 3], depth=[1, 2, 3], num_labels=7)
    torch.manual_seed(0)
    theirs = transformers.CvtForImageClassification(config).eval()
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 1.5)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    shape = {"embed_dims": (16, 32, 48), "num_heads": (1, 2, 3), "depths": (1, 2, 3)}
    ours = create_model("cvt_13", num_classes=7, activation="gelu", **shape).eval()
    assert load_checkpoint(ours, tmp_path / "pytorch_model.bin") == Loaded()
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        assert torch.allclose(ours(x), theirs(x).logits, atol=1e-5)


def _bundle(folder, **kwargs):
    model = create_model("cvt_nano", num_classes=3, embed_dims=(8, 16, 24), num_heads=(1, 1, 2), img_size=(40, 48))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
    vitalloy.save(model, folder, **kwargs)
    return model.eval()


def test_a_bundle_brings_back_the_model_its_classes_and_its_preprocessing(tmp_path):
    saved = _bundle(tmp_path / "b", about={"classes": ["ä", "b", "c"], "note": 1})
    saved.default_cfg["mean"] = (0.1, 0.2, 0.3)
    vitalloy.save(saved, tmp_path / "b", about={"classes": ["ä", "b", "c"], "note": 1})
    loaded = vitalloy.load(tmp_path / "b")
    x = torch.randn(2, 3, 40, 48)
    assert torch.equal(loaded(x), saved(x)) and not loaded.training
    assert loaded.classes == ["ä", "b", "c"] and loaded.about["note"] == 1
    assert tuple(loaded.default_cfg["mean"]) == (0.1, 0.2, 0.3)
    assert tuple(loaded.default_cfg["input_size"]) == (3, 40, 48)
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["model.json", "model.safetensors"]


def test_a_timm_model_makes_a_bundle_too(tmp_path):
    model = create_model("resnet10t", num_classes=2).eval()
    vitalloy.save(model, tmp_path)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(vitalloy.load(tmp_path)(x), model(x)) and vitalloy.load(tmp_path).classes is None


def test_a_bundle_with_a_part_missing_or_wrong_is_an_error_that_names_it(tmp_path):
    with pytest.raises(CheckpointError, match=r"none.*no such run folder"):
        vitalloy.load(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"no model\.json"):
        vitalloy.load(tmp_path)
    _bundle(tmp_path)
    record = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*no such file"):
        vitalloy.load(tmp_path)
    _bundle(tmp_path)
    for text in ("{", "[1]", "{}", '{"model": {"num_classes": 2}}', '{"model": "cvt_nano"}'):
        (tmp_path / "model.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"model\.json.*not a Vitalloy bundle"):
            vitalloy.load(tmp_path)
    record["model"]["num_classes"] = 5
    (tmp_path / "model.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"head\.weight \(3, 24\) instead of \(5, 24\)"):
        vitalloy.load(tmp_path)


@pytest.mark.parametrize("file", [1, 2])
def test_a_full_disk_leaves_the_bundle_before_as_it_was(tmp_path, monkeypatch, file):
    saved = _bundle(tmp_path, about={"classes": ["a", "b", "c"]})
    written = []

    def full(_descriptor):
        written.append(1)
        if len(written) == file:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        vitalloy.save(create_model("cvt_nano", num_classes=9), tmp_path)
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.json", "model.safetensors"]
    x = torch.randn(1, 3, 40, 48)
    loaded = vitalloy.load(tmp_path)
    assert torch.equal(loaded(x), saved(x)) and loaded.classes == ["a", "b", "c"]


def test_what_cannot_be_a_bundle_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ModelError, match="build_args"):
        vitalloy.save(torch.nn.Linear(2, 2), tmp_path / "b")
    with pytest.raises(CheckpointError, match="plain values"):
        _bundle(tmp_path / "b", about={"classes": {1, 2}})
    assert not list((tmp_path / "b").glob("*"))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="file"):
        _bundle(tmp_path / "file")


class _Hub:
    """Stands in for HfApi: remembers its calls."""

    calls: list[tuple] = []

    def create_repo(self, repo, **kwargs):
        self.calls.append(("create", repo, kwargs))

    def upload_folder(self, *, repo_id, folder_path, allow_patterns):
        names = [p.name for p in folder_path.iterdir() if p.name in allow_patterns]
        self.calls.append(("upload", repo_id, sorted(names)))
        return f"https://huggingface.co/{repo_id}"


def test_publish_uploads_the_bundle_and_its_report_but_nothing_else(tmp_path, monkeypatch):
    _bundle(tmp_path)
    for name in ("report.html", "recipe.toml", "secrets.txt", "train.log"):
        (tmp_path / name).write_text("x")
    monkeypatch.setattr(_Hub, "calls", [])
    monkeypatch.setattr(huggingface_hub, "HfApi", _Hub)
    assert publish(tmp_path, "me/cvt", private=True) == "https://huggingface.co/me/cvt"
    assert _Hub.calls[0] == ("create", "me/cvt", {"private": True, "exist_ok": True})
    assert _Hub.calls[1] == ("upload", "me/cvt", ["model.json", "model.safetensors", "recipe.toml", "report.html"])
    with pytest.raises(CheckpointError, match="no bundle"):
        publish(tmp_path / "empty", "me/cvt")


def test_a_hub_that_refuses_or_cannot_be_reached_is_an_error(tmp_path):
    _bundle(tmp_path)
    with pytest.raises(CheckpointError, match="me/cvt/too/deep"):
        publish(tmp_path, "me/cvt/too/deep")
    with pytest.raises(CheckpointError, match="bad name"):
        vitalloy.load("hf-hub:bad name")
    with pytest.raises(CheckpointError, match="me/none"):
        vitalloy.load("hf-hub:me/none")  # tests run offline
    with pytest.raises(CheckpointError, match="me/cvt"):
        publish(tmp_path, "me/cvt")


def test_a_bundle_loads_from_the_hub(tmp_path, monkeypatch):
    saved, asked = _bundle(tmp_path), []

    def download(repo, allow_patterns):
        asked.append((repo, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    x = torch.randn(1, 3, 40, 48)
    assert torch.equal(vitalloy.load("hf-hub:me/cvt")(x), saved(x))
    assert asked == [("me/cvt", ["model.safetensors", "model.json"])]


@pytest.mark.parametrize(("name", "side"), [("fashion_hybrid", 32), ("fashion_cvt", 32), ("fashion_vit", 28)])
def test_bundled_models_load_and_say_what_they_are(name, side):
    model = vitalloy.load(f"bundled:{name}")
    assert model.classes[9] == "Ankle boot" and model.about["data"] == "FashionMNIST" and not model.training
    assert model(torch.zeros(2, 1, side, side)).shape == (2, 10)


def test_a_bundled_model_that_does_not_exist_is_named():
    with pytest.raises(CheckpointError, match="no such"):
        vitalloy.load("bundled:nothing")

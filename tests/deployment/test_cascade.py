"""A model with early exits in ONNX Runtime: the same answers at the same exits, and in int8."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch

import vitalloy
from vitalloy.compression.tokens import lgvit
from vitalloy.deployment import OnnxModel, export_onnx
from vitalloy.deployment.cascade import CascadeModel, export_cascade, quantize_cascade, verify_cascade
from vitalloy.errors import ExportError


def pictures(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def exiting(name: str, exits: tuple[int, ...]) -> lgvit.EarlyExit:
    """A model from which a part of the images leaves at every exit but the second, where nobody is asked."""
    torch.manual_seed(0)
    size = {"depth": 4} if name == "vit_nano" else {"depths": (1, 1, 1, 1)}
    model = vitalloy.create_model(name, num_classes=10, img_size=32, **size).eval()
    own = lgvit.compress(model, pictures(8, 0), epochs=0, exits=exits)
    with torch.no_grad():
        for head in own.heads:
            head.classifier.weight *= 20  # as sure as if they were trained
        levels = lgvit.confidence(own.every_exit(pictures(64, 1))[:-1]).quantile(0.6, dim=1).tolist()
    own.policy = lgvit.Policy("confidence", (levels[0], 2.0, *levels[2:]))
    return own


VIT, PVT = ("vit_nano", (0, 1, 2)), ("pvt_v2_nano", (1, 2))  # the state of the second has its grid beside it


@pytest.fixture(scope="module")
def exported(request, tmp_path_factory):
    """(model, the folder of its cascade)."""
    model = exiting(*getattr(request, "param", VIT))
    return model, export_cascade(model, pictures(1, 2), tmp_path_factory.mktemp("cascade"))


@pytest.mark.parametrize("exported", [VIT, PVT], indirect=True, ids=lambda param: param[0])
def test_a_cascade_answers_as_the_model_and_in_int8_nearly(exported, tmp_path):
    (model, folder), images = exported, pictures(24, 2)
    assert verify_cascade(model, folder, images.split(12)).agreement == 1
    cascade = CascadeModel(folder, threads=1)
    assert len(cascade.pieces) == len(model.heads) and cascade.batch is None  # one exit fewer, and the end
    logits = cascade(images)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(images), rtol=1e-3, atol=1e-3)
    assert torch.equal(cascade.depths, model.depths) and 1 not in cascade.depths
    assert len(cascade.depths.unique()) == len(cascade.pieces)
    for image, depth in zip(images[:6].split(1), model.depths[:6], strict=True):
        cascade(image)
        assert cascade.depths.tolist() == [depth]

    int8 = CascadeModel(quantize_cascade(folder, tmp_path / "int8", pictures(64, 3)))
    size = {place: sum(f.stat().st_size for f in place.glob("*.onnx")) for place in (folder, int8.path)}
    assert size[int8.path] < 0.7 * size[folder]
    assert verify_cascade(model, int8, [images], tolerance=None).max_abs_diff > 0
    with torch.no_grad():
        every = model.every_exit(images)[[*int8.manifest["exits"], -1]]
    assert (int8.every_exit(images) - every).abs().mean() < 0.3 * every.std()


def test_a_cascade_is_calibrated_like_a_model(exported, tmp_path):
    folder, images = shutil.copytree(exported[1], tmp_path / "copy"), pictures(64, 4)
    cascade = CascadeModel(folder)
    for piece in cascade.pieces:  # threads of one file must not wait busily while another runs
        options = piece.session.get_session_options()
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    share = (cascade.trunk_macs[0] + 1) / 2
    curve = lgvit.calibrate(cascade, [(images, torch.zeros(64, dtype=torch.long))], macs=share)
    cascade.save()
    again = CascadeModel(folder)
    assert again.policy.thresholds == curve.chosen.thresholds and curve.chosen.macs <= share
    again(images)
    places = [*again.manifest["exits"], again.manifest["end"]]
    spent = [again.trunk_macs[places.index(depth)] for depth in again.depths.tolist()]
    assert sum(spent) / 64 == pytest.approx(curve.chosen.macs)


def test_fewer_exits_replace_an_older_cascade(exported, tmp_path):
    folder, model = shutil.copytree(exported[1], tmp_path / "copy"), copy.deepcopy(exported[0])
    model.policy = lgvit.Policy("confidence", (2.0,) * len(model.heads))
    export_cascade(model, pictures(1, 5), folder)
    cascade = CascadeModel(folder)
    assert [file.name for file in folder.glob("*.onnx")] == ["0.onnx"]
    cascade(pictures(3, 5))
    assert cascade.depths.tolist() == [len(model.heads)] * 3


def test_one_file_picks_the_same_answers(tmp_path):
    """A graph cannot end early: it computes all exits."""
    model, images = exiting("vit_nano", (0, 1, 2)), pictures(10, 6)
    export_onnx(model, images, tmp_path / "one.onnx")
    with torch.no_grad():
        torch.testing.assert_close(OnnxModel(tmp_path / "one.onnx")(images), model(images), rtol=1e-3, atol=1e-3)


def test_what_is_no_cascade_is_refused(exported, tmp_path):
    (model, folder), images = exported, pictures(3, 7)
    with pytest.raises(ExportError, match="no early exits"):
        export_cascade(model.model, images, tmp_path)
    with pytest.raises(ExportError, match="There is no cascade"):
        CascadeModel(tmp_path)
    (tmp_path / "cascade.json").write_text("{}")
    with pytest.raises(ExportError, match="does not describe a cascade"):
        CascadeModel(tmp_path)
    with pytest.raises(ExportError, match=r"takes .* and failed on"):
        CascadeModel(folder)(torch.zeros(1, 1, 32, 32))
    with pytest.raises(ExportError, match="without calibration images"):
        quantize_cascade(folder, tmp_path / "int8", [])
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.heads[0].classifier.bias += 1
    with pytest.raises(ExportError, match="does not compute what EarlyExit computes"):
        verify_cascade(other, folder, [images])

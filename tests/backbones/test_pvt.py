"""What the goldens do not show of PVT v1 and v2: both forms, other ports' files, other sizes."""

from __future__ import annotations

import pytest
import timm
import torch

import vitalloy

SMALL = {"embed_dims": (8, 16, 40, 64), "depths": (1, 1, 2, 1), "num_classes": 5}


@pytest.mark.parametrize("name", ["pvt_tiny", "pvt_v2_b0"])
def test_features_are_the_pyramid_at_any_size(name):
    model = vitalloy.create_model(name, **SMALL, features_only=True).eval()
    shapes = [tuple(m.shape) for m in model(torch.randn(1, 3, 104, 136))]
    down = [(26, 34), (13, 17), (6, 8), (3, 4)] if name == "pvt_tiny" else [(26, 34), (13, 17), (7, 9), (4, 5)]
    assert shapes == [(1, c, *s) for c, s in zip(SMALL["embed_dims"], down, strict=True)]
    assert model.feature_info.reduction() == [4, 8, 16, 32]


def test_v1_dense_form_takes_the_classifier_s_weights():
    classifier = vitalloy.create_model("pvt_tiny", **SMALL).eval()
    dense = vitalloy.create_model("pvt_tiny", **SMALL, features_only=True).eval()
    assert dense.model.cls_token is None
    loaded = vitalloy.load_checkpoint(dense.model, classifier.state_dict(), strict=False)
    assert not loaded.missing
    assert {k.split(".")[0] for k in loaded.unexpected} == {"cls_token", "norm", "head"}
    x = torch.randn(1, 3, 64, 64)
    for ours, theirs in zip(dense(x)[:3], classifier.forward_intermediates(x, intermediates_only=True), strict=False):
        torch.testing.assert_close(ours, theirs)


def test_v1_compares_each_stage_with_its_own_grid():
    """At twice the table's size stage 2 has as many cells as the first table has rows; the published code fails."""
    model = vitalloy.create_model("pvt_tiny", **SMALL, img_size=64).eval()
    assert model.positions(1, (16, 16)).shape == (1, 256, 16)
    assert model(torch.randn(1, 3, 128, 128)).shape == (1, 5)


def test_v1_tables_are_resized_at_loading():
    state = vitalloy.create_model("pvt_tiny", **SMALL, img_size=64).state_dict()
    model = vitalloy.create_model("pvt_tiny", **SMALL, img_size=(96, 64))
    vitalloy.load_checkpoint(model, state)
    torch.testing.assert_close(model.pos_embed4[:, :1], state["pos_embed4"][:, :1])
    assert model.pos_embed1.shape == (1, 24 * 16, 8)


@pytest.mark.parametrize("name", ["pvt_v2_b0", "pvt_v2_b2_li"])
def test_timm_files_load(name):
    theirs = timm.create_model(name, num_classes=5).eval()
    ours = vitalloy.create_model(name, num_classes=5).eval()
    vitalloy.load_checkpoint(ours, theirs.state_dict())
    x = torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-4)


def test_detector_files_load():
    classifier = vitalloy.create_model("pvt_v2_b0", **SMALL)
    state = {
        "backbone." + k.replace(".dwconv.", ".dwconv.dwconv."): v
        for k, v in classifier.state_dict().items()
        if not k.startswith("head")
    }
    dense = vitalloy.create_model("pvt_v2_b0", **SMALL, features_only=True).model
    assert vitalloy.load_checkpoint(dense, {"state_dict": state}) == vitalloy.checkpoints.Loaded()


def test_transformers_files_load():
    pytest.importorskip("transformers")
    from transformers import PvtConfig, PvtForImageClassification, PvtV2Config, PvtV2ForImageClassification

    args = {"hidden_sizes": [8, 16, 40, 64], "depths": [1, 1, 2, 1], "num_labels": 5, "layer_norm_eps": 1e-5}
    pairs = (
        ("pvt_v2_b0", PvtV2ForImageClassification(PvtV2Config(**args))),
        ("pvt_tiny", PvtForImageClassification(PvtConfig(image_size=64, **args))),
    )
    x = torch.randn(1, 3, 64, 64)
    for name, theirs in pairs:
        for weight in theirs.parameters():  # large enough that the port's other eps does not show
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
        size = 64 if name == "pvt_tiny" else None
        ours = vitalloy.create_model(name, **SMALL, img_size=size).eval()
        vitalloy.load_checkpoint(ours, theirs.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(ours(x), theirs.eval()(x).logits, atol=1e-3, rtol=1e-3)

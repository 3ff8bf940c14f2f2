"""Names to models: ours, timm's, timm-aware tools, and what is said to a wrong request."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from timm.models._features import FeatureGetterNet

import vitalloy.backbones
from vitalloy import create_model, list_models
from vitalloy.backbones.cvt import CvT
from vitalloy.errors import ModelError
from vitalloy.registry import default_cfg, entry


def test_list_models_filters_by_pattern_and_adds_timms():
    assert list_models("cvt_*") == ["cvt_13", "cvt_13_384", "cvt_21", "cvt_21_384", "cvt_nano", "cvt_w24_384"]
    assert "resnet18" not in list_models()
    both = list_models("*vit_tiny_patch16_224", timm_models=True)
    assert both.count("vit_tiny_patch16_224") == 1 and not any(name.startswith("alloy_") for name in both)
    assert "resnet18" in list_models(timm_models=True)


def test_a_misspelt_name_is_answered_with_the_nearest_names():
    with pytest.raises(ModelError, match=r"'cvt_31'.*'cvt_13'"):
        create_model("cvt_31")
    with pytest.raises(ModelError, match=r"'resnet5O'.*'resnet50'"):
        create_model("resnet5O")
    with pytest.raises(ModelError) as raised:
        create_model("vit_nan0")
    assert str(raised.value).count("'vit_nano'") == 1
    with pytest.raises(ModelError, match="not one of Vitalloy's own"):
        entry("resnet18")


@pytest.mark.parametrize(
    ("name", "kwargs", "told"),
    [
        ("cvt_nano", {"depht": (1, 1, 1)}, "depht"),
        ("cvt_nano", {"activation": "swish"}, "swish"),
        ("cvt_nano", {"projection": "fourier"}, "fourier"),
        ("cvt_nano", {"depths": (1,)}, "IndexError"),
        ("cvt_nano", {"global_pool": "median"}, "median"),
        ("vit_nano", {"num_heads": 5}, "5 heads"),
        ("vit_nano", {"num_classes": -1}, "-1"),
        ("vit_nano", {"in_chans": 0}, "in_chans"),
        ("vit_nano", {"img_size": 0}, "img_size"),
        ("vit_nano", {"img_size": (32, 32, 3)}, "img_size"),
        ("vit_nano", {"img_size": 32.5}, "img_size"),
        ("vit_nano", {"img_size": "32"}, "img_size"),
        ("vit_nano", {"patch_size": 0}, "zero"),
        ("vit_nano", {"pretrained": True}, "load_checkpoint"),
        ("vit_nano", {"features_only": True, "out_indices": (99,)}, "99"),
        ("resnet10t", {"blocks": 3}, "blocks"),
        ("resnet18.no_such_tag", {"pretrained": True}, "no_such_tag"),
    ],
)
def test_what_a_model_cannot_take_is_a_model_error_that_names_it(name, kwargs, told):
    with pytest.raises(ModelError, match=told) as raised:
        create_model(name, **kwargs)
    assert name in str(raised.value)


def test_weights_that_cannot_be_fetched_are_a_model_error(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("the hub cannot be reached")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ModelError, match="cannot be reached"):
        create_model("resnet18", pretrained=True)


def test_other_names_fall_back_to_timm():
    model = create_model("resnet10t", num_classes=4, img_size=(64, 48), in_chans=2).eval()
    assert type(model).__module__.startswith("timm.")
    assert model(torch.randn(1, 2, 64, 48)).shape == (1, 4)
    assert model.pretrained_cfg["input_size"] == (2, 64, 48)
    assert default_cfg("resnet10t")["mean"] == (0.485, 0.456, 0.406)


def test_build_args_repeat_the_call_even_from_json():
    model = create_model("cvt_nano", 3, (40, 56), 2, embed_dims=(16, 32, 64), num_heads=(1, 2, 4))
    again = create_model(**json.loads(json.dumps(model.build_args)))
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert again.default_cfg == model.default_cfg


@pytest.mark.parametrize("name", ["vit_nano", "cvt_nano", "swin_nano", "resnet10t"])
@pytest.mark.parametrize("in_chans", [1, 4])
def test_in_chans(name, in_chans):
    model = create_model(name, num_classes=3, in_chans=in_chans).eval()
    assert model(torch.randn(1, in_chans, 32, 32)).shape == (1, 3)
    with pytest.raises(RuntimeError):
        model(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize("name", ["vit_nano", "cvt_nano"])
@pytest.mark.parametrize(("asked", "size"), [(64, (64, 64)), ((40, 56), (40, 56)), ([45, 51], (45, 51))])
def test_img_size(name, asked, size):
    model = create_model(name, num_classes=2, img_size=asked).eval()
    assert model.default_cfg["input_size"] == (3, *size)
    assert model(torch.randn(1, 3, *size)).shape == (1, 2)
    if name == "vit_nano":
        assert model.pos_embed.shape[1] == 1 + (size[0] // 4) * (size[1] // 4)
    assert default_cfg(name)["input_size"] == (3, 32, 32), "the shared configuration was changed"


def test_no_classes_gives_features():
    for name, width in (("cvt_nano", 128), ("vit_nano", 96), ("resnet10t", 512)):
        assert create_model(name, num_classes=0).eval()(torch.randn(2, 3, 32, 32)).shape == (2, width)


def test_a_distilled_model_replaces_both_heads_and_returns_both_when_asked():
    model = create_model("vit_nano", num_classes=5, depth=1, distilled=True).train()
    model.reset_classifier(3)
    x = torch.randn(2, 3, 32, 32)
    assert model(x).shape == (2, 3)
    model.set_distilled_training()
    by_class, by_teacher = model(x)
    assert by_class.shape == by_teacher.shape == (2, 3)
    assert torch.equal(model.eval()(x), (by_class + by_teacher) / 2)


def test_timm_builds_our_models_by_name():
    assert vitalloy.backbones  # its import is what tells timm
    model = timm.create_model("cvt_13", num_classes=2)
    assert isinstance(model, CvT) and model.default_cfg["crop_pct"] == 0.875
    deit = timm.create_model("alloy_deit_tiny_patch16_224", num_classes=2, img_size=32)
    assert type(deit).__module__ == "vitalloy.backbones.vit" and deit.pos_embed.shape[1] == 5
    assert type(timm.create_model("deit_tiny_patch16_224")).__module__.startswith("timm.")  # timm's own stays
    features = timm.create_model("cvt_nano", features_only=True, out_indices=(0, 2))
    assert isinstance(features, FeatureGetterNet) and features.feature_info.channels() == [32, 128]
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 224, 224)


@pytest.mark.parametrize(
    ("encoder", "depth", "channels"),
    [
        ("tu-cvt_13", 4, [3, 0, 64, 192, 384]),  # strides 4, 8, 16: no map of stride 2
        ("tu-pvt_v2_nano", 4, [3, 16, 32, 80, 128]),  # strides 2, 4, 8, 16
        ("tu-alloy_pvt_v2_b0", 5, [3, 0, 32, 64, 160, 256]),
    ],
)
def test_segmentation_models_pytorch_takes_them_as_encoders(encoder, depth, channels):
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = smp.Unet(
        encoder, encoder_weights=None, encoder_depth=depth, decoder_channels=(32, 16, 16, 8, 8)[:depth], classes=2
    )
    assert list(model.encoder.out_channels) == channels
    masks = model(torch.randn(1, 3, 64, 64))
    assert masks.shape == (1, 2, 64, 64)
    masks.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())

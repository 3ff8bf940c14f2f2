"""What the goldens do not show of LV-ViT and SiT: counts, files, feature maps of merged tokens, refused arguments."""

from __future__ import annotations

import pytest
import torch

import vitalloy
from vitalloy.errors import ModelError


@pytest.mark.parametrize(
    ("name", "millions"),  # with the classifier of single tokens, as the authors count
    [
        ("lvvit_tiny", 15.7),
        ("lvvit_small", 25.4),
        ("lvvit_medium", 55.2),
        ("sit_tiny", 15.87),
        ("sit_xsmall", 25.63),
        ("sit_small", 25.63),
        ("sit_medium", 55.64),
        ("sit_large", 148.17),
    ],
)
def test_published_parameter_counts(name, millions):
    with torch.device("meta"):
        model = vitalloy.create_model(name, dense_head=True)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(
        millions, abs=0.05 if name.startswith("lvvit") else 0.006
    )


@pytest.mark.parametrize(("name", "left"), [("sit_tiny", 24), ("sit_large", 40)])
def test_tokens_left_at_the_end(name, left):
    with torch.device("meta"):
        model = vitalloy.create_model(name)
        images = torch.empty(1, *model.default_cfg["input_size"])
        assert model.eval().forward_features(images).shape == (1, 1 + left, model.num_features)


def test_authors_files_load_with_training_modules_and_unused_classifier():
    torch.manual_seed(0)
    model = vitalloy.create_model("lvvit_nano", num_classes=5, slim_after=(2, 4)).eval()
    published = {k.replace(".score.", ".weight."): v + 1 for k, v in model.state_dict().items()}
    extra = {
        "rtsm.1.norm1.weight": torch.ones(96),
        "aux_head.weight": torch.ones(5, 96),
        "aux_head.bias": torch.ones(5),
    }
    vitalloy.load_checkpoint(model, {"model": {**published, **extra}})
    assert torch.equal(model.tsm[1].score[3].bias, published["tsm.1.weight.3.bias"])
    larger = vitalloy.create_model("lvvit_nano", num_classes=5, img_size=48, dense_head=True)
    vitalloy.load_checkpoint(larger, {k: v for k, v in {**published, **extra}.items() if "tsm" not in k})
    assert torch.equal(larger.aux_head.bias, torch.ones(5))


def test_the_dense_head_adds_half_of_the_highest_logit_of_a_patch():
    torch.manual_seed(0)
    model = vitalloy.create_model("lvvit_nano", num_classes=5, stem="4_2", dense_head=True).eval()
    tokens = model.forward_features(torch.randn(2, 3, 32, 32))
    wanted = model.head(tokens[:, 0]) + 0.5 * model.aux_head(tokens[:, 1:]).max(1).values
    assert tokens.shape == (2, 65, 96) and torch.allclose(model.forward_head(tokens), wanted)


def test_feature_maps_of_a_slimmed_model_have_the_whole_grid():
    torch.manual_seed(0)
    model = vitalloy.create_model("lvvit_nano", slim_after=(1, 3)).eval()
    images = torch.randn(2, 3, 32, 32)
    final, maps = model.forward_intermediates(images)
    assert final.shape == (2, 17, 96) and all(m.shape == (2, 96, 8, 8) for m in maps)
    assert maps[-1].std() > 0 and torch.equal(model.forward_features(images), final)
    few = vitalloy.create_model("lvvit_nano", slim_after=(1, 3), features_only=True, out_indices=(1,))
    assert few(images)[0].shape == (2, 96, 8, 8) and not any("tsm.1" in name for name in few.state_dict())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"stem": "5c"}, "stem='5c'"),
        ({"slim_after": (3, 2)}, "slim_after"),
        ({"slim_after": (7,)}, "slim_after"),
        ({"keep": 0.0}, "keep"),
        ({"patch_size": 12}, "cannot make patches of 12"),
        ({"img_size": 2, "stem": "plain"}, "smaller than one patch"),
    ],
)
def test_arguments_that_make_no_model_are_refused(options, says):
    with pytest.raises(ModelError, match=says):
        vitalloy.create_model("lvvit_nano", **options)

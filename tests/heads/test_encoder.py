"""A head must be able to trust what an encoder says of its maps, whatever backbone stands behind it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import vitalloy
from vitalloy.errors import ModelError
from vitalloy.heads import Encoder

NAMES = ("pvt_v2_nano", "cvt_nano", "swin_nano", "vit_nano", "convit_nano", "resnet18", "deit_tiny_patch16_224")


@pytest.mark.parametrize("name", NAMES)
def test_maps_have_the_channels_and_strides_that_it_says(name):
    encoder = Encoder(name).eval()
    side = 32 if name == "convit_nano" else 64
    with torch.no_grad():
        maps = encoder(torch.randn(1, 3, side, side))
    assert [m.shape[1] for m in maps] == encoder.channels
    assert [side / m.shape[-1] for m in maps] == encoder.strides
    assert encoder.strides == sorted(set(encoder.strides)), "every level is coarser than the one before"


@pytest.mark.parametrize("side", [48, 70, 81])
def test_a_plain_transformer_becomes_a_pyramid_at_any_size(side):
    encoder = Encoder("vit_tiny_patch16_224").eval()
    assert encoder.strides == [4, 8, 16, 32]
    with torch.no_grad():
        maps = encoder(torch.randn(1, 3, side, side))
    grid = side // 16
    assert [m.shape[-1] for m in maps] == [4 * grid, 2 * grid, grid, -(-grid // 2)]


def test_wanted_levels_are_kept():
    assert Encoder("pvt_v2_nano", out_indices=(1, 3)).strides == [4, 16]


def test_a_classifiers_weights_enter_the_encoder():
    classifier = vitalloy.create_model("pvt_v2_nano", num_classes=5)
    encoder = Encoder("pvt_v2_nano", weights=classifier.state_dict())
    want = classifier.state_dict()["block2.1.mlp.fc1.weight"]
    assert torch.equal(encoder.model.state_dict()["block2.1.mlp.fc1.weight"], want)


class Halves(nn.Module):
    """A user's own encoder: two maps by average pooling."""

    feature_info = [{"num_chs": 3, "reduction": 2}, {"num_chs": 3, "reduction": 4}]

    def forward(self, x):
        return [nn.functional.avg_pool2d(x, 2), nn.functional.avg_pool2d(x, 4)]


def test_any_module_that_describes_its_maps_will_do():
    encoder = Encoder(Halves())
    assert (encoder.channels, encoder.strides) == ([3, 3], [2, 4])


def test_a_module_that_does_not_is_told_what_is_missing():
    with pytest.raises(ModelError, match="feature_info"):
        Encoder(nn.Conv2d(3, 8, 4, 4))
    with pytest.raises(ModelError, match="pvt_v2_nanno"):
        Encoder("pvt_v2_nanno")

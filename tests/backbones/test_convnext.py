"""ConvNeXt against timm's on shared weights, and the authors' names."""

from __future__ import annotations

import re

import pytest
import timm
import torch

from vitalloy import create_model

SMALL = {"depths": (1, 2, 1, 1), "dims": (8, 16, 24, 32)}


@pytest.fixture
def models():
    theirs = timm.create_model("convnext_tiny", num_classes=5, **SMALL).double()
    for name, p in theirs.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.normal_(p)
    ours = create_model("convnext_tiny", num_classes=5, **SMALL).double()
    ours.load_state_dict(ours.convert_state(theirs.state_dict()))
    return theirs.eval(), ours.eval()


@pytest.mark.parametrize("size", [(64, 64), (75, 130)])
def test_same_numbers_as_timm(models, size):
    theirs, ours = models
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    assert torch.allclose(ours(x), theirs(x), atol=1e-10)
    maps, wanted = (m.forward_intermediates(x, intermediates_only=True) for m in (ours, theirs))
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(maps, wanted, strict=True))
    assert all(m.is_contiguous(memory_format=torch.channels_last) for m in maps)
    pooled, theirs_pooled = (m.forward_head(m.forward_features(x), pre_logits=True) for m in (ours, theirs))
    assert torch.allclose(pooled, theirs_pooled, atol=1e-10)


def test_the_authors_names_load(models):
    ours = models[1]
    published = {}
    for key, value in ours.state_dict().items():
        key = re.sub(r"^stem\.", "downsample_layers.0.", key)
        key = re.sub(r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1.", key)
        key = re.sub(r"\.blocks\.(\d)\.", r".\1.", key).replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        published[key] = value + 1
    assert "stages.1.1.pwconv2.bias" in published and "norm.weight" in published
    converted = ours.convert_state(published)
    assert all(torch.equal(converted.pop(key), value + 1) for key, value in ours.state_dict().items())
    assert not converted


@pytest.mark.parametrize(
    ("name", "count"),
    [("convnext_tiny", 28_589_128), ("convnext_small", 50_223_688), ("convnext_base", 88_591_464)],
)
def test_published_parameter_counts(name, count):
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == count

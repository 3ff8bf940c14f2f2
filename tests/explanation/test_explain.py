"""One face for all methods, and the picture that is drawn of a map."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from vitalloy import create_model, explain
from vitalloy.errors import ModelError
from vitalloy.explanation import METHODS, overlay


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("vit_nano", "rollout"),
        ("convit_nano", "gradcam"),
        ("cvt_nano", "gradcam"),
        ("swin_nano", "gradcam"),
        ("resnet10t", "gradcam"),
        (None, "gradient"),
    ],
)
def test_auto_takes_the_method_that_fits(name, method):
    size = (32, 48)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 48, 3))
    if name:
        model = create_model(name, num_classes=3, img_size=size)
    x = torch.randn(2, 3, *size)
    found = explain(model.eval(), x)
    assert found.method == method and found.meaning == METHODS[method]
    assert found.maps.shape == (2, *size) and found.maps.min() >= 0 and found.maps.max() <= 1
    assert torch.equal(found.target, model(x).argmax(1))
    assert found.maps.std() > 0


def test_a_named_method_and_target_are_used():
    model, x = create_model("vit_nano", num_classes=3, depth=2).eval(), torch.randn(1, 3, 32, 32)
    target = torch.tensor([2])
    maps = {}
    for method in METHODS:
        found = explain(model, x, target, method)
        assert found.method == method and torch.equal(found.target, target)
        maps[method] = found.maps
    assert not torch.equal(maps["gradcam"], maps["gradient"])
    other = explain(model, x, torch.tensor([0]))
    assert torch.equal(other.maps, maps["rollout"])  # the same for every class
    assert not torch.equal(explain(model, x, torch.tensor([0]), "gradient").maps, maps["gradient"])


def test_what_cannot_be_done_is_a_model_error():
    model, x = create_model("cvt_nano", num_classes=3).eval(), torch.randn(1, 3, 32, 32)
    with pytest.raises(ModelError, match=r"'lime'.*rollout"):
        explain(model, x, method="lime")
    with pytest.raises(ModelError, match="CvT"):
        explain(model, x, method="rollout")
    with pytest.raises(ModelError, match="feature map"):
        explain(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3)), x, method="gradcam")


def test_overlay_keeps_the_size_colours_what_is_salient_and_leaves_the_rest():
    grey = Image.new("L", (60, 40), 100)
    saliency = torch.zeros(20, 30)
    saliency[:, 15:] = 1.0
    drawn = overlay(grey, saliency)
    assert drawn.size == (60, 40) and drawn.mode == "RGB"
    pixels = np.asarray(drawn, np.int32)
    assert (pixels[:, :25] == 100).all()  # nothing salient: the image as it is
    warm = pixels[:, 35:]
    assert (warm[..., 0] > 150).all() and np.ptp(warm[..., 2]) == 0
    stronger = np.asarray(overlay(grey, saliency, strength=1.0), np.int32)[:, 35:]
    assert (stronger[..., 0] >= warm[..., 0]).all() and not np.array_equal(stronger, warm)

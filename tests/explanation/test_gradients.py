"""Grad-CAM and smoothed gradients on models whose answer depends on one known region."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vitalloy import create_model
from vitalloy.explanation.gradients import grad_cam, smooth_gradient


class Bright(nn.Module):
    """Class c is how bright channel c is, seen through one convolution; a feature map of a quarter of the size."""

    feature_info = [{"num_chs": 2, "reduction": 4, "module": "stage"}]

    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.Conv2d(3, 2, 4, 4, bias=False)
        nn.init.zeros_(self.stage.weight)
        with torch.no_grad():
            self.stage.weight[0, 0], self.stage.weight[1, 1] = 1 / 16, 1 / 16

    def forward(self, x):
        return self.stage(x).mean((2, 3))


def two_squares() -> torch.Tensor:
    """Channel 0 is bright in the upper left, channel 1 in the lower right."""
    x = torch.zeros(1, 3, 32, 48)
    x[:, 0, 4:12, 8:16] = 1.0
    x[:, 1, 20:28, 32:40] = 1.0
    return x


def peak(maps: torch.Tensor) -> tuple[int, int]:
    return divmod(int(maps[0].argmax()), maps.shape[-1])


def test_grad_cam_peaks_where_the_asked_class_is():
    x, model = two_squares(), Bright().eval()
    first, second = (grad_cam(model, x, torch.tensor([c])) for c in (0, 1))
    assert first.shape == (1, 8, 12) and first.max() == second.max() == 1
    assert set(map(tuple, first[0].nonzero().tolist())) == {(1, 2), (1, 3), (2, 2), (2, 3)}
    assert set(map(tuple, second[0].nonzero().tolist())) == {(5, 8), (5, 9), (6, 8), (6, 9)}
    assert not any(m._forward_hooks for m in model.modules())


def test_grad_cam_explains_each_image_of_a_batch_for_its_own_class():
    x = two_squares().expand(2, -1, -1, -1)
    together = grad_cam(Bright(), x, torch.tensor([0, 1]))
    assert torch.equal(together[:1], grad_cam(Bright(), x[:1], torch.tensor([0])))
    assert torch.equal(together[1:], grad_cam(Bright(), x[:1], torch.tensor([1])))


def test_grad_cam_works_without_gradients_around_it_and_leaves_none_behind():
    model = Bright().eval()
    with torch.no_grad():
        assert grad_cam(model, two_squares(), torch.tensor([0])).max() == 1
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "size", "grid"),
    [
        ("cvt_nano", (32, 48), (8, 12)),  # the class token takes nothing from the last map itself
        ("swin_nano", (32, 48), (2, 3)),
        ("pvt_v2_nano", (32, 48), (2, 3)),
        ("vit_nano", (32, 48), (8, 12)),  # the last block's patches do not reach the class token any more
        ("vit_nano", (34, 51), (8, 12)),
        ("convit_nano", (32, 48), (8, 12)),  # the first blocks have no class token
        ("resnet10t", (64, 96), (2, 3)),
        ("swin_tiny_patch4_window7_224.ms_in1k", (64, 96), (2, 3)),  # timm's: maps with channels last
    ],
)
def test_maps_of_backbones_have_the_grid_of_a_level(name, size, grid):
    torch.manual_seed(0)
    small = {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)} if "ms_in1k" in name else {}
    model = create_model(name, num_classes=3, img_size=size, **small).eval()
    maps = grad_cam(model, torch.randn(2, 3, *size), torch.tensor([0, 2]))
    assert tuple(maps.shape) == (2, *grid) and maps.min() >= 0 and maps.max() <= 1 and maps.isfinite().all()
    assert maps.amax() > 0


def test_no_feature_map_is_none():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    assert grad_cam(model, torch.randn(1, 3, 2, 2), torch.tensor([0])) is None


def test_the_smoothed_gradient_is_where_the_class_looks_and_always_the_same():
    class Corner(nn.Module):
        def forward(self, x):
            seen = x[:, :, :4, :4].square().sum((1, 2, 3))
            return torch.stack([seen, x[:, 0, -1, -1]], 1)

    x = torch.rand(2, 3, 8, 8)
    maps = smooth_gradient(Corner(), x, torch.tensor([0, 0]))
    assert maps.shape == (2, 8, 8) and (maps[:, :4, :4] > 0).all() and maps.amax((1, 2)).eq(1).all()
    assert maps[:, 4:].eq(0).all() and maps[:, :, 4:].eq(0).all()
    other = smooth_gradient(Corner(), x, torch.tensor([1, 1]))
    assert peak(other) == (7, 7) and other.sum() == 2
    assert torch.equal(maps, smooth_gradient(Corner(), x, torch.tensor([0, 0])))

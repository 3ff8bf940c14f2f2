"""Folded layers compute what the layers they were made of compute, one after the other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vitalloy.layers.conv_norm import ConvNorm
from vitalloy.layers.fusion import fold_norm, fold_norm_before, fold_scale, fuse

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def norm_of(channels: int, dims: int, affine: bool = True) -> nn.Module:
    norm = NORMS[dims](channels, affine=affine, eps=1e-3)
    for value in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
        if value is not None:
            nn.init.uniform_(value, 0.3, 2.0)
    return norm


LAYERS = [
    (nn.Linear(6, 8), 1, (5, 6)),
    (nn.Linear(6, 8, bias=False), 1, (5, 6)),
    (nn.Conv1d(6, 8, 1), 1, (2, 6, 5)),
    (nn.Conv2d(6, 8, 1, groups=2), 2, (2, 6, 4, 5)),
    (nn.Conv2d(6, 8, 3, stride=2), 2, (2, 6, 7, 5)),
    (nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), 2, (2, 6, 7, 5)),
    (nn.Conv3d(6, 4, (1, 2, 2), stride=(1, 2, 2)), 3, (2, 6, 3, 4, 4)),
]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("layer", "dims", "shape"), LAYERS)
def test_a_norm_behind_and_in_front(layer, dims, shape, affine):
    layer, x = layer.double(), torch.randn(shape, dtype=torch.float64)
    behind = norm_of(len(layer.weight), dims, affine).double().eval()
    front = norm_of(6, dims, affine).double().eval()
    assert torch.allclose(fold_norm(layer, behind)(x), behind(layer(x)), atol=1e-12)
    if isinstance(layer, nn.Linear) or not any(layer.padding):
        assert torch.allclose(fold_norm_before(front, layer)(x), layer(front(x)), atol=1e-12)
    else:
        with pytest.raises(ValueError, match="padded"):
            fold_norm_before(front, layer)


@pytest.mark.parametrize("entries", [1, 8])
def test_a_scale(entries):
    layer, scale, x = nn.Conv2d(6, 8, 3).double(), torch.rand(entries, 1, 1), torch.randn(2, 6, 5, 5).double()
    assert torch.allclose(fold_scale(layer, scale)(x), scale * layer(x), atol=1e-7)


def test_the_layer_itself_stays_and_the_memory_format_is_kept():
    layer = nn.Conv2d(6, 8, 3).to(memory_format=torch.channels_last)
    before = layer.weight.clone()
    new = fold_norm(layer, norm_of(8, 2).eval())
    assert torch.equal(layer.weight, before) and not torch.equal(new.weight, before)
    assert new.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_norm_of_the_batch_is_no_fixed_map():
    with pytest.raises(ValueError, match="running statistics"):
        fold_norm(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))


def test_fuse_finds_neighbours_and_parts_that_fold_themselves():
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), norm_of(4, 2), nn.ReLU(), nn.Conv2d(4, 5, 1), norm_of(5, 2)),
        ConvNorm(5, 6, 3, act=nn.GELU),
    )
    model[1].norm.running_mean.fill_(0.5)
    x = torch.randn(2, 3, 9, 9)
    wanted = model.eval()(x)
    fused = fuse(model.train())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules()) and not fused.training
    assert torch.allclose(fused(x), wanted, atol=1e-5)
    assert torch.equal(fuse(fused)(x), fused(x))

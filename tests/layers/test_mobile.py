"""The perceptron on maps: a piece of the batch at a time it gives the same numbers, and only where nobody looks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vitalloy.layers import mobile, streaming
from vitalloy.layers.fusion import fuse


@pytest.fixture
def always(monkeypatch):
    """Small maps go in pieces too, of two images each."""
    monkeypatch.setattr(streaming, "WORTHWHILE", 0)
    monkeypatch.setattr(mobile, "GROUP", 2 * 6 * 5 * 24)


@pytest.mark.parametrize("depthwise", [False, True])
def test_pieces_give_the_same_numbers(always, depthwise):
    torch.manual_seed(0)
    mlp = mobile.ConvMlp(8, 24, depthwise).double().eval()
    for norm in (m for m in mlp.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_()
    x = torch.randn(5, 8, 6, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    wanted = mlp(x).detach()
    fuse(nn.ModuleList([mlp]))
    assert not mlp.may_stream(x)  # gradients are recorded
    with torch.inference_mode():
        assert mlp.may_stream(x)
        torch.testing.assert_close(mlp(x), wanted)
        assert mlp(x).is_contiguous(memory_format=torch.channels_last)


def test_whoever_looks_inside_sees_whole_maps(always):
    mlp = mobile.ConvMlp(8, 24, depthwise=True).eval()
    fuse(nn.ModuleList([mlp]))
    x = torch.randn(5, 8, 6, 5)
    seen = []
    for watched in (mlp.fc1, mlp.mid.conv, mlp.act):
        hook = watched.register_forward_hook(lambda _m, _i, out: seen.append(len(out)))
        with torch.inference_mode():
            mlp(x)
        hook.remove()
    assert seen == [5, 5, 5]
    mlp.act = nn.ReLU()
    with torch.inference_mode():
        assert not mlp.may_stream(x)

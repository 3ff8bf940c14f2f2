"""The perceptron in pieces computes what it does whole, and steps aside where someone looks at the map between."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vitalloy.layers import streaming
from vitalloy.layers.activations import QuickGELU
from vitalloy.layers.streaming import may_stream, stream_conv_mlp, stream_mlp
from vitalloy.layers.tokens import to_map, to_tokens


@pytest.fixture
def parts():
    torch.manual_seed(0)
    return nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8), nn.Conv2d(24, 24, 3, padding=1, groups=24)


@torch.no_grad()
@pytest.mark.parametrize("act", [nn.GELU(), nn.GELU("tanh"), nn.ReLU(), QuickGELU(), nn.Identity()], ids=str)
def test_pieces_make_the_whole(parts, monkeypatch, act):
    fc1, _, fc2, conv = parts
    monkeypatch.setattr(streaming, "ROWS", 7)  # 3 * 30 tokens: not a multiple
    monkeypatch.setattr(streaming, "GROUP", 2 * 30 * 24)  # two images at a time
    x = torch.randn(3, 30, 8)
    kept = x.clone()
    assert torch.allclose(stream_mlp(x, fc1, act, fc2), fc2(act(fc1(x))), atol=1e-6)
    whole = fc2(act(to_tokens(conv(to_map(fc1(x), (5, 6))))))
    assert torch.allclose(stream_conv_mlp(x, (5, 6), fc1, nn.Identity(), conv, act, fc2), whole, atol=1e-6)
    bent = fc2(act(to_tokens(conv(to_map(fc1(x).relu(), (5, 6))))))
    assert torch.allclose(stream_conv_mlp(x, (5, 6), fc1, nn.ReLU(), conv, act, fc2), bent, atol=1e-6)
    image = x.unflatten(1, (5, 6))
    assert torch.allclose(stream_mlp(image, fc1, act, fc2), fc2(act(fc1(image))), atol=1e-6)
    assert torch.equal(x, kept)


def test_only_unseen_plain_inference_streams(parts, monkeypatch):
    fc1, act, fc2, _ = parts
    monkeypatch.setattr(streaming, "WORTHWHILE", 100)
    x = torch.randn(1, 30, 8)
    assert not may_stream(x, fc1, act, fc2)  # gradients are wanted
    with torch.no_grad():
        assert may_stream(x, fc1, act, fc2)
        assert not may_stream(x[:, :4], fc1, act, fc2)  # too small to pay
        assert not may_stream(x, fc1, nn.SiLU(), fc2)
        assert not may_stream(x, fc1, act, nn.Linear(24, 8, bias=False))
        with torch.autocast("cpu", torch.bfloat16):
            assert not may_stream(x, fc1, act, fc2)
        act.register_forward_hook(lambda *_: None)
        assert not may_stream(x, fc1, act, fc2)

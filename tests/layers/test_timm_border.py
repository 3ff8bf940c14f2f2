"""timm's models with our attention socket: the same numbers, and methods find the attention."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

from vitalloy import create_model
from vitalloy.layers.attention import Attend
from vitalloy.layers.sockets import find, swapped
from vitalloy.layers.timm_border import adapt

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
MODELS = {
    "vit": ("vit_tiny_patch16_224", VIT, 2),
    "vit with normed queries": ("vit_tiny_patch16_224", {**VIT, "qk_norm": True, "norm_layer": nn.LayerNorm}, 2),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2)},
        4,
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_adapted_models_compute_the_same(kind):
    name, kwargs, count = MODELS[kind]
    theirs = timm.create_model(name, num_classes=5, **kwargs).double().eval()
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.2)
    ours = adapt(copy.deepcopy(theirs))
    assert len(find(ours, Attend)) == count
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    assert torch.allclose(ours(x), theirs(x), atol=1e-10)
    grads = [torch.autograd.grad(m(x).square().sum(), list(m.parameters())) for m in (ours, theirs)]
    assert all(torch.allclose(a, b, atol=1e-8) for a, b in zip(*grads, strict=True))

    class Nothing(Attend):
        def forward(self, q, k, v, scale=None, bias=None):
            return torch.zeros_like(q)

    with swapped(ours, Attend, lambda name, old: Nothing()):
        assert not torch.allclose(ours(x), theirs(x)), "the socket is not what computes the attention"


def test_attention_dropout_moves_to_the_socket():
    model = adapt(timm.create_model("vit_tiny_patch16_224", **VIT, attn_drop_rate=0.25))
    assert {attend.dropout for attend in find(model, Attend).values()} == {0.25}


def test_create_model_adapts_and_leaves_other_mechanisms_alone():
    model = create_model("vit_tiny_patch16_224.augreg_in21k", **VIT)
    assert len(find(model, Attend)) == 2
    assert not find(create_model("resnet10t"), Attend)
    pickled = copy.deepcopy(model).eval()
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(pickled(x), model.eval()(x))

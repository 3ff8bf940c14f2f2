"""What the goldens do not show of DHVT: sizes as published, what talks to what, folding, grids that are not square."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import vitalloy
from vitalloy.backbones.dhvt import AggregationFeedForward, HeadTokenAttention, OverlapPatchEmbed
from vitalloy.layers import streaming
from vitalloy.layers.sockets import find

COUNTS = {
    "dhvt_tiny_cifar_patch4": 6.009,
    "dhvt_small_cifar_patch4": 23.425,
    "dhvt_tiny_cifar_patch2": 5.845,
    "dhvt_small_cifar_patch2": 22.767,
    "dhvt_tiny_domainnet": 6.106,
    "dhvt_small_domainnet": 23.788,
    "dhvt_tiny": 6.267,
    "dhvt_small": 24.041,
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    classes = vitalloy.registry.default_cfg(name)["num_classes"]
    with torch.device("meta"):
        model = vitalloy.create_model(name, num_classes=classes)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == COUNTS[name]


def test_a_shift_by_one_patch_shifts_the_tokens():
    embed = OverlapPatchEmbed(4, 3, 16).double().eval()
    nn.init.normal_(embed.pre_affine.beta)
    image = torch.randn(1, 3, 24, 32).double()
    tokens, grid = embed(image)
    shifted, _ = embed(image.roll(4, 3))
    tokens, shifted = (t.unflatten(1, grid) for t in (tokens, shifted))
    torch.testing.assert_close(shifted[:, :, 2:-1], tokens[:, :, 1:-2])  # all but the border


def test_a_head_token_comes_from_its_own_channels_of_all_tokens():
    attention, x = HeadTokenAttention(12, 3), torch.randn(2, 6, 12, requires_grad=True)
    for head in range(3):
        grad = torch.autograd.grad(attention.head_tokens(x)[:, head].square().sum(), x)[0]
        own = torch.zeros(12, dtype=torch.bool)
        own[4 * head : 4 * head + 4] = True
        assert (grad[..., own] != 0).all() and (grad[..., ~own] == 0).all()


def test_head_tokens_reach_the_class_token_and_the_patches():
    attention, x = HeadTokenAttention(12, 3).double(), torch.randn(2, 6, 12).double()
    before = attention(x)
    with torch.no_grad():
        attention.pos_embed.normal_(std=5)
    after = attention(x)
    assert before.shape == after.shape == x.shape
    assert ((before - after).abs().amax(-1) > 1e-6).all()


def test_patches_weigh_the_class_token_and_not_the_other_way():
    part = AggregationFeedForward(8, 16).eval()
    x, other = torch.randn(1, 13, 8), torch.randn(1, 13, 8)
    whole = part(x, (3, 4))
    with_other_class = part(torch.cat([other[:, :1], x[:, 1:]], 1), (3, 4))
    torch.testing.assert_close(with_other_class[:, 1:], whole[:, 1:])
    torch.testing.assert_close(with_other_class[:, :1] / other[:, :1], whole[:, :1] / x[:, :1])
    assert not torch.allclose(part(torch.cat([x[:, :1], other[:, 1:]], 1), (3, 4))[:, :1], whole[:, :1])


@pytest.mark.parametrize("patch_size", [2, 4, 16])
def test_fused_models_answer_the_same_in_pieces(patch_size, monkeypatch):
    torch.manual_seed(0)
    model = vitalloy.create_model("dhvt_tiny", patch_size=patch_size, depth=2, embed_dim=48, num_classes=5).double()
    x = torch.randn(7, 3, 2 * patch_size, 3 * patch_size).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        model.train()(x)
        model.eval()
        fused = copy.deepcopy(model).fuse()
        assert not find(fused, nn.BatchNorm2d)
        wanted, plain = model(x), fused(x)
        monkeypatch.setattr(streaming, "WORTHWHILE", 100)
        monkeypatch.setattr("vitalloy.backbones.dhvt.GROUP", 3 * 6 * 192)  # three images, three, and one
        pieces = fused(x)
    torch.testing.assert_close(plain, wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(pieces, wanted, rtol=1e-9, atol=1e-9)


def test_only_the_class_token_is_spared_weight_decay():
    model = vitalloy.create_model("dhvt_tiny_cifar_patch4", depth=1)
    assert "blocks.0.attn.pos_embed" in dict(model.named_parameters())
    assert model.no_weight_decay() == {"cls_token"}

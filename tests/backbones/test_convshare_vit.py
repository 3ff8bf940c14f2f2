"""ConvShareViT: shared convolutions as linear layers and as optics, the modes, and what measures its attention."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from vitalloy import create_model, load_checkpoint
from vitalloy.backbones.convshare_vit import SharedConv, UnsharedConv, attention_entropy, class_token_similarity
from vitalloy.explanation.rollout import RecordedAttend
from vitalloy.layers import optics
from vitalloy.layers.attention import Attend
from vitalloy.layers.sockets import swapped


def test_a_kernel_as_large_as_the_map_is_a_linear_layer():
    layer = SharedConv(8, 1, 3, 8).double()
    assert torch.equal(layer.as_linear().weight, layer.conv.weight.flatten(1))
    x = torch.randn(2, 5, 64, dtype=torch.float64)
    assert torch.allclose(layer(x), x @ layer.conv.weight.flatten(1).T + layer.conv.bias)


def test_valid_padding_fills_the_width_with_kernels():
    model = create_model("convshare_vit_small", num_classes=5)
    block = model.blocks[0]
    assert block.attn.qkv.conv.weight.shape == (12, 1, 5, 5)  # q, k, v: four kernels for 4 x 4 values each
    assert block.mlp.fc2.conv.weight.shape == (4, 4, 5, 5)
    same = create_model("convshare_vit_small_same", num_classes=5).blocks[0]
    assert same.attn.qkv.conv.weight.shape == (3, 1, 5, 5)
    with pytest.raises(Exception, match=r"kernel_size=3 .* \[1, 5, 7, 8\] do"):
        create_model("convshare_vit_small", kernel_size=3)
    with pytest.raises(Exception, match="full"):
        create_model("convshare_vit_small", padding="full")


@pytest.mark.parametrize(("in_maps", "out_maps"), [(1, 3), (4, 1)])
def test_a_layer_is_shots_over_tiled_planes(in_maps, out_maps):
    layer = SharedConv(8, in_maps, out_maps, 5).double()
    x = torch.randn(2, 7, in_maps * 64, dtype=torch.float64)
    maps = x.unflatten(-1, (in_maps, 8, 8))
    out = []
    for kernel, bias in zip(layer.conv.weight, layer.conv.bias, strict=True):
        shots = [
            optics.untile(optics.convolve_plane(optics.tile(maps[:, :, i], 5, 3), kernel[i]), 7, 8, 5, 3)
            for i in range(in_maps)
        ]
        out.append(sum(shots) + bias)
    assert torch.allclose(layer(x), torch.stack(out, 2).flatten(2))


@pytest.mark.parametrize("padding", ["valid", "same"])
def test_equal_kernels_for_each_token_are_shared_ones(padding):
    shared = SharedConv(8, 4, 1, 5, padding)
    own = UnsharedConv(8, 4, 1, 5, padding, (2, 3), prefix=1)
    with torch.no_grad():
        own.weight.copy_(shared.conv.weight.flatten().expand_as(own.weight))
        own.bias.copy_(shared.conv.bias.expand_as(own.bias))
    x = torch.randn(2, 7, 256)
    assert torch.allclose(own(x, (2, 3)), shared(x), atol=1e-6)
    larger = torch.randn(2, 1 + 4 * 4, 256)
    assert torch.allclose(own(larger, (4, 4)), shared(larger), atol=1e-5)


def test_kernels_of_tokens_are_resized_at_loading():
    small = create_model("convshare_vit_small_unshared", num_classes=5, depth=1)
    large = create_model("convshare_vit_small_unshared", num_classes=5, depth=1, img_size=48)
    load_checkpoint(large, small.state_dict())
    ours, theirs = (m.blocks[0].attn.qkv.weight for m in (large, small))
    assert ours.shape[1] == 1 + 12 * 12 and torch.equal(ours[:, :1], theirs[:, :1])
    assert torch.allclose(ours[:, 1:].mean(), theirs[:, 1:].mean(), atol=1e-3)


def test_folding_leaves_a_plain_transformer():
    model = create_model("convshare_vit_small", num_classes=5, depth=2).double().eval()
    kept, x = copy.deepcopy(model), torch.randn(2, 3, 40, 32, dtype=torch.float64)
    model.fuse()
    assert not any(isinstance(m, SharedConv) for m in model.modules())
    assert sum(isinstance(m, nn.Linear) for m in model.modules()) == 4 * 2 + 1
    assert torch.allclose(model(x), kept(x), atol=1e-12)
    with pytest.raises(ValueError, match="fused"):
        model.set_photons(100)


def test_optics_are_exact_but_for_photons():
    torch.manual_seed(0)
    model = create_model("convshare_vit_small", num_classes=5, depth=2).eval()
    x = torch.randn(2, 3, 32, 32)
    exact, errors = model(x), []
    for photons in (1e3, 1e5, 1e7):
        model.set_photons(photons)
        errors.append((model(x) - exact).abs().mean().item())
    assert errors[0] > 3 * errors[1] > 9 * errors[2] > 0
    frozen = copy.deepcopy(model).fuse()
    assert not torch.equal(frozen(x), frozen(x)), "what is noisy was folded"
    model.set_photons(None)
    assert torch.equal(model(x), exact)
    model.set_photons(255)
    model.train()(x).square().sum().backward()
    assert model.blocks[0].attn.qkv.conv.weight.grad.abs().sum() > 0


def test_shots_of_a_pass():
    model = create_model("convshare_vit_small", num_classes=5)
    kernels = 12 + 4 + 16 + 4 * 4  # q k v, projection, perceptron: its last layer sums over four maps
    assert model.count_shots() == 6 * 4 * kernels
    full = (2160 // 12) * (3840 // 12) // 65  # images whose tokens fill one plane
    assert model.count_shots(full) == model.count_shots() == model.count_shots(full + 1) // 2
    assert model.count_shots(full, img_size=(32, 64)) == 2 * model.count_shots()


def attention_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    layers = []
    with swapped(model, Attend, lambda *_: RecordedAttend(0.0, layers)), torch.no_grad():
        model(x)
    return layers[0]


def test_measures_of_attention():
    even, sharp = torch.full((2, 5, 5), 0.2), torch.eye(5).expand(2, 5, 5)
    assert attention_entropy(even).item() == pytest.approx(math.log(5))
    assert attention_entropy(sharp).item() == 0
    assert class_token_similarity(even, even).item() == pytest.approx(1)
    aside = torch.zeros(2, 5, 5)
    aside[..., 1] = 1
    assert class_token_similarity(aside, even).item() == pytest.approx(0.5)
    models = [create_model(f"convshare_vit_small{form}", num_classes=5, depth=1) for form in ("", "_same", "_linear")]
    maps = [attention_of(model.eval(), torch.randn(2, 3, 32, 32)) for model in models]
    assert all(m.shape[-2:] == (65, 65) and torch.allclose(m.sum(-1), torch.ones(())) for m in maps)
    assert 0 < class_token_similarity(maps[0], maps[2]) <= 1

"""What the goldens do not show of EfficientFormerV2: sizes, timm's files, odd grids, what folding leaves."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import vitalloy
from vitalloy.backbones.efficientformer_v2 import AttentionDownsample, TalkingAttend, TalkingAttention
from vitalloy.layers.sockets import find

SMALL = {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 2, 2), "num_attention": 1, "num_classes": 5}


def randomise(model: nn.Module) -> nn.Module:
    """Weights under which every parameter matters."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5)
            elif value.is_floating_point():
                value.normal_(std=value[0].numel() ** -0.5 if value.ndim > 1 else 0.5)
    return model


@pytest.mark.parametrize(("size", "millions"), [("s0", 3.600), ("s1", 6.186), ("s2", 12.710), ("l", 26.322)])
def test_published_parameter_counts(size, millions):
    with torch.device("meta"):
        model = vitalloy.create_model(f"efficientformerv2_{size}")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == millions


def test_timm_s_files_load():
    args = {k: v for k, v in SMALL.items() if k != "num_attention"}
    ratios = (4, 4, (3, 4), (4, 4))
    theirs = timm.create_model(
        "efficientformerv2_s0", num_vit=1, mlp_ratios=((4,), (4,), (3, 4), (4, 4)), drop_path_rate=0.0, **args
    )
    theirs = randomise(theirs).eval()
    ours = vitalloy.create_model("efficientformerv2_s0", mlp_ratios=ratios, **SMALL).eval()
    assert vitalloy.load_checkpoint(ours, theirs.state_dict()) == vitalloy.checkpoints.Loaded()
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-3, rtol=1e-4)


def test_attention_works_at_half_resolution_in_the_third_stage_only():
    model = vitalloy.create_model("efficientformerv2_s0", **SMALL, mlp_ratios=(4, 4, 4, 4))
    grids = {name: mixer.bias.grid for name, mixer in find(model, TalkingAttention).items()}
    assert grids == {"block3.1.token_mixer": (7, 7), "block4.1.token_mixer": (7, 7)}
    assert find(model, AttentionDownsample)["patch_embed4.attn"].bias.grid == (14, 14)


@pytest.mark.parametrize("side", [(15, 15), (7, 10), (1, 3)])
def test_odd_maps_keep_their_size(side):
    mixer = randomise(TalkingAttention(24, side, num_heads=2, key_dim=8, stride=2)).eval()
    down = randomise(AttentionDownsample(24, 16, side, num_heads=2, key_dim=8)).eval()
    x = torch.randn(2, 24, *side)
    assert mixer(x).shape == x.shape
    assert down(x).shape == (2, 16, -(-side[0] // 2), -(-side[1] // 2))


def test_heads_talk():
    torch.manual_seed(0)
    talk = TalkingAttend(2)
    q, k, v = torch.randn(3, 1, 2, 5, 4).unbind(0)
    bias = torch.zeros(2, 5, 5)
    moved = q.clone()
    moved[:, 0] += 1  # another query of head 0 changes what head 1 returns
    assert not torch.allclose(talk(moved, k, v, bias)[:, 1], talk(q, k, v, bias)[:, 1])


def test_folding_leaves_no_norm_but_the_last_and_no_layer_scale():
    model = randomise(vitalloy.create_model("efficientformerv2_s0", **SMALL, mlp_ratios=(4, 4, 4, 4))).double().eval()
    x = torch.randn(2, 3, 96, 128, dtype=torch.float64)
    with torch.no_grad():
        wanted = model(x)
        assert torch.allclose(model.fuse()(x), wanted, rtol=1e-9, atol=1e-9)
    assert list(find(model, nn.BatchNorm2d)) == ["norm4"]
    assert not any(name.endswith("scale") for name, _ in model.named_parameters())

"""What the goldens do not show of CAS-ViT: sizes as published, files with one and two classifiers, the mixer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import vitalloy
from vitalloy.backbones.cas_vit import AdditiveAttention
from vitalloy.layers.sockets import find
from vitalloy.layers.tokens import to_map, to_tokens

COUNTS = {"xs": (2.980, 3.201), "s": (5.507, 5.764), "m": (12.037, 12.422), "t": (21.250, 21.763)}


@pytest.mark.parametrize("size", COUNTS)
@pytest.mark.parametrize("distilled", [False, True])
def test_parameter_counts(size, distilled):
    with torch.device("meta"):
        model = vitalloy.create_model(f"cas_vit_{size}", distilled=distilled)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == COUNTS[size][distilled]


def test_a_file_with_two_classifiers_loads_as_their_mean():
    both = vitalloy.create_model("cas_vit_nano", num_classes=5, distilled=True).eval()
    state = {k.replace("head_dist.", "dist_head."): v for k, v in both.state_dict().items()}
    one = vitalloy.create_model("cas_vit_nano", num_classes=5).eval()
    assert vitalloy.load_checkpoint(one, {"model": state}) == vitalloy.checkpoints.Loaded()
    x = torch.randn(2, 3, 32, 32)
    assert not torch.equal(both.head.weight, both.head_dist.weight)
    torch.testing.assert_close(one(x), both(x))


def test_a_file_with_one_classifier_loads_into_both():
    one = vitalloy.create_model("cas_vit_nano", num_classes=5).eval()
    both = vitalloy.create_model("cas_vit_nano", num_classes=5, distilled=True).eval()
    assert vitalloy.load_checkpoint(both, one.state_dict()) == vitalloy.checkpoints.Loaded()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(one(x), both(x))


def test_moving_averages_are_taken_on_request():
    model, other = (vitalloy.create_model("cas_vit_nano", num_classes=5) for _ in range(2))
    loaded = vitalloy.create_model("cas_vit_nano", num_classes=5)
    vitalloy.load_checkpoint(loaded, {"model": model.state_dict(), "model_ema": other.state_dict()}, averaged=True)
    assert torch.equal(loaded.stages[3].blocks[0].attn.qk.weight, other.stages[3].blocks[0].attn.qk.weight)


def test_a_map_s_own_norm_does_not_feed_the_next_stage():
    model = vitalloy.create_model("cas_vit_nano", features_only=True).eval()
    x = torch.randn(1, 3, 48, 32)
    before = model(x)
    with torch.no_grad():
        model.model.norms[1].weight.mul_(2)
        model.model.norms[1].bias.add_(1)
    after = model(x)
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, False, True, True]
    torch.testing.assert_close(after[1], 2 * before[1] + 1)


def test_keys_and_both_gates_matter():
    torch.manual_seed(0)
    mixer, x = AdditiveAttention(16).double().eval(), torch.randn(1, 16, 6, 5).double()
    whole = mixer(x)
    gated = mixer.gate(to_map(mixer.qk(to_tokens(x)), (6, 5)))
    plain = mixer.qk(to_tokens(x)).chunk(2, -1)
    ratio = gated[0] / plain[0]  # the product of the two gates, so of rank one over pixels and channels
    assert torch.linalg.matrix_rank(ratio[0], rtol=1e-9) == 1 and ratio.std(1).min() > 0 and ratio.std(2).min() > 0
    with torch.no_grad():
        mixer.qk.weight[16:].zero_()
    assert not torch.allclose(mixer(x), whole)


def test_fusing_leaves_no_batch_norm_but_the_last_and_one_classifier():
    model = vitalloy.create_model("cas_vit_nano", distilled=True).fuse()
    assert set(find(model, nn.BatchNorm2d)) == {"norms.3"} and model.head_dist is None

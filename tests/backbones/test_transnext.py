"""What the goldens do not show of TransNeXt: counts, files, other sizes, and what its attention sees."""

from __future__ import annotations

import pytest
import torch

import vitalloy
from vitalloy.backbones.transnext import AggregatedAttention
from vitalloy.errors import ModelError
from vitalloy.layers.focal import FocalAttend, Views, make_view


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("transnext_micro_aaaa", 13_114_008),
        ("transnext_tiny", 28_258_960),
        ("transnext_small", 49_741_564),
        ("transnext_base", 89_721_496),
    ],
)
def test_published_parameter_counts(name, count):
    with torch.device("meta"):
        model = vitalloy.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == count


def authors_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, tensor in state.items():
        if ".mlp.gate." in name:
            tensor = torch.cat([tensor, state[name.replace(".gate.", ".value.")]])
        name = name.replace(".attn.scale.", ".attn.").replace(".dwconv.", ".dwconv.dwconv.")
        name = name.replace(".position_bias.fc", ".cpb_fc").replace(".position_bias.local", ".relative_pos_bias_local")
        if ".mlp.value." not in name:
            renamed[name.replace(".mlp.gate.", ".mlp.fc1.")] = tensor
    return renamed


def test_the_authors_files_load():
    model = vitalloy.create_model("transnext_nano", num_classes=5).eval()
    published = authors_names(model.state_dict())
    assert "block1.0.attn.temperature" in published and "block1.0.mlp.fc1.weight" in published
    fresh = vitalloy.create_model("transnext_nano", num_classes=5).eval()
    assert vitalloy.load_checkpoint(fresh, {"model": published}) == vitalloy.checkpoints.Loaded()
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(fresh(x), model(x))


def pair(size, **kwargs) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A model of 32 pixels, and one of another size with its weights."""
    model = vitalloy.create_model("transnext_nano", num_classes=5, **kwargs).eval()
    other = vitalloy.create_model("transnext_nano", num_classes=5, img_size=size, pretrain_size=32, **kwargs).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    other.load_state_dict(model.state_dict())
    return model, other


@pytest.mark.parametrize("kwargs", [{}, {"fixed_pool_size": 3}])
def test_another_size_is_answered_as_by_a_model_built_for_it(kwargs):
    model, other = pair((44, 72), **kwargs)
    x = torch.randn(1, 3, 44, 72)
    torch.testing.assert_close(model(x), other(x))
    torch.testing.assert_close(model.fuse()(x), other.fuse()(x))


def test_biases_are_resized_in_interpolation_mode():
    model, extrapolating = pair(32)
    interpolating = vitalloy.create_model("transnext_nano", num_classes=5, position_mode="interpolate").eval()
    interpolating.load_state_dict(model.state_dict())
    same, larger = torch.randn(1, 3, 32, 32), torch.randn(1, 3, 48, 40)
    torch.testing.assert_close(interpolating(same), model(same))
    assert not torch.allclose(interpolating(larger), extrapolating(larger))
    bias = interpolating.block1[0].attn.position_bias
    view, usual = bias.views((24, 20)), bias.views((16, 16))
    resized, whole = bias(view)[:, :, 9:], bias(usual)[:, :, 9:]
    assert resized.shape == (1, 24 * 20, 6 * 5)
    assert whole.amin() <= resized.amin() and resized.amax() <= whole.amax()


def test_positions_are_measured_by_the_size_of_the_first_training():
    own = vitalloy.create_model("transnext_nano", num_classes=5, img_size=64).eval()
    smaller = vitalloy.create_model("transnext_nano", num_classes=5, img_size=64, pretrain_size=32).eval()
    with torch.no_grad():
        for p in own.parameters():
            p.add_(0.1 * torch.randn_like(p))
    smaller.load_state_dict(own.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert not torch.allclose(own(x), smaller(x))


def test_weights_of_neighbours_and_pooled_keys_sum_to_one():
    grid, heads = (5, 6), 2
    view = make_view(grid, (2, 3), window=3)
    q, k = torch.randn(2, 2, 30, heads, 4).unbind()
    bias = torch.randn(heads, 30, 15).masked_fill(torch.nn.functional.pad(view.outside, (0, 6)), -torch.inf)
    ones = torch.ones(2, 30, heads, 4)
    out = FocalAttend()(q, k, ones, k[:, :6], ones[:, :6], bias, torch.zeros(2, 30, heads, 9), grid)
    torch.testing.assert_close(out, torch.ones(2, 30, 8))
    assert view.count.unique().tolist() == [6 + 4, 6 + 6, 6 + 9]


def test_one_layer_sees_the_whole_map():
    grid = (12, 16)
    attention = AggregatedAttention(24, 1, Views(grid, reduction=4, window=3), pretrain=grid)
    x = torch.randn(1, 12 * 16, 24, requires_grad=True)
    attention(x, grid)[0, 0].square().sum().backward()
    assert (x.grad.abs().sum(-1) > 0).all()


def test_what_weight_decay_spares():
    model = vitalloy.create_model("transnext_nano")
    spared = model.no_weight_decay()
    assert "block1.0.attn.scale.temperature" in spared and "block4.0.attn.scale.query_embedding" in spared
    assert {f"block1.0.attn.position_bias.{part}" for part in ("local", "fc1.weight", "fc2.weight")} <= spared


def test_bad_arguments_are_refused():
    with pytest.raises(ModelError, match="position_mode"):
        vitalloy.create_model("transnext_nano", position_mode="resize")
    with pytest.raises(ModelError, match="window of 4"):
        vitalloy.create_model("transnext_nano", window=4)

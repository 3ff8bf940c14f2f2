"""Circular shifts leave the logits of converted models as they are, and the measures say so."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from torch import Tensor, nn

import vitalloy
from vitalloy.errors import DataError, ModelError
from vitalloy.robustness.shift_equivariance import (
    PERTURBATIONS,
    logit_variance,
    make_shift_equivariant,
    shift,
    shift_consistency,
    unprotected,
    worst_shift_top1,
)

PVT = {"embed_dims": (16, 32, 48, 64), "num_heads": (1, 2, 3, 4), "depths": (1, 1, 2, 1)}
# name, side, arguments
MODELS = {
    "vit": ("vit_nano", 32, {"depth": 3}),
    "vit distilled": ("vit_nano", 64, {"depth": 2, "distilled": True}),
    "vit avg": ("vit_nano", 32, {"depth": 2, "global_pool": "avg"}),
    "twins svt": ("twins_svt_nano", 32, {}),
    "twins svt, windows last": ("twins_svt_nano", 64, {"depths": (1, 2, 3, 1)}),
    "twins pcpvt": ("twins_svt_nano", 64, {"window_size": None, "reductions": (8, 4, 1, 1)}),
    "swin": ("swin_nano", 64, {}),
    "swin, one window": ("swin_nano", 32, {"window_size": 16}),
    "pvt": ("pvt_tiny", 64, PVT),
    "pvt dense": ("pvt_tiny", 64, {**PVT, "class_token": False}),
    "pvt_v2": ("pvt_v2_nano", 32, {"depths": (1, 1, 1, 1)}),
    "pvt_v2 linear": ("pvt_v2_nano", 28, {"linear": True, "embed_dims": (16, 32), "depths": (1, 1)}),
}


def build(key: str, **kwargs) -> nn.Module:
    name, side, args = MODELS[key]
    torch.manual_seed(0)
    return vitalloy.create_model(name, num_classes=5, img_size=side, **args, **kwargs).eval()


def stir(model: nn.Module) -> nn.Module:
    """Weights far from their start, so that every part matters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def images(side: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def change(model: nn.Module, x: Tensor) -> float:
    wanted = model(x)
    moves = ((1, 1), (5, 3), (-7, 11), (0, 2))
    return max(float((model(shift(x, *move)) - wanted).abs().max()) for move in moves)


@pytest.mark.parametrize("key", MODELS)
def test_circular_shifts_do_not_change_the_logits(key):
    model, x = stir(build(key)).double(), images(MODELS[key][1]).double()
    assert change(model, x) > 1e-2
    assert make_shift_equivariant(model) is model and make_shift_equivariant(model) is model
    stir(model)  # position convolutions start at zero
    assert change(model, x) < 1e-12
    assert unprotected(model) == []
    with torch.no_grad():
        a, b = model(x)
        assert (a - b).abs().max() > 1e-2, "the answer does not depend on the image"
        fused = copy.deepcopy(model).fuse()
        assert torch.allclose(fused(x), model(x), atol=1e-10)


@pytest.mark.parametrize("key", ["vit", "twins svt", "swin", "pvt", "pvt_v2"])
def test_single_precision_holds_from_the_first_step_on(key):
    """Fresh layer norms make tokens of equal norm, among which rounding must not choose."""
    model, x = build(key, anchored=True), images(MODELS[key][1], 8)
    assert change(model, x) < 1e-4
    model.train()(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("key", ["vit", "twins svt", "swin", "pvt", "pvt_v2"])
def test_converted_models_can_be_saved_copied_and_pruned(key, tmp_path):
    model, x = make_shift_equivariant(stir(build(key))), images(MODELS[key][1])
    with torch.no_grad():
        wanted = model(x)
        assert torch.equal(vitalloy.load(vitalloy.save(model, tmp_path))(x), wanted)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), wanted)
        maps = copy.deepcopy(model).forward_intermediates(x, [0, 1], intermediates_only=True)
        pruned = copy.deepcopy(model)
        assert pruned.prune_intermediate_layers([0, 1], prune_norm=True) == [0, 1]
        again = pruned.forward_intermediates(x, [0, 1], intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(maps, again, strict=True))


def test_what_tokens_had_of_the_position_table_they_keep():
    vit = stir(build("vit distilled"))
    table, cls, dist = (t.detach().clone() for t in (vit.pos_embed, vit.cls_token, vit.dist_token))
    make_shift_equivariant(vit)
    assert torch.equal(vit.cls_token, cls + table[:, :1]) and torch.equal(vit.dist_token, dist + table[:, 1:2])
    assert "pos_embed" not in vit.state_dict() | dict.fromkeys(vit.no_weight_decay())


def test_a_size_without_the_guarantee_is_named(caplog):
    torch.manual_seed(0)
    model = stir(vitalloy.create_model("twins_svt_nano", num_classes=5)).double().eval()
    model.default_cfg["input_size"] = (3, 48, 48)
    with caplog.at_level(logging.WARNING, logger="vitalloy"):
        make_shift_equivariant(model)
    assert "blocks.2.0: 6x6 map, stride=(4, 4)" in caplog.text
    assert unprotected(model, (32, 64)) == [] and change(model, images(32).double()) < 1e-12
    assert len(unprotected(model, (48, 48))) == 1 and change(model, images(48).double()) > 1e-3
    assert unprotected(model, (34, 32))[0].startswith("blocks.0.0: 17x16 map")


def test_other_models_are_refused():
    with pytest.raises(ModelError, match="ConvNeXt has no shift-equivariant form"):
        make_shift_equivariant(vitalloy.create_model("convnext_nano", num_classes=2))


@pytest.mark.parametrize(
    ("name", "count"), [("polyvit_small_patch16_224", 21_979_624), ("polyvit_base_patch16_224", None)]
)
def test_polyvit_is_a_vit_without_a_table(name, count):
    with torch.device("meta"):
        poly, plain = vitalloy.create_model(name), vitalloy.create_model(name.removeprefix("poly"))
    dim = poly.embed_dim
    found, other = (sum(p.numel() for p in m.parameters()) for m in (poly, plain))
    assert found == other - 197 * dim + 2 * dim + 10 * dim and count in (None, found)


def test_shifts():
    x = torch.arange(12.0).view(1, 1, 3, 4)
    assert torch.equal(shift(x, 1, -1), x.roll((1, -1), (2, 3)))
    assert shift(x, 1, -1, wrap=False).squeeze().tolist() == [[0, 0, 0, 0], [1, 2, 3, 0], [5, 6, 7, 0]]
    assert torch.equal(shift(shift(x, -2, 3, wrap=False), 2, -3, wrap=False)[..., 2:, :1], x[..., 2:, :1])


def test_consistency_of_a_model_that_looks_at_one_pixel():
    """Which shifts an image is given decides its class, so every measure can be counted by hand."""

    def corner(x: Tensor) -> Tensor:
        return torch.stack([1 - x[:, 0, 0, 0], x[:, 0, 0, 0]], 1)

    blank, full = torch.zeros(4, 1, 16, 16), torch.ones(4, 1, 16, 16)
    zeros = torch.zeros(4, dtype=torch.long)
    even = shift_consistency(corner, [(blank, zeros), (full, zeros)])
    assert (even.consistency, even.top1, even.images) == (1.0, 0.5, 8)
    dot = blank.clone()
    dot[..., 0, 0] = 1  # seen under the shift (0, 0) only
    moves = torch.randint(4, (100, 2, 2), generator=torch.Generator().manual_seed(5))
    same = sum(int(a.any() == b.any()) for a, b in moves)
    first = sum(int(not a.any()) for a, _ in moves)
    got = shift_consistency(corner, [(dot, zeros + 1)] * 100, max_shift=3, seed=5)
    assert (got.consistency, got.top1) == (same / 100, first / 100) and same < 100
    assert worst_shift_top1(corner, [(dot, zeros), (blank, zeros)], reach=1) == 0.5
    assert logit_variance(corner, [(dot, zeros)]) == pytest.approx(0.09)  # one of ten shifts moves the logit by 1
    assert shift_consistency(corner, [(full, zeros + 1)], wrap=False).top1 < 1  # zeros come in at the corner
    with pytest.raises(DataError, match="there are none"):
        shift_consistency(corner, [])


@pytest.mark.parametrize("key", ["vit", "twins svt"])
def test_converted_models_are_consistent_and_plain_ones_are_not(key):
    x = images(MODELS[key][1], 8)
    batches = [(part, torch.zeros(len(part), dtype=torch.long)) for part in x.split(4)]
    plain, poly = stir(build(key)), make_shift_equivariant(stir(build(key)))
    assert shift_consistency(plain, batches).consistency < 1
    assert shift_consistency(poly, batches).consistency == 1
    assert logit_variance(poly, batches) < 1e-9 < logit_variance(plain, batches)
    # real translations bring new content: not guaranteed
    assert logit_variance(poly, batches, wrap=False) > 1e-6


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_perturbations_keep_the_size(name):
    x = images(32)
    torch.manual_seed(3)
    perturb = PERTURBATIONS[name](32)
    damaged = [perturb(x) for _ in range(8)]
    assert all(d.shape == x.shape for d in damaged) and any(not torch.equal(d, x) for d in damaged)


TWO_STAGES = {"embed_dims": (8, 16), "num_heads": (1, 2), "mlp_ratios": (2, 2), "reductions": (2, 1), "depths": (1, 1)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "args"), [("twins_svt_nano", TWO_STAGES), ("swin_nano", {"depths": (2,), "num_heads": (1,)})]
)
def test_converted_models_are_exported_with_a_free_batch(name, args):
    model = stir(vitalloy.create_model(name, num_classes=5, img_size=16, anchored=True, **args)).eval()
    program = torch.export.export(model, (images(16),), dynamic_shapes=({0: torch.export.Dim("batch", max=64)},))
    more = images(16, 5)
    with torch.no_grad():
        assert torch.allclose(program.module()(more), model(more), atol=1e-5)

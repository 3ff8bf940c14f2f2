"""LPViT: the budget is met, what goes is what matters least, cut models compute what silenced ones do, zeros stay."""

from __future__ import annotations

import copy
import itertools

import pytest
import timm
import torch
from torch import nn

import vitalloy
from vitalloy.compression.pruning import lpvit
from vitalloy.compression.pruning.lpvit import aligned, allocation, curves, execution, groups, layers, masks
from vitalloy.compression.trunk import macs
from vitalloy.deployment import export_onnx, verify_onnx
from vitalloy.errors import CompressionError
from vitalloy.layers.fusion import fuse
from vitalloy.layers.timm_border import adapt

BACKBONES = {  # name: share of the multiply-adds of layers that take part, at least
    "vit_nano": 0.85,
    "swin_nano": 0.85,
    "cvt_nano": 0.7,
    "pvt_v2_nano": 0.7,
    "efficientformer_nano": 0.65,
    "nextvit_nano": 0.8,
    "convit_nano": 0.85,
    "transnext_nano": 0.3,
    "timm_vit": 0.8,
    "timm_swin": 0.85,
}


def create(name: str = "vit_nano", **sizes: int) -> nn.Module:
    torch.manual_seed(0)
    if name == "timm_vit":
        kind = timm.models.VisionTransformer
        return adapt(kind(32, 4, embed_dim=64, depth=4, num_heads=2, num_classes=10)).eval()
    if name == "timm_swin":
        kind = timm.models.SwinTransformer
        own = {"embed_dim": 32, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4}
        return adapt(kind(32, 2, num_classes=10, **own)).eval()
    return vitalloy.create_model(name, num_classes=10, img_size=32, **sizes).eval()


def pictures(count: int = 8) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", BACKBONES)
def test_cut_models_compute_what_silenced_ones_do(name):
    model, images = create(name).double(), pictures(2).double()
    found = groups.find_groups(model, images)
    touched = {member.layer for group in found for part in group.parts for member in part.members}
    work = {a.name: a.flops(published=False) for a in layers.layers_of(model, images[:1])}
    assert sum(v for k, v in work.items() if k in touched) / macs(model, images[:1]) > BACKBONES[name]

    cut, silenced = copy.deepcopy(model), copy.deepcopy(model)
    named = aligned.parameters_of(model, found)
    own = dict(zip(named, layers.gradients(model, images, list(named.values())), strict=True))
    ranked = [aligned.rank(model, group, own) for group in found]
    gone = [group.blocks // 2 for group in found]
    sizes = aligned.remove(cut, ranked, gone)
    for r, blocks in zip(ranked, gone, strict=True):
        for part, units in zip(r.group.parts, r.gone(blocks), strict=True):
            groups.silence(silenced, part, units)
    with torch.no_grad():
        wanted = silenced(images)
        torch.testing.assert_close(cut(images), wanted)
        torch.testing.assert_close(fuse(copy.deepcopy(cut))(images), wanted)
        assert not torch.allclose(model(images), wanted)
    again = lpvit.rebuild(create(name).double(), sizes=sizes)
    again.load_state_dict(cut.state_dict())
    torch.testing.assert_close(again(images), wanted)


@pytest.mark.parametrize("name", ["cvt_nano", "efficientformer_nano"])
def test_aligned_pruning_meets_the_budget_with_smaller_plain_layers(name):
    images, told = pictures(), []
    model = create(name)
    whole = macs(model, images[:1])
    pruned = lpvit.compress(
        copy.deepcopy(model), images, macs=0.6, pattern="aligned", progress=lambda *args: told.append(args)
    )
    assert 0.57 < macs(pruned, images[:1]) / whole <= 0.602
    assert pruned.settings["share"] == pytest.approx(macs(pruned, images[:1]) / whole, abs=1e-3)
    assert pruned.settings["model_macs"][0] == whole
    assert told == sorted(told) and told[-1] == (100, 100)
    rows = {row["layer"]: row for row in lpvit.table(pruned)}
    assert all(0 < row["kept"] <= 1 for row in rows.values()) and min(row["kept"] for row in rows.values()) < 0.6
    assert {type(m) for m in pruned.modules()} == {type(m) for m in model.modules()}
    with torch.no_grad():
        torch.testing.assert_close(copy.deepcopy(pruned)(images), pruned(images))


def test_a_pruned_model_exports(tmp_path):
    images = pictures()
    pruned = lpvit.compress(create(depth=1), images, pattern="aligned", epochs=0)
    export_onnx(pruned, images[:2], tmp_path / "pruned.onnx")
    verify_onnx(pruned, tmp_path / "pruned.onnx", [images[:3], images[:1]], tolerance=1e-4)


def test_channels_that_do_nothing_go_first():
    model, images = create(depth=2), pictures()
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.fc2.weight[:, ::2] = 0  # half of the hidden units are never read
            wanted = model(images)
    pruned = lpvit.compress(copy.deepcopy(model), images, macs=0.75, pattern="aligned", epochs=0)
    with torch.no_grad():
        torch.testing.assert_close(pruned(images), wanted)
    assert all(192 <= block.mlp.fc1.out_features < 384 for block in pruned.blocks)

    masked = lpvit.compress(create(depth=2), images, macs=0.1, pattern="blocks", as_published=False, epochs=0)
    widths = [block.mlp.fc1.out_features for block in masked.blocks]
    assert min(widths) < 384  # what blocks leave empty is taken out
    dead = [(block.mlp.fc2.weight == 0).all(0).any() for block in masked.blocks]
    assert not any(dead)


@pytest.mark.parametrize(
    "options", [{}, {"as_published": False}, {"cost": "energy"}, {"as_published": False, "power": 0.01}]
)
def test_blocks_are_zero_and_stay_zero(options):
    images = pictures(16)
    pruned = lpvit.compress(create(depth=2), images, pattern="blocks", block=(8, 16), lr=1e-3, epochs=2, **options)
    assert abs(pruned.settings["share"] - 0.5) < 0.021
    copied = copy.deepcopy(pruned).train()
    zeros = {n: copied.get_submodule(n).weight == 0 for n in copied.settings["masked"]}
    assert sum(z.sum() for z in zeros.values()) > 0.2 * sum(z.numel() for z in zeros.values())
    for zero in zeros.values():
        assert set((masks.block_sums(zero.float(), (8, 16)) % 16).unique().tolist()) == {
            0.0
        }  # rows of a block at least
    before = copied.blocks[0].mlp.fc1.weight.detach().clone()
    optimizer = torch.optim.AdamW(copied.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        copied(images).square().mean().backward()
        optimizer.step()
    for name, zero in zeros.items():
        assert torch.equal(copied.get_submodule(name).weight == 0, zero), name
    assert not torch.equal(before, copied.blocks[0].mlp.fc1.weight)
    again = lpvit.rebuild(create(depth=2), **pruned.settings)
    again.load_state_dict(pruned.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(again(images), pruned(images))


def test_training_brings_the_answer_back():
    images = pictures(32)
    teacher = create(depth=2)
    with torch.no_grad():
        teacher.head.weight.mul_(10)
        answer = teacher(images)
        batches = [(batch, teacher(batch).argmax(1)) for batch in images.split(16)]
    distances = []
    for options in (
        {"epochs": 0},
        {"epochs": 15, "lr": 3e-4},
        {"epochs": 8, "train": batches, "lr": 3e-4, "distill": 0.9},
    ):
        pruned = lpvit.compress(copy.deepcopy(teacher), images, macs=0.3, pattern="aligned", **options)
        with torch.no_grad():
            distances.append(float((pruned(images).softmax(1) - answer.softmax(1)).abs().mean()))
    assert max(distances[1:]) < 0.85 * distances[0]


def test_the_exact_increments_add_up_and_the_published_do_not():
    generator = torch.Generator().manual_seed(0)
    weight, gradient = (torch.randn(40, 50, generator=generator, dtype=torch.float64) for _ in "wg")
    ranking = masks.Ranking.of(weight, gradient, (8, 16))
    shares = curves.amounts(20)
    for corrected in (True, False):
        given = curves.distortion_curve(ranking, 20, corrected=corrected)
        last, total = weight, 0.0
        for share, value in zip(shares, given, strict=True):
            left = weight * masks.block_mask(weight, gradient, share, (8, 16))
            change, step = left - weight, left - last
            total += float(curves.second_order_increment(change, step, gradient, corrected))
            exact = 0.5 * float((change * gradient).sum()) ** 2
            assert float(value) == pytest.approx(float((change * gradient).square().mean()) + total, abs=1e-9)
            assert not corrected or total == pytest.approx(exact, abs=1e-9)
            last = left
        assert corrected or abs(total - exact) > 0.1 * exact


def test_one_price_is_as_good_as_trying_everything():
    generator = torch.Generator().manual_seed(0)
    damages = [torch.rand(5, generator=generator).double().cumsum(0) ** 2 for _ in range(4)]
    costs = [torch.rand(5, generator=generator).double().cumsum(0).flip(0) for _ in range(4)]

    def total(tables, points):
        return sum(float(t[p]) for t, p in zip(tables, points, strict=True))

    budget = 0.6 * total(costs, [0] * 4)
    chosen, _ = allocation.priced_allocation(damages, costs, budget, [4] * 4)
    every = [p for p in itertools.product(range(5), repeat=4) if total(costs, p) <= budget]
    best = min(total(damages, p) for p in every)
    assert total(costs, chosen) <= budget and total(damages, chosen) <= 1.2 * best


def test_both_allocations_side_by_side():
    both = lpvit.compare(create(depth=2), pictures(), macs=0.4, power=1.0)
    published, corrected = both["published"], both["corrected"]
    assert corrected.share == pytest.approx(0.4, abs=0.01) and corrected.share <= 0.4
    assert published.powers[1][-1] > published.powers[1][0] and corrected.powers[1][-1] == 0
    assert len(published.amounts) == len(corrected.amounts) == 10


def test_measured_time_falls_with_the_width_and_is_a_budget():
    model, images = create(depth=2), pictures(16)
    found = groups.find_groups(model, images[:1])
    times = lpvit.measure_costs(model, images, found, rounds=9)
    hidden = [times.seconds[g.name] for g in found if g.kind == "hidden"]
    assert all(torch.equal(hidden[0], other) for other in hidden)  # of one shape: measured once
    assert hidden[0][-1] < hidden[0][0] and len(hidden[0]) == 24 and times.batch == 16
    pruned = lpvit.compress(model, images, macs=0.8, pattern="aligned", cost="latency", epochs=0)
    assert pruned.settings["share"] <= 0.802 and pruned.settings["model_macs"][1] < pruned.settings["model_macs"][0]


def test_block_sparse_products_are_right_and_measured():
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    weight = weight * masks.block_mask(weight, None, 0.7, (16, 16), "l1")
    x = pictures(1).flatten(1)[:, : 96 * 5].view(5, 96)
    wanted = x @ weight.t()
    torch.testing.assert_close(execution.gathered_product(x, *execution.gathered(weight, (16, 16))), wanted)
    torch.testing.assert_close((execution.bsr_product(weight, (16, 16)) @ x.t()).t(), wanted)
    (row,) = lpvit.crossover(64, 96, 32, densities=(0.5,), rounds=3)
    assert row["pays"] == (min(row["bsr"], row["gather"]) < row["dense"])


def test_one_image_is_enough_and_leaves_everything_else_alone():
    images, state = pictures(1), torch.get_rng_state()
    for pattern in ("blocks", "aligned"):
        model = create("efficientformer_nano")
        state = torch.get_rng_state()
        means = {n: b.clone() for n, b in model.named_buffers() if n.startswith("patch_embed1") and "mean" in n}
        pruned = lpvit.compress(model, images, pattern=pattern, epochs=1)
        assert pruned(images).isfinite().all() and not pruned.training
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(b, pruned.get_buffer(n)) for n, b in means.items())


class Overflowing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 32 * 32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.flatten(1)) * 1e25


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), {"pattern": "blocks"}, "nothing to prune"),
        (Overflowing(), {"pattern": "blocks"}, "gradients on the calibration images are not finite"),
        (Overflowing(), {}, "no channels that can go as a whole: use pattern='blocks'"),
        (
            "vit_nano",
            {"macs": 0.02, "pattern": "blocks", "as_published": False},
            r"0\.02 is out of reach.*0\.05.*0\.0\d+ is left",
        ),
        ("vit_nano", {"macs": 0.01, "pattern": "blocks"}, r"0\.01 is out of reach.*is left"),
        ("vit_nano", {"macs": 0.02}, r"0\.02 of the flops is out of reach.*the least is 0\.\d+"),
        ("vit_nano", {"macs": 1.5}, "above 0 and at most 1"),
        ("vit_nano", {"pattern": "rows"}, "'blocks' or 'aligned'"),
        ("vit_nano", {"cost": "money"}, "flops, latency, energy"),
        ("vit_nano", {"cost": "latency", "pattern": "blocks"}, "for cost='latency' use 'aligned'"),
        ("vit_nano", {"as_published": True}, "leave as_published out"),
        ("vit_nano", {"block": (0, 16)}, "rows and columns"),
    ],
)
def test_what_cannot_be_is_refused(model, options, says):
    model = create(model) if isinstance(model, str) else model
    with pytest.raises(CompressionError, match=says):
        lpvit.compress(model, pictures(2), epochs=0, **options)


def test_a_table_is_asked_of_a_pruned_model_only():
    with pytest.raises(CompressionError, match="no record of pruning"):
        lpvit.table(create())
    with pytest.raises(CompressionError, match=r"no layer 'blocks\.9\.mlp\.fc1'"):
        lpvit.rebuild(create(), sizes={"blocks.9.mlp.fc1": {"out": 8}})

"""Latency-driven slimming: soft choices learn, and the walk takes the cheapest action down to the target."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import vitalloy
from vitalloy.benchmark import measure
from vitalloy.errors import VitalloyError
from vitalloy.search.slimming import Choice, Stage, actions, arch, importance, joint_score, latency, latency_table, slim

DESIGN = (Stage(48, ("pool",) * 3), Stage(64, ("pool", "pool", "attention", "attention")))
SCORES = [torch.tensor([3.0, 0.5, 2.0]), torch.tensor([4.0, 5.0, 1.0, 6.0])]
TABLE = {
    (stage, kind, width): width / 32 * (2 if kind == "attention" else 1)
    for stage in (0, 1)
    for kind in ("pool", "attention")
    for width in (16, 32, 48, 64)
}


def capacity(design: tuple[Stage, ...]) -> float:
    """Stands for an accuracy: the first stage matters most."""
    return sum(w * s.width * (len(s.blocks) - s.blocks.count("identity")) for w, s in zip((9, 1), design, strict=True))


def test_the_three_actions():
    without, turned, narrowed = actions(DESIGN, SCORES)
    assert without[0].blocks == ("pool", "identity", "pool") and without[1] == DESIGN[1]
    assert turned[1].blocks == ("pool", "pool", "pool", "attention")
    assert narrowed[0].width == 32 and narrowed[1].width == 64  # stage 0 is the less important one


def test_the_walk_reaches_the_target_and_spares_what_matters():
    assert latency(DESIGN, TABLE) == 4.5 + 4 + 8
    way = list(slim(DESIGN, SCORES, TABLE, 9.0, capacity))
    times = [latency(design, TABLE) for design in (DESIGN, *way)]
    assert times == sorted(times, reverse=True) and times[-1] <= 9.0 < times[-2]
    assert way[0][1].blocks == ("pool", "pool", "pool", "attention")  # costs no capacity at all
    assert way[-1][0].blocks.count("pool") >= 2


def test_a_target_out_of_reach_is_an_error():
    with pytest.raises(VitalloyError, match="nothing is left"):
        list(slim(DESIGN, SCORES, TABLE, -1.0, capacity))


def test_a_design_becomes_a_model():
    design = (Stage(16, ("pool", "identity")), Stage(16, ("pool",)), Stage(32, ("pool",)), DESIGN[1])
    model = vitalloy.create_model("efficientformer_l1", num_classes=5, **arch(design))
    assert [len(model.get_submodule(f"block{i}")) for i in (1, 2, 3, 4)] == [1, 1, 1, 4]
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 5)
    with pytest.raises(VitalloyError, match="end of the last"):
        arch((DESIGN[1], DESIGN[0]))


def test_the_table_is_measured_for_every_stage_kind_and_width():
    table = latency_table(
        [(14, 14), (7, 7)], [(16, 64), (32,)], lambda call: measure(call, warmup=1, repeats=5).median_ms
    )
    assert set(table) == {(0, k, w) for k in ("pool", "attention") for w in (16, 64)} | {
        (1, k, 32) for k in ("pool", "attention")
    }
    assert all(value > 0 for value in table.values())


def test_a_useless_block_loses_importance():
    """One choice returns noise that the target does not have; identity is right."""
    torch.manual_seed(0)
    choice = Choice([nn.Sequential(nn.Conv2d(3, 3, 1), nn.Dropout(0.5))], tau=0.5).train()
    choice.choices[0].requires_grad_(False)
    before = importance(choice.alpha.detach()[None]).item()
    optimizer = torch.optim.SGD([choice.alpha], 0.5)
    for _ in range(30):
        x = torch.randn(4, 3, 5, 5)
        loss = (choice(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert importance(choice.alpha.detach()[None]).item() < 0.5 * before


def test_joint_score_prefers_the_smaller_of_equals():
    units = {"size": 1e6, "latency": 1.0}
    small, large = (joint_score(75.0, {"size": s, "latency": 2.0}, units) for s in (2e6, 8e6))
    assert small == pytest.approx(2 * large)
    assert joint_score(75.0, {"size": 8e6}, units, {"size": 0.0}) == 75.0

"""What the goldens do not show of MobileViG: sizes, properties of its graph, files, the plain reading of the paper."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

import vitalloy
from vitalloy.backbones.mobilevig import MaxRelative
from vitalloy.layers.sockets import replace

SMALL = {"embed_dims": (8, 12, 16, 24), "depths": (1, 1, 2, 2), "head_dim": 20, "num_classes": 5}
REFERENCE = Path(__file__).parents[2] / "benchmarks" / "reference" / "mobilevig.py"


def maps(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("size", "millions"), [("ti", 5.271), ("s", 7.277), ("m", 14.076), ("b", 26.869)])
def test_published_parameter_counts(size, millions):
    with torch.device("meta"):
        model = vitalloy.create_model(f"mobilevig_{size}")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == millions


@pytest.mark.parametrize("side", [(7, 7), (10, 8), (1, 5), (2, 2), (25, 13)])
@pytest.mark.parametrize("hop", [1, 2, 3])
def test_the_graph_is_the_largest_of_the_differences(side, hop):
    x = maps(2, 3, *side)
    wanted = torch.zeros_like(x)
    for axis in (2, 3):
        for i in range(hop, x.shape[axis], hop):
            wanted = torch.maximum(wanted, x - x.roll(i, axis))
    assert torch.equal(MaxRelative(hop)(x), wanted)


def test_the_graph_moves_with_the_map_and_ignores_constants():
    graph, x = MaxRelative(2), maps(1, 4, 7, 9)
    r = graph(x)
    assert (r >= 0).all() and r.any()
    assert torch.equal(graph(x.roll((3, 5), (2, 3))), r.roll((3, 5), (2, 3)))
    torch.testing.assert_close(graph(x + 10), r)
    assert not graph(x[..., :2, :2]).any()  # no neighbour is that near


def test_a_pixel_reaches_its_row_and_column_at_multiples_of_the_hop():
    x = maps(1, 1, 7, 9)
    assert MaxRelative(2)(x)[0, 0, 2, 3] > 0
    lower = x.clone()
    lower[0, 0, 2, 3] = -100.0  # below all pixels that see it, and it rises above none itself
    changed = (MaxRelative(2)(x) != MaxRelative(2)(lower)).nonzero()[:, 2:].tolist()
    column = {((2 + i) % 7, 3) for i in range(2, 7, 2)}
    row = {(2, (3 + i) % 9) for i in range(2, 9, 2)}
    assert {tuple(p) for p in changed} == column | row | {(2, 3)}


def test_the_plain_reading_s_weights_give_the_plain_reading_s_answers():
    """The authors' names in their wrapper: flat lists of blocks and 1x1 convolutions as classifiers."""
    module = runpy.run_path(str(REFERENCE))
    theirs = module["MobileViG"](SMALL["embed_dims"][:3], SMALL["depths"][:3], 24, 2, 20)
    torch.manual_seed(0)
    for name, value in theirs.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif value.is_floating_point():
            value.normal_(std=value[0].numel() ** -0.5 if value.ndim > 1 else 0.5)
    ours = vitalloy.create_model("mobilevig_ti", **{**SMALL, "num_classes": 1000}).eval()
    noise = {name: torch.zeros_like(value) for name, value in theirs.state_dict().items()}
    file = {"epoch": 1, "state_dict": noise, "state_dict_ema": theirs.state_dict()}
    assert vitalloy.load_checkpoint(ours, file, averaged=True) == vitalloy.checkpoints.Loaded()
    assert ours.head.weight.ndim == 2
    x = torch.randn(2, 3, 160, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs.eval()(x), atol=1e-4, rtol=1e-4)


def test_features_are_those_behind_the_last_block_of_each_stage():
    model = vitalloy.create_model("mobilevig_ti", **SMALL).eval()
    dense = vitalloy.create_model("mobilevig_ti", **SMALL, features_only=True).eval()
    loaded = vitalloy.load_checkpoint(dense, model.state_dict(), strict=False)
    assert not loaded.missing and {k.split(".")[0] for k in loaded.unexpected} == {"prediction", "head", "head_dist"}
    seen: list[torch.Tensor] = []
    for block in (model.block1[0], model.block2[0], model.block3[1], model.block4[1]):
        block.register_forward_hook(lambda _m, _i, out: seen.append(out))
    x = torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        model(x)
        levels = dense(x)
    assert [x.shape[-1] // m.shape[-1] for m in levels] == [4, 8, 16, 32]
    assert all(torch.equal(a, b) for a, b in zip(levels, seen, strict=True))


def test_graph_stages_and_the_graph_itself_can_be_changed():
    model = vitalloy.create_model("mobilevig_ti", **{**SMALL, "depths": (1, 1, 1, 2)}, graph_stages=2).eval()
    assert [type(b).__name__ for b in (model.block2[0], model.block3[0])] == ["ConvBlock", "GraphBlock"]
    x = torch.randn(1, 3, 224, 224)
    before = model(x)
    assert replace(model, MaxRelative, lambda *_: Nothing()) == 3
    assert not torch.allclose(model(x), before)


class Nothing(nn.Module):
    """The ablation: no pixel has a neighbour."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)

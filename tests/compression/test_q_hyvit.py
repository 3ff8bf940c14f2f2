"""Q-HyViT: bridges are found where the papers put them, choices leave less error, and overflow is mended."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import vitalloy
from vitalloy.compression.calibration import prepared
from vitalloy.compression.quantization import quantize
from vitalloy.compression.quantization.q_hyvit.bridges import find_bridges, trace
from vitalloy.compression.quantization.q_hyvit.choice import COMBINATIONS, overflows, zero_points
from vitalloy.compression.quantizers import Uniform
from vitalloy.errors import CompressionError

QUICK = {"rounds": 1, "steps": 12}
V2_MIXER = ("qk.linear", "v.linear", "talk.before", "talk.behind", "v_local.conv", "proj.linear")
V2_DOWN = ("q_local", "q.linear", "k.linear", "v.linear", "attend", "v_local.conv", "proj.linear")
BRIDGES = {
    "mobilevit_xxs": [
        bridge
        for i in (2, 3, 4)
        for bridge in ({f"stages.{i}.1.conv_1x1"}, {f"stages.{i}.1.conv_proj.conv", f"stages.{i}.1.conv_fusion.conv"})
    ],
    "mobilevitv2_050": [{f"stages.{i}.1.{name}"} for i in (2, 3, 4) for name in ("conv_1x1", "conv_proj.conv")],
    "efficientformer_nano": [{"block4.0.mlp.fc1.linear", "block4.0.mlp.fc2.linear", "block4.1.token_mixer.qkv"}],
    "efficientformerv2_nano": [
        {f"block3.2.token_mixer.{name}" for name in ("stride_conv.conv", *V2_MIXER)},
        {f"patch_embed4.attn.{name}" for name in V2_DOWN},
        {f"block4.1.token_mixer.{name}" for name in V2_MIXER},
    ],
    "vit_nano": [],  # no convolution but the patches
    "mobilevig_nano": [],  # no attention
}


def images_for(name: str, count: int = 8) -> torch.Tensor:
    size = 64 if name.startswith("mobilevit") else 32
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    size = {} if name.startswith("mobilevit") else {"img_size": 32}
    return vitalloy.create_model(name, num_classes=10, **size).eval()


def error_of(model: nn.Module, quantized: nn.Module, images: torch.Tensor) -> float:
    with torch.no_grad():
        want = model(images)
        return float((quantized(images) - want).norm() / (want - want.mean(0)).norm())


@pytest.mark.parametrize("name", BRIDGES)
def test_bridges_are_those_of_the_papers(name):
    flow = trace(prepared(made(name)), images_for(name, 2))
    assert [set(block.layers) for block in find_bridges(flow)] == BRIDGES[name]


@pytest.mark.parametrize("name", ["efficientformer_nano", "cvt_nano", "nextvit_nano", "uniformer_nano", "swin_nano"])
def test_choice_beats_plain_grids_on_any_backbone(name):
    model, images = made(name), images_for(name, 16)
    told = []
    rounds = int(name in ("efficientformer_nano", "uniformer_nano"))  # the others choose among grids from min to max
    bits = {"weights": 6, "activations": 6}
    chosen = quantize(
        model, images, "q_hyvit", **bits, rounds=rounds, steps=12, progress=lambda *done: told.append(done)
    )
    plain = quantize(model, images, "q_hyvit", **bits, choose=False)
    fresh = torch.randn(64, *images.shape[1:], generator=torch.Generator().manual_seed(2))
    assert error_of(model, chosen, fresh) < error_of(model, plain, fresh)
    assert told[-1][0] == told[-1][1] == len(told)
    rows = chosen.choices
    assert {row["layer"] for row in rows} == {row["layer"] for row in plain.choices}
    assert all(row["error"] == min(row["errors"].values()) for row in rows)
    assert {len(row["errors"]) for row in rows} == {len(COMBINATIONS), 2}  # attention has no weights
    for row in rows:
        layer = chosen.get_submodule(row["layer"])
        assert layer.weight_bits == 6
        if row["granularity"]:
            assert layer.input_quantizer.signed == (row["activation_scheme"] == "symmetric")
            assert (layer.weight_quantizer.scale.numel() == 1) == (row["granularity"] == "layer")


def test_bridge_layers_share_one_combination_and_the_error_of_their_block():
    name = "efficientformerv2_nano"
    rows = quantize(made(name), images_for(name), "q_hyvit", rounds=0).choices
    blocks = {row["bridge"] for row in rows if row["bridge"] is not None}
    assert blocks == {0, 1, 2}
    for block in blocks:
        inside = [row for row in rows if row["bridge"] == block]
        assert {row["layer"] for row in inside} == BRIDGES[name][block]
        assert len({row["error"] for row in inside}) == len({row["activation_scheme"] for row in inside}) == 1


def test_zero_points_that_fit_are_left_alone_and_others_mended():
    assert not overflows(torch.tensor(-1.0), torch.tensor(2.0), 8)
    assert overflows(torch.tensor(2.0), torch.tensor(7.0), 8) and overflows(torch.tensor(-7.0), torch.tensor(-2.0), 8)
    x = torch.linspace(2, 7, 500)
    values = {name: grid.quantizer()(x) for name, grid in zero_points(x.min(), x.max(), 8).items()}
    assert values["saturated"].max() < 5.01
    assert (values["unbounded"] - x).abs().max() < 0.5 * 5 / 255 + 1e-4
    assert (values["stretched"] - x).abs().max() < 0.5 * 7 / 255 + 1e-4


class Lifted(nn.Module):
    """A sigmoid that ends above zero: the layer behind it sees a range on one side."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sigmoid() * 4 + 3


@pytest.mark.parametrize("zero_point", ["choose", "unbounded"])
def test_overflow_inside_a_model(zero_point):
    model, images = made("efficientformer_nano"), images_for("efficientformer_nano", 16)
    model.block2[0].mlp.fc1.act = Lifted()
    plain = quantize(model, images, "q_hyvit", weights=8, activations=5, choose=False)
    chosen = quantize(model, images, "q_hyvit", weights=8, activations=5, zero_point=zero_point, **QUICK)
    row = next(row for row in chosen.choices if row["overflow"])
    old = next(row for row in plain.choices if row["overflow"])
    assert old["layer"] == row["layer"] == "block2.0.mlp.fc2.linear"
    assert old["remedy"] == "saturated" and row["remedy"] != "saturated"
    assert error_of(model, chosen, images) < error_of(model, plain, images)
    codes = [q for q in chosen.modules() if isinstance(q, Uniform) and not q.signed]
    fits = all(((q.zero_point >= q.low) & (q.zero_point <= q.high)).all() for q in codes)
    assert fits == (zero_point == "choose")


def test_fully_quantizes_softmax_maps_and_norms():
    model, images = made("efficientformer_nano"), images_for("efficientformer_nano")
    full = quantize(model, images, "q_hyvit", fully=True, **QUICK)
    attend = full.block4[1].token_mixer.attend
    assert attend.activation_bits == 8 and isinstance(attend.map_quantizer, Uniform)
    norms = [m for m in full.modules() if isinstance(m, nn.LayerNorm)]
    assert norms and all(isinstance(m.output_quantizer, Uniform) for m in norms)
    seen = []
    norms[0].register_forward_hook(lambda m, args, out: seen.append(out))
    assert error_of(model, full, images) < 0.2
    assert len(seen[0].unique()) <= 256


def test_sequential_sees_what_was_quantized_before():
    model, images = made("efficientformer_nano"), images_for("efficientformer_nano", 16)
    options = {"weights": 4, "activations": 4, "symmetric_weights": True, **QUICK}
    parallel, sequential = (quantize(model, images, "q_hyvit", sequential=s, **options) for s in (False, True))
    assert {row["weight_scheme"] for row in sequential.choices} == {"symmetric", ""}
    first, last = sequential.choices[0]["layer"], sequential.choices[-1]["layer"]
    same = [
        torch.equal(*(m.get_submodule(n).input_quantizer.scale for m in (parallel, sequential))) for n in (first, last)
    ]
    assert same == [True, False]
    assert error_of(model, sequential, images) < 1


@pytest.mark.parametrize("options", [{"weights": 1}, {"activations": 17}, {"zero_point": "clip"}])
def test_options_out_of_range(options):
    with pytest.raises(CompressionError, match=r"2 to 16|use choose"):
        quantize(made("vit_nano"), images_for("vit_nano"), "q_hyvit", **options)

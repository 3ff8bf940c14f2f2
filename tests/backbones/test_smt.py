"""What the goldens do not show of SMT: sizes as published, the two depths of SMT-S, dense files, what fusing does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import vitalloy
from vitalloy.backbones.smt import ConvValueAttention, FusedModulator, Modulator, ScaleAwareModulation
from vitalloy.errors import CheckpointError
from vitalloy.layers import streaming
from vitalloy.layers.sockets import find


@pytest.mark.parametrize(
    ("name", "kwargs", "count"),
    [
        ("smt_tiny", {}, 11_506_536),
        ("smt_small", {}, 22_550_952),
        ("smt_base", {}, 32_037_352),
        ("smt_large", {}, 80_620_264),
        ("smt_large", {"layer_scale": 0.0}, 80_589_544),
    ],
)
def test_parameter_counts(name, kwargs, count):
    with torch.device("meta"):
        model = vitalloy.create_model(name, **kwargs)
    assert sum(p.numel() for p in model.parameters()) == count


def test_the_other_depth_of_small_is_the_published_size():
    with torch.device("meta"):
        model = vitalloy.create_model("smt_small", depths=(3, 4, 18, 1))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 20.43


def test_mixers_of_the_third_stage_take_turns():
    model = vitalloy.create_model("smt_nano", depths=(1, 2, 5, 2))
    kinds = [[type(block.attn) for block in model.get_submodule(f"block{i}")] for i in range(1, 5)]
    sam, attention = ScaleAwareModulation, ConvValueAttention
    assert kinds == [[sam], [sam] * 2, [sam, attention, sam, attention, sam], [attention] * 2]


@pytest.mark.parametrize("strict", [True, False])
def test_weights_of_another_depth_are_refused_with_the_depth_that_fits(strict):
    state = vitalloy.create_model("smt_nano", depths=(1, 1, 3, 1)).state_dict()
    with pytest.raises(CheckpointError, match=r"build it with depths=\(1, 1, 3, 1\)"):
        vitalloy.load_checkpoint(vitalloy.create_model("smt_nano"), {"model": state}, strict=strict)


def test_detector_files_load_whole():
    """Under the dense code's own name for the attention's convolution, which the published loader leaves out."""
    classifier = vitalloy.create_model("smt_nano").eval()
    for module in find(classifier, nn.Conv2d).values():
        nn.init.normal_(module.bias) if module.bias is not None else None
    state = {
        "backbone." + key.replace("attn.local_conv.", "attn.dw_conv."): value
        for key, value in classifier.state_dict().items()
        if not key.startswith("head")
    }
    assert any(".dw_conv." in key for key in state)
    dense = vitalloy.create_model("smt_nano", features_only=True).eval()
    assert vitalloy.load_checkpoint(dense, {"state_dict": state}) == vitalloy.checkpoints.Loaded()
    x = torch.randn(1, 3, 40, 56)
    for ours, theirs in zip(dense(x), classifier.forward_intermediates(x, intermediates_only=True), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_fusing_leaves_no_batch_norm_and_one_convolution_a_modulator():
    model = vitalloy.create_model("smt_nano", layer_scale=0.1)
    assert find(model, Modulator) and find(model, nn.BatchNorm2d)
    model.fuse()
    assert not find(model, Modulator) and not find(model, nn.BatchNorm2d)
    fused = find(model, FusedModulator).values()
    assert fused and all(m.conv.kernel_size == (9, 9) and m.conv.groups == m.conv.in_channels for m in fused)
    assert all(block.gamma_1 is None and block.gamma_2 is None for block in model.block1)


def test_the_start_is_the_authors():
    model = vitalloy.create_model("smt_tiny", depths=(1, 1, 1, 1))
    modulator = model.block3[0].attn.modulator
    for weight, fan_out in ((modulator.mix.weight, 8), (modulator.proj.weight, 256), (modulator.convs[3].weight, 81)):
        assert weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
    assert model.block3[0].attn.proj.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_perceptrons_answer_the_same_in_pieces(monkeypatch):
    torch.manual_seed(0)
    model = vitalloy.create_model("smt_nano", num_classes=5).double().eval()
    fused, x = copy.deepcopy(model).fuse(), torch.randn(3, 3, 40, 56).double()
    with torch.no_grad():
        wanted = model(x)
        monkeypatch.setattr(streaming, "WORTHWHILE", 100)
        for other in (model, fused):
            torch.testing.assert_close(other(x), wanted, rtol=1e-9, atol=1e-9)

"""What the goldens do not show of Next-ViT: sizes, files of others, both poolings, the dense form, folding."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn

import vitalloy
from vitalloy.backbones.next_vit import ConvBlock, ReducedAttention, TransformerBlock
from vitalloy.layers.hybrid_pyramid import divisible32, mixes, split_width
from vitalloy.layers.tokens import to_tokens


def awake(model: nn.Module) -> nn.Module:
    """In evaluation mode, with running statistics of real passes and norms that are not the identity."""
    torch.manual_seed(0)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            norm.momentum = 0.5
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.3, 0.3)
    model.train()(torch.randn(4, 3, 64, 64))
    return model.eval()


@pytest.mark.parametrize(("size", "count"), [("small", 31_763_368), ("base", 44_819_000), ("large", 57_874_000)])
def test_published_sizes(size, count):
    with torch.device("meta"):
        model = vitalloy.create_model(f"nextvit_{size}_384")
    assert abs(sum(p.numel() for p in model.parameters()) - count) < 600
    assert [row["num_chs"] for row in model.feature_info] == [96, 256, 512, 1024]
    assert model.default_cfg["input_size"] == (3, 384, 384)


def test_mixing_blocks_are_where_the_paper_has_them():
    with torch.device("meta"):
        model = vitalloy.create_model("nextvit_small")
    found = [i for i, block in enumerate(model.features) if isinstance(block, TransformerBlock)]
    assert found == [6, 11, 16, 19] and [end - 1 for end in model.stage_ends] == [2, 6, 16, 19]
    assert [model.features[i].attn.run_length for i in found] == [16, 4, 4, 1]
    assert [mixes(2, i, 7) for i in range(7)] == [False] * 4 + [True, False, True]


def test_widths_are_multiples_of_32():
    assert [divisible32(v) for v in (1, 35, 47, 72, 111, 288, 2304)] == [32, 32, 64, 96, 128, 288, 2304]
    assert [split_width(w) for w in (128, 256, 512, 1024)] == [(96, 32), (192, 64), (384, 128), (768, 256)]
    with pytest.raises(vitalloy.errors.ModelError, match="96 channels leaves none"):
        vitalloy.create_model("nextvit_nano", mixing_dims=(96, 128, 160))


def test_files_of_timm_load():
    theirs = timm.create_model("nextvit_small", num_classes=5).eval()
    state = {k: torch.rand_like(v) + 0.5 if k.endswith("running_var") else v for k, v in theirs.state_dict().items()}
    theirs.load_state_dict(state)
    ours = vitalloy.create_model("nextvit_small", num_classes=5).eval()
    assert vitalloy.load_checkpoint(ours, state) == vitalloy.checkpoints.Loaded()
    x = torch.randn(1, 3, 90, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-3)


def published(model: nn.Module) -> dict[str, torch.Tensor]:
    """Our state dict under the authors' names and shapes."""
    names = {
        "mhca.local.conv.": "mhca.group_conv3x3.",
        "mhca.local.norm.": "mhca.norm.",
        "mlp.fc": "mlp.conv",
        "attn.": "e_mhsa.",
        "head.": "proj_head.0.",
        "extra_norm.": "extra_norm_list.",
    }
    state = {}
    for name, value in model.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if "mlp.conv" in name and value.ndim == 2:
            value = value[..., None, None]
        if ".kv." in name:
            state[name.replace(".kv.", ".k.")], state[name.replace(".kv.", ".v.")] = value.chunk(2)
        else:
            state[name] = value
    return state


def test_published_files_load_into_classifier_and_dense_form(tmp_path):
    donor = awake(vitalloy.create_model("nextvit_nano", num_classes=5))
    torch.save({"model": published(donor)}, tmp_path / "nextvit.pth")
    model = vitalloy.create_model("nextvit_nano", num_classes=5).eval()
    assert vitalloy.load_checkpoint(model, tmp_path / "nextvit.pth") == vitalloy.checkpoints.Loaded()
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(model(x), donor(x))

    donor = awake(vitalloy.create_model("nextvit_nano", extra_norm=True))
    state = {f"backbone.{k}": v for k, v in published(donor).items() if "proj_head" not in k}
    state["decode_head.conv.weight"] = torch.zeros(1)  # so that the prefix is not common to all
    dense = vitalloy.create_model("nextvit_nano", extra_norm=True, features_only=True).eval()
    loaded = vitalloy.load_checkpoint(dense, {"state_dict": state}, strict=False)
    assert not loaded.missing and loaded.unexpected == ("decode_head.conv.weight",)
    maps = dense(x)
    for map_, wanted in zip(maps, donor.forward_intermediates(x, intermediates_only=True), strict=True):
        torch.testing.assert_close(map_, wanted)
    torch.testing.assert_close(to_tokens(maps[-1]), donor.forward_features(x))


def test_extra_norms_are_fed_onward():
    model = awake(vitalloy.create_model("nextvit_nano", extra_norm=True))
    x = torch.randn(1, 3, 32, 32)
    before = model.forward_intermediates(x, intermediates_only=True)
    with torch.no_grad():
        model.extra_norm[0].bias += 1
    after = model.forward_intermediates(x, intermediates_only=True)
    torch.testing.assert_close(after[0], before[0] + 1)
    assert not torch.allclose(after[1], before[1], atol=1e-3)


def test_flat_pooling_averages_runs_and_drops_the_tail():
    layer = ReducedAttention(32, reduction=2)
    x = torch.arange(22.0).view(1, 11, 2).expand(2, -1, -1)
    assert torch.equal(layer.pool(x, (1, 11))[0], torch.tensor([[3.0, 4.0], [11.0, 12.0]]))
    assert torch.equal(layer.pool(x[:, :3], (1, 3))[0], torch.tensor([[2.0, 3.0]]))  # fewer than a run
    assert ReducedAttention(32, reduction=1).pool(x, (1, 11)) is x


def test_square_pooling_averages_squares_and_keeps_the_border():
    layer = ReducedAttention(32, reduction=2, pooling="square")
    x = torch.arange(15.0).view(1, 15, 1)  # 3 rows of 5
    got = layer.pool(x, (3, 5)).flatten()
    assert torch.equal(got, torch.tensor([3.0, 5.0, 6.5, 10.5, 12.5, 14.0]))
    with pytest.raises(vitalloy.errors.ModelError, match="pooling='round'"):
        vitalloy.create_model("nextvit_nano", pooling="round")


@pytest.mark.parametrize("pooling", ["flat", "square"])
def test_fusing_leaves_no_norm_but_the_last(pooling):
    model = awake(vitalloy.create_model("nextvit_nano", num_classes=5, pooling=pooling)).double()
    kept = copy.deepcopy(model)
    model.fuse()
    left = [name for name, part in model.named_modules() if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert left == ["norm"]
    for side in ((32, 32), (37, 61), (16, 90)):
        x = torch.randn(2, 3, *side).double()
        with torch.no_grad():
            torch.testing.assert_close(model(x), kept(x), atol=1e-9, rtol=1e-9)


def test_drop_rates_of_a_transformer_block():
    block = TransformerBlock(96, 128, drop_path=0.4)
    drops = [part.drop_prob for part in (block.drop_attn, block.drop_conv, block.drop_mlp)]
    assert drops == pytest.approx([0.3, 0.1, 0.4])
    model = vitalloy.create_model("nextvit_nano", drop_path_rate=0.2)
    rates = [m.drop_prob for b in model.features for m in b.children() if isinstance(m, DropPath)]
    assert rates[-1] == pytest.approx(0.2) and isinstance(model.features[0].drop_path, nn.Identity)


def test_widths_of_the_perceptrons():
    assert ConvBlock(96, 96).mlp.fc1.out_features == 288
    assert TransformerBlock(96, 128).mlp.fc1.out_features == 256
    model = vitalloy.create_model("nextvit_nano", mlp_ratios=(2, 4))
    assert model.features[0].mlp.fc1.out_features == 64 and model.features[-1].mlp.fc1.out_features == 640

"""What the goldens do not show of EfficientFormer V1: sizes, other ports' files, other grids, the two heads."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import vitalloy
from vitalloy.backbones.efficientformer import AttentionBlock, PoolMixing
from vitalloy.layers.offset_bias import OffsetBias, offset_index, resample_offsets
from vitalloy.layers.sockets import find

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))
import golden

RECORDS = Path(__file__).parents[1] / "parity" / "goldens" / "efficientformer"
SMALL = {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 2, 3), "num_attention": 2, "num_classes": 5}


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


@pytest.mark.parametrize(
    ("name", "two_heads", "one_head"),
    [
        ("efficientformer_l1", 12.290, 11.841),
        ("efficientformer_l3", 31.406, 30.893),
        ("efficientformer_l7", 82.229, 81.460),
    ],
)
def test_published_parameter_counts(name, two_heads, one_head):
    with torch.device("meta"):
        models = [vitalloy.create_model(name, distilled=distilled) for distilled in (True, False)]
    assert [round(sum(p.numel() for p in m.parameters()) / 1e6, 3) for m in models] == [two_heads, one_head]


def test_attention_stands_at_the_end_of_the_last_stage_alone():
    model = vitalloy.create_model("efficientformer_l1", **SMALL)
    assert list(find(model, AttentionBlock)) == ["block4.1", "block4.2"]
    assert len(find(model, PoolMixing)) == 5


def test_timm_s_files_load():
    args = {k: v for k, v in SMALL.items() if k != "num_attention"}
    theirs = randomise(timm.create_model("efficientformer_l1", num_vit=2, **args)).eval()
    ours = vitalloy.create_model("efficientformer_l1", **SMALL).eval()
    assert vitalloy.load_checkpoint(ours, theirs.state_dict()) == vitalloy.checkpoints.Loaded()
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("case", "grid", "stride"),
    [("attention", (5, 5), 1), ("l3_stage4", (7, 7), 1), ("v2_attention_downsample", (7, 7), 2)],
)
def test_offsets_are_numbered_as_in_the_authors_tables(case, grid, stride):
    record = golden.load(RECORDS / f"{case}.json")
    tables = [digest for name, digest in record["kept"].items() if name.endswith("attention_bias_idxs")]
    index = offset_index(grid, stride).unflatten(0, (-1, grid[0] * grid[1]))
    assert tables and all(golden.difference(index, digest) == 0 for digest in tables)


def test_another_grid_keeps_the_nearest_and_the_farthest_offset():
    table = torch.arange(49.0).expand(3, 49)
    wider = resample_offsets(table, (7, 7), (9, 13))
    assert wider.shape == (3, 9 * 13)
    assert torch.equal(wider[:, 0], table[:, 0]) and torch.equal(wider[:, -1], table[:, -1])
    assert torch.allclose(resample_offsets(wider, (9, 13), (7, 7)), table, atol=1e-4)  # it was linear
    bias = OffsetBias(3, (7, 7))
    nn.init.normal_(bias.table)
    square = bias(torch.empty(1, 1, 8, 8))
    assert square.shape == (3, 64, 64) and torch.equal(square, square.mT)


def test_the_forward_pass_resamples_as_loading_does():
    state = randomise(vitalloy.create_model("efficientformer_l1", **SMALL)).state_dict()
    published = vitalloy.create_model("efficientformer_l1", **SMALL).eval()
    larger = vitalloy.create_model("efficientformer_l1", **SMALL, img_size=(256, 320)).eval()
    for model in (published, larger):
        vitalloy.load_checkpoint(model, state)
    assert larger.block4[2].token_mixer.bias.table.shape == (8, 8 * 10)
    x = torch.randn(1, 3, 256, 320)
    with torch.no_grad():
        torch.testing.assert_close(published(x), larger(x))


def test_two_answers_in_training_and_one_head_when_fused():
    model = randomise(vitalloy.create_model("efficientformer_l1", **SMALL))
    x = torch.randn(2, 3, 64, 64)
    model.train().set_distilled_training()
    by_class, by_teacher = model(x)
    assert not torch.allclose(by_class, by_teacher)
    model.eval()
    wanted, features = model(x), model.forward_head(model.forward_features(x), pre_logits=True)
    assert torch.allclose(wanted, (model.head(features) + model.head_dist(features)) / 2)
    assert model.fuse().head_dist is None
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    torch.testing.assert_close(model(x), wanted, atol=1e-4, rtol=1e-4)


def test_tables_are_spared_weight_decay():
    model = vitalloy.create_model("efficientformer_l1", **SMALL)
    assert model.no_weight_decay() == {f"block4.{j}.token_mixer.bias.table" for j in (1, 2)}

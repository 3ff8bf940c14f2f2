"""What the goldens do not show of the image UniFormer: sizes, files of all kinds, windows, token labels."""

from __future__ import annotations

import re

import pytest
import torch

import vitalloy
from vitalloy.benchmark import count

TINY = {"depths": (1, 1, 2, 1), "embed_dims": (8, 16, 32, 64), "head_dim": 16, "num_classes": 5}


def published(state: dict[str, torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
    """Our state dict as the authors write it: their names, 1x1 kernels, scales of local blocks with four axes."""
    theirs = {}
    for key, value in state.items():
        name = key.replace(".pos_embed.conv.", ".pos_embed.").replace(".dwconv.", ".attn.")
        name = re.sub(r"^block(\d)", r"blocks\1", name)
        if re.match(r"blocks[12].*(conv\d|fc\d)\.weight", name):
            value = value[:, :, None, None]
        if re.match(r"blocks[12].*gamma", name):
            value = value[None, :, None, None]
        theirs[prefix + name] = value
    return theirs


@pytest.mark.parametrize(
    ("name", "params", "macs"),
    [
        ("uniformer_small", 21.545, 3.63),
        ("uniformer_small_plus", 24.033, 4.20),
        ("uniformer_base", 49.777, 8.25),
        ("uniformer_xxs_128", 10.215, 0.43),
        ("uniformer_xxs_224", 10.215, 1.3),
        ("uniformer_xs_192", 16.509, 1.4),
        ("uniformer_video_small", 21.400, 41.7),
    ],
)
def test_published_sizes(name, params, macs):
    classes = 400 if "video" in name else 1000
    with torch.device("meta"):
        work = count(vitalloy.create_model(name, num_classes=classes), vitalloy.registry.entry(name).cfg["input_size"])
    assert work.params / 1e6 == pytest.approx(params, abs=0.0005)
    assert work.macs / 1e9 == pytest.approx(macs, rel=0.05)


def test_large_model_has_the_published_size():
    with torch.device("meta"):
        model = vitalloy.create_model("uniformer_large_ls_tl_224", token_labels=False)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(100, abs=1)


def test_heads_of_the_file_that_cannot_say_how_many_it_has():
    with torch.device("meta"):
        narrow, wide = (vitalloy.create_model(f"uniformer_{n}") for n in ("small_plus", "small_plus_dim64"))
    assert narrow.block3[0].attn.num_heads == 10 and wide.block3[0].attn.num_heads == 5
    assert [p.shape for p in narrow.parameters()] == [p.shape for p in wide.parameters()]


@pytest.mark.parametrize("conv_stem", [False, True])
def test_the_authors_files_load(conv_stem):
    whole = vitalloy.create_model("uniformer_small", **TINY, conv_stem=conv_stem, layer_scale=0.1)
    file = published(whole.state_dict())
    assert {"blocks1.0.pos_embed.weight", "blocks2.0.attn.weight", "blocks3.1.attn.qkv.weight"} <= set(file)
    fresh = vitalloy.create_model("uniformer_small", **TINY, conv_stem=conv_stem, layer_scale=0.1)
    assert vitalloy.load_checkpoint(fresh, {"model": file}) == vitalloy.checkpoints.Loaded()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), fresh.parameters(), strict=True))


def test_detector_and_classifier_files_load_into_the_dense_form():
    dense = vitalloy.create_model("uniformer_small", **TINY, features_only=True).model
    state = published(dense.state_dict(), "backbone.")
    assert vitalloy.load_checkpoint(dense, {"state_dict": state}) == vitalloy.checkpoints.Loaded()
    whole = vitalloy.create_model("uniformer_small", **TINY)
    loaded = vitalloy.load_checkpoint(dense, published(whole.state_dict()), strict=False)
    assert {name.split(".")[0] for name in loaded.missing} == {"norm1", "norm2", "norm3", "norm4"}
    assert {name.split(".")[0] for name in loaded.unexpected} == {"norm", "head"}


def test_a_norm_of_a_stage_is_for_its_level_alone():
    dense = vitalloy.create_model("uniformer_small", **TINY, features_only=True).eval()
    x = torch.randn(1, 3, 64, 96)
    before = dense(x)
    with torch.no_grad():
        dense.model.norm2.weight.mul_(2)
    after = dense(x)
    torch.testing.assert_close(after[1], 2 * before[1])
    assert all(torch.equal(after[i], before[i]) for i in (0, 2, 3))


def test_one_window_is_the_whole_map_and_smaller_ones_are_not():
    torch.manual_seed(0)
    models = {
        (kind, window): vitalloy.create_model("uniformer_small", **TINY, attention=kind, window=window).eval()
        for kind, window in (("global", 14), ("windows", 4), ("windows", 2), ("hybrid", 2))
    }
    whole = models["global", 14]
    for model in models.values():
        model.load_state_dict(whole.state_dict())
        for block in model.block3:
            torch.nn.init.normal_(block.attn.qkv.weight, generator=torch.Generator().manual_seed(1))
    x = torch.randn(1, 3, 64, 64)  # 4x4 tokens in stage 3
    torch.testing.assert_close(models["windows", 4](x), whole(x))
    assert not torch.allclose(models["windows", 2](x), whole(x), atol=1e-4)
    assert torch.equal(models["windows", 2](x), models["hybrid", 2](x))  # two blocks: the fourth would be global
    with pytest.raises(vitalloy.errors.ModelError, match="hybrid"):
        vitalloy.create_model("uniformer_small", **TINY, attention="local")


def test_token_labels_add_half_of_the_best_position():
    model = vitalloy.create_model("uniformer_small", **TINY, token_labels=True).eval()
    x = torch.randn(2, 3, 64, 96)
    tokens = model.forward_features(x)
    positions = tokens @ model.aux_head.weight.T + model.aux_head.bias
    torch.testing.assert_close(model(x), model.head(tokens.mean(1)) + 0.5 * positions.amax(1))
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), tokens.mean(1))


def test_patches_that_fill_no_cell_are_left_out():
    model = vitalloy.create_model("uniformer_small", **TINY).eval()
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model(torch.nn.functional.pad(x, (0, 3, 0, 2), value=9.0)), model(x))

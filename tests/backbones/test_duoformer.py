"""What the goldens and the contract do not show of DuoFormer."""

from __future__ import annotations

import pytest
import torch

import vitalloy
from vitalloy.backbones.duoformer import region_tokens

# isort: split
import torchvision

SMALL = {"num_classes": 5, "img_size": 64}


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("duoformer_r50_s4_channel", 185.99),
        ("duoformer_r50_s2_channel", 185.34),
        ("duoformer_r50_s4_random", 139.97),
        ("duoformer_r50_s2_random", 139.32),
        ("duoformer_r50_s4_channel_d6", 129.29),
        ("duoformer_r18_s4_random", 125.43),
    ],
)
def test_parameters(name, millions):
    with torch.device("meta"):
        model = vitalloy.create_model(name, num_classes=2, head_norm=True)  # the published count has that norm
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


def theirs_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A model's state under the authors' names, with the norm that they store and do not use."""
    names = {
        "stem.0.conv.": "resnet_projector.0.",
        "stem.0.norm.": "resnet_projector.1.",
        "downsample.conv.": "downsample.0.",
        "downsample.norm.": "downsample.1.",
        "channel_token.reduce.0.0.": "chann_proj1.conv1.",
        "channel_token.reduce.0.1.": "chann_proj1.conv2.",
        "channel_token.reduce.1.0.": "chann_proj2.conv1.",
        "channel_token.mix.": "chann_proj_all.nConvs.",
        "transformer.scale_pos": "vision_transformer.pos_embed_for_scale",
        "transformer.scale_blocks.": "vision_transformer.scaleBlocks.",
        "transformer.": "vision_transformer.",
        "head.": "vision_transformer.head.",
    }
    for i in range(4):
        names |= {f"stages.{i}.": f"resnet_projector.{i + 4}.", f"project.{i}.": f"projection.proj_heads{3 - i}."}
        names |= {f".conv{i}.conv.": f".conv{i}.", f".conv{i}.norm.": f".bn{i}."}
    state = {}
    for key, value in model.state_dict().items():
        for ours, theirs in names.items():
            if not key.startswith("vision_transformer"):
                key = key.replace(ours, theirs)
        key = key.replace("transformer.patch_blocks.", "transformer.blocks.")
        if ".blocks." in key:
            key = key.replace(".qkv.", ".attn.qkv.").replace(".proj.", ".attn.proj.")
        state["channel_token" if key == "scale_token" else key] = value
    dim = model.num_features
    return {**state, "vision_transformer.fc_norm.weight": torch.full((dim,), 2.0)} | {
        "vision_transformer.fc_norm.bias": torch.zeros(dim)
    }


@pytest.mark.parametrize("kwargs", [{}, {"scale_token": "channel", "num_scales": 2}])
def test_the_authors_state_dict_loads_under_their_names(kwargs):
    written = vitalloy.create_model("duoformer_nano", **SMALL, **kwargs).eval()
    state = theirs_of(written)
    assert not set(state) & set(written.state_dict())
    read = vitalloy.create_model("duoformer_nano", **SMALL, **kwargs).eval()
    assert vitalloy.load_checkpoint(read, {"epoch": 3, "model": state}) == vitalloy.checkpoints.Loaded()
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(read(x), written(x))
    normed = vitalloy.create_model("duoformer_nano", **SMALL, **kwargs, head_norm=True).eval()
    vitalloy.load_checkpoint(normed, state)
    tokens = torch.nn.functional.layer_norm(written.forward_features(x), (96,), eps=1e-6)
    torch.testing.assert_close(normed(x), written.head(2 * tokens[:, 0]))


def test_a_pickled_module_is_refused(tmp_path):
    model = vitalloy.create_model("duoformer_nano")
    torch.save({"epoch": 1, "model": model}, tmp_path / "whole.pt")
    with pytest.raises(vitalloy.VitalloyError, match="state_dict"):
        vitalloy.load_checkpoint(model, tmp_path / "whole.pt")


def test_resnet_files_load_into_the_trunk():
    resnet = torchvision.models.resnet18(weights=None).eval()
    for module in resnet.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    model = vitalloy.create_model("duoformer_r18_s4_random", embed_dim=48, num_heads=2, depth=1, img_size=64).eval()
    loaded = vitalloy.load_checkpoint(model, resnet.state_dict(), strict=False)
    assert not loaded.unexpected and not [k for k in loaded.missing if k.startswith(("stem", "stages"))]
    x = torch.randn(1, 3, 64, 64)
    maps = model.forward_intermediates(x, intermediates_only=True)
    theirs = resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(x))))
    for ours, stage in zip(maps[:3], (resnet.layer1, resnet.layer2, resnet.layer3), strict=True):
        theirs = stage(theirs)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_regions_hold_their_own_cells_in_the_authors_order():
    cells = torch.arange(4 * 6.0).view(1, 1, 4, 6)
    assert region_tokens(cells, 2)[0, 1, :, 0].tolist() == [2, 3, 8, 9]
    assert region_tokens(cells, 2, by_columns=True)[0, 1, :, 0].tolist() == [2, 8, 3, 9]
    assert region_tokens(cells, 2).shape == (1, 6, 4, 1)


def test_scale_attention_stays_within_its_region():
    block = vitalloy.create_model("duoformer_nano").eval().transformer.scale_blocks[0]
    x = torch.randn(1, 4, 86, 96)
    changed = x.clone()
    changed[:, 2] = x[:, 2, torch.randperm(86)]
    same = (block(x) == block(changed)).all(-1).all(-1)[0]
    assert same.tolist() == [True, True, False, True]
    torch.testing.assert_close(block(x, 1), block(x)[:, :, :1])  # what the last block saves changes nothing


def test_padding_and_position_tables_for_other_sizes():
    model = vitalloy.create_model("duoformer_nano", **SMALL).eval()
    assert model.transformer.pos_embed.shape == (1, 1 + 16, 96)
    wide = vitalloy.create_model("duoformer_nano", num_classes=5, img_size=(60, 90)).eval()
    vitalloy.load_checkpoint(wide, model.state_dict())
    assert wide.transformer.pos_embed.shape == (1, 1 + 4 * 6, 96)
    torch.testing.assert_close(wide.transformer.pos_embed[:, 0], model.transformer.pos_embed[:, 0])
    seen = []
    wide.transformer.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    x = torch.randn(1, 3, 60, 90)  # the finest map has 30x45 cells, regions for 32x48
    torch.testing.assert_close(wide(x), model(x))  # one table resized at loading, the other in the forward pass
    assert seen[0].shape == (1, 24, 86, 96)
    finest = seen[0][0, -1, -64:].view(8, 8, 96)
    assert finest[:6, :5].abs().sum(-1).all() and not finest[6:].any() and not finest[:, 5:].any()


def test_patch_blocks_keep_the_size_of_the_signal():
    torch.manual_seed(0)
    x = torch.randn(2, 17, 192)
    args = {"embed_dim": 192, "num_heads": 3, "depth": 6}
    sizes = {}
    for std in (None, 0.02):
        sizes[std] = x
        for block in vitalloy.create_model("duoformer_nano", **args, patch_std=std).transformer.patch_blocks:
            sizes[std] = block(sizes[std])
    assert sizes[None].std() > 0.02 and sizes[0.02].std() < 1e-5


@pytest.mark.parametrize(
    ("wrong", "named"),
    [({"trunk": "vgg"}, "resnet18"), ({"scale_token": "mean"}, "channel"), ({"num_scales": 5}, "1 to 4")],
)
def test_impossible_arguments_are_refused(wrong, named):
    with pytest.raises(vitalloy.VitalloyError, match=named):
        vitalloy.create_model("duoformer_nano", **wrong)

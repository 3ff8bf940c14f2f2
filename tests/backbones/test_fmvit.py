"""FMViT, a reconstruction: its switches, that every branch merges away, and what the merged model is."""

from __future__ import annotations

import copy
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

import vitalloy
from vitalloy.backbones.fmvit import ConvFusionBlock, FrequencyMixingBlock
from vitalloy.layers.conv_norm import ConvNorm
from vitalloy.layers.fusion import fuse
from vitalloy.layers.reparam import MultiGroupLinear, RepDepthwise, deployed_state

REFERENCE = Path(__file__).parents[2] / "benchmarks" / "reference" / "fmvit.py"
SHALLOW = {"depths": (1, 1, 2, 1), "num_classes": 5}


def trained(**kwargs) -> nn.Module:
    """A small model after a few steps on a few images, so that weights and statistics are not the initial ones."""
    torch.manual_seed(0)
    model = vitalloy.create_model("fmvit_nano", **{**SHALLOW, **kwargs}).train()
    x, labels = torch.randn(5, 3, 32, 32), torch.arange(5)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(2):
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("name", ["tiny", "large"])
def test_layout(name):
    with torch.device("meta"):
        model = vitalloy.create_model(f"fmvit_{name}")
    mixing = [i for i, block in enumerate(model.features) if isinstance(block, FrequencyMixingBlock)]
    starts = [0, *model.stage_ends]
    fives = range(starts[2] + 4, starts[3], 5)
    assert mixing == [starts[2] - 1, *fives, starts[4] - 1]
    assert all(isinstance(b, ConvFusionBlock) for i, b in enumerate(model.features) if i not in mixing)
    assert model.features[mixing[0]].attn.pool.kernel_size == 4


def test_no_accuracy_is_claimed():
    assert all(vitalloy.registry.entry(n).variant.top1 is None for n in vitalloy.list_models("fmvit_*"))


FORMS = [
    {},
    {"mix": "both", "shared_kv": True},
    {"mixer": "grouped", "identity": False},
    {"groups": (1,)},
    {"groups": (2, 4)},
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_branch_and_norm_merges_away(form):
    model = trained(**form)
    kept, fused = copy.deepcopy(model).double(), copy.deepcopy(model).fuse()
    left = [name for name, part in fused.named_modules() if isinstance(part, nn.BatchNorm2d)]
    assert left == ["norm"]
    assert not any(part.branches for part in fused.modules() if isinstance(part, MultiGroupLinear | RepDepthwise))
    x = torch.randn(2, 3, 37, 50)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(fused.double()(x.double()), kept(x.double()), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(copy.deepcopy(kept).fuse()(x.double()), kept(x.double()), atol=1e-9, rtol=1e-9)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_merging_saves_parameters_and_layers():
    model = vitalloy.create_model("fmvit_nano", **SHALLOW)
    fused = copy.deepcopy(model).fuse()
    plain = vitalloy.create_model("fmvit_nano", **SHALLOW, groups=(1,), identity=False).fuse()
    assert parameters(fused) < 0.75 * parameters(model)
    assert parameters(fused) == parameters(plain), "the groups add no capacity"

    def kernels(m: nn.Module) -> int:
        return sum(isinstance(part, nn.Conv2d | nn.Linear) for part in m.modules())

    assert kernels(fused) < 0.5 * kernels(model)


def test_a_training_state_loads_deployed():
    model = trained()
    deployed = deployed_state(vitalloy.create_model("fmvit_nano", **SHALLOW), model.state_dict())
    target = fuse(vitalloy.create_model("fmvit_nano", **SHALLOW))
    target.load_state_dict(deployed)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(target(x), model(x), atol=1e-5, rtol=1e-4)


def test_shared_keys_and_values():
    model = vitalloy.create_model("fmvit_nano", **SHALLOW, shared_kv=True)
    attentions = [block.attn for block in model.features if isinstance(block, FrequencyMixingBlock)]
    assert attentions and all(attention.v is None for attention in attentions)
    seen = {}
    attentions[0].attend.register_forward_pre_hook(lambda _m, args: seen.update(k=args[1], v=args[2]))
    model(torch.randn(2, 3, 32, 32))
    assert seen["k"] is seen["v"]


def test_both_frequencies_reach_the_convolution():
    """With the attention's residual cut off, only `mix="both"` lets the block's input into the high branch."""
    for mix in ("low", "both"):
        torch.manual_seed(0)
        model = vitalloy.create_model("fmvit_nano", **SHALLOW, mix=mix)
        block = next(b for b in model.features if isinstance(b, FrequencyMixingBlock)).eval()
        assert (block.embed_input is not None) == (mix == "both")
        nn.init.zeros_(block.embed_low.conv.weight)
        x = torch.randn(2, 32, 8, 8)
        seen = []
        block.mixer.register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args[0]))
        block(x), block(x + torch.randn_like(x))
        assert torch.equal(*seen) == (mix == "low")


def test_the_grouped_mixer_is_next_vit_s():
    model = vitalloy.create_model("fmvit_nano", **SHALLOW, mixer="grouped")
    locals_ = [block.mixer.local for block in model.features]
    assert all(isinstance(part, ConvNorm) and part.conv.in_channels // part.conv.groups == 32 for part in locals_)


@pytest.mark.parametrize(("wrong", "words"), [({"mix": "high"}, "mix='high'"), ({"mixer": "dense"}, "mixer='dense'")])
def test_unknown_readings_are_refused(wrong, words):
    with pytest.raises(vitalloy.errors.ModelError, match=words):
        vitalloy.create_model("fmvit_nano", **wrong)


def test_weights_of_the_plain_reading_load_and_agree():
    torch.manual_seed(0)
    plain = runpy.run_path(str(REFERENCE))["MODELS"]["fmvit_tiny"]()
    for part in plain.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.2, 0.7)
            nn.init.normal_(part.bias, std=0.1)
            part.momentum = 0.5
    with torch.no_grad():
        plain.train()(torch.randn(2, 3, 64, 64))
        ours = vitalloy.create_model("fmvit_tiny").eval()
        ours.load_state_dict(ours.convert_state(plain.eval().state_dict()), strict=True)
        x = torch.randn(1, 3, 96, 64)
        wanted = plain(x)
        assert wanted.std() > 0.05
        torch.testing.assert_close(ours(x), wanted, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours.fuse()(x), wanted, atol=1e-4, rtol=1e-4)

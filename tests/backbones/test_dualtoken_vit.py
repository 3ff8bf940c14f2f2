"""What the goldens and the contract do not show of DualToken-ViT: the parts that are our reading of the paper."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import vitalloy
from vitalloy.backbones import dualtoken_vit as dt


def parameters(name: str, **kwargs) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in vitalloy.create_model(name, **kwargs).parameters())


@pytest.mark.parametrize(
    ("name", "millions"), [("dualtoken_vit_s", 12.21), ("dualtoken_vit_s_mix", 11.74), ("dualtoken_vit_t_mix", 5.85)]
)
def test_parameters(name, millions):
    assert round(parameters(name) / 1e6, 2) == millions


def test_what_the_options_cost():
    small = {"depths": (1, 1, 1)}
    whole = parameters("dualtoken_vit_s", **small)
    steps = whole - parameters("dualtoken_vit_s", **small, stepwise=False)
    assert steps == 2 * (64 * 64 + 64) + 128 * 128 + 128
    widths = 64 + 128 + 256
    assert whole - parameters("dualtoken_vit_s", **small, attn_norm=False) == 4 * widths
    assert parameters("dualtoken_vit_s", **small, layer_scale=1e-6) - whole == widths


def nano(**kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    model = vitalloy.create_model("dualtoken_vit_nano", num_classes=5, **kwargs)
    for p in model.parameters():  # large enough weights that every path shows
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)
    return model.eval()


def global_tokens(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    seen = []
    hook = model.stages[0].blocks[0].tokens.register_forward_hook(lambda _m, _i, out: seen.append(out))
    model(x)
    hook.remove()
    return seen[0]


def test_global_tokens_know_where_things_are():
    part = nano().stages[0].blocks[0].tokens
    carried, local = torch.zeros(1, 16, 32), torch.randn(1, 16, 16, 32)
    moved = local.roll((8, 8), (1, 2))  # quadrants change places
    before, after = (part(carried, x.flatten(1, 2), (16, 16)) for x in (local, moved))
    carried_part = 0.5 * part.mlp(carried)  # is learned for each place and stays
    before, after = ((tokens - carried_part).unflatten(1, (4, 4)) for tokens in (before, after))
    torch.testing.assert_close(after, before.roll((2, 2), (1, 2)))
    assert (after - before).abs().max() > 0.01  # pooled to one mean token nothing would have changed


def test_weight_decides_between_carried_and_gathered_tokens():
    images = torch.randn(2, 1, 3, 32, 32).unbind()
    carried = [global_tokens(nano(token_weight=1.0), x) for x in images]
    assert torch.equal(*carried)
    model = nano(token_weight=0.0)
    first = global_tokens(model, images[0])
    torch.nn.init.normal_(model.global_token)
    assert torch.equal(global_tokens(model, images[0]), first)
    half, whole = (global_tokens(nano(token_weight=w), images[0]) for w in (0.5, 0.0))
    torch.testing.assert_close(half, 0.5 * carried[0] + 0.5 * whole)


@pytest.mark.parametrize("grid", [(28, 28), (28, 42), (9, 11), (3, 2)])
def test_averaging_first_is_averaging_step_by_step(grid):
    part = dt.PositionAwareTokens(16, 2, 7, 2, 0.5, mix=False, attn_norm=True).double()
    tokens, local = torch.randn(2, 49, 16).double(), torch.randn(2, grid[0] * grid[1], 16).double()
    x = local.mT.unflatten(2, grid)
    for linear in part.down:
        x = F.conv2d(x, linear.weight[:, :, None, None], linear.bias)
        x = F.avg_pool2d(x, 2) if min(grid) >= 4 else x
    gathered = part.attn(part.norm(F.adaptive_avg_pool2d(x, 7).flatten(2).mT))
    wanted = 0.5 * part.mlp(tokens) + 0.5 * gathered
    torch.testing.assert_close(part(tokens, local, grid), wanted)
    part.fuse()
    assert len(part.down) == 1
    torch.testing.assert_close(part(tokens, local, grid), wanted)


def test_fusion_adds_the_input_once_or_twice():
    block = nano().stages[0].blocks[0]
    block.mlp = torch.nn.Identity()
    block.norm = torch.nn.Identity()
    tokens, x = torch.randn(1, 16, 32), torch.randn(1, 64, 32)
    added = block(tokens, x, (8, 8))[1]
    block.fusion = "local"
    torch.testing.assert_close(added - block(tokens, x, (8, 8))[1], 2 * x)
    with pytest.raises(vitalloy.VitalloyError, match="local"):
        nano(fusion="concatenate")


def test_mixed_perceptron_mixes_tokens():
    part = dt.MixMlp(8, 16)
    x = torch.randn(1, 16, 8)
    wanted = torch.einsum("nm,bmc->bnc", part.token.weight, x) + part.token.bias[:, None]
    torch.testing.assert_close(part(x), part.fc2(wanted))


def test_lightvit_names_of_the_shared_parts_load():
    model = nano()
    state = model.state_dict()
    gate = "stages.0.blocks.0.mlp.attn."
    joined = [state.pop(f"{gate}spatial_{kind}.weight") for kind in ("local", "global")]
    state[f"{gate}spatial_select.weight"] = torch.cat(joined, dim=1)
    state[f"{gate}spatial_select.bias"] = state.pop(f"{gate}spatial_local.bias")
    fresh = vitalloy.create_model("dualtoken_vit_nano", num_classes=5).eval()
    assert vitalloy.load_checkpoint(fresh, {"state_dict": state}) == vitalloy.checkpoints.Loaded()
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(fresh(x), model(x))

"""Branches and the one layer they become: kernels of several groups, small kernels, identities, and state dicts."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitalloy.layers.conv_norm import ConvNorm
from vitalloy.layers.fusion import fuse
from vitalloy.layers.reparam import ChannelScale, MultiGroupLinear, RepDepthwise, deployed_state, expand_groups, merge


def awake(module: nn.Module) -> nn.Module:
    """In double precision and evaluation mode, with norms that do something."""
    torch.manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for value, low, high in (
                (part.weight, -1.5, 1.5),
                (part.bias, -1, 1),
                (part.running_mean, -1, 1),
                (part.running_var, 0.5, 2),
            ):
                nn.init.uniform_(value, low, high)
    return module.double().eval()


@pytest.mark.parametrize(("groups", "target"), [(4, 1), (4, 2), (6, 3), (3, 3), (12, 1)])
def test_a_kernel_with_fewer_groups_computes_the_same(groups, target):
    weight = torch.randn(24, 12 // groups, 3, 3, dtype=torch.float64)
    x = torch.randn(2, 12, 5, 4, dtype=torch.float64)
    wide = expand_groups(weight, groups, target)
    assert wide.shape == (24, 12 // target, 3, 3)
    torch.testing.assert_close(F.conv2d(x, wide, groups=target), F.conv2d(x, weight, groups=groups))


def test_groups_that_cannot_hold_the_others_are_refused():
    with pytest.raises(ValueError, match="4 groups cannot hold 6"):
        expand_groups(torch.randn(12, 2, 1, 1), 6, 4)


@pytest.mark.parametrize(
    "layer",
    [
        MultiGroupLinear(16, 16),
        MultiGroupLinear(16, 16, identity=False),
        MultiGroupLinear(16, 24, groups=(2, 4)),
        MultiGroupLinear(16, 8, groups=(1,)),
        RepDepthwise(10),
        RepDepthwise(10, kernel=5, identity=False),
    ],
    ids=lambda layer: f"{type(layer).__name__}-{len(layer.branches)}",
)
def test_branches_become_one_layer(layer):
    layer = awake(copy.deepcopy(layer))
    x = torch.randn(2, next(layer.parameters()).shape[0] if isinstance(layer, RepDepthwise) else 16, 6, 7).double()
    wanted = layer(x)
    by_hand = sum(branch(x) for branch in layer.branches)
    torch.testing.assert_close(wanted, by_hand)
    layer.fuse()
    assert [*layer.state_dict()] in (["linear.weight", "linear.bias"], ["conv.weight", "conv.bias"])
    torch.testing.assert_close(layer(x), wanted, atol=1e-12, rtol=1e-12)
    before = layer.state_dict()
    layer.fuse()
    assert all(value is before[name] or torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_merge_takes_kernels_of_several_sizes_and_folded_branches():
    branches = [ConvNorm(8, 8, 5, groups=2), ConvNorm(8, 8, 3, groups=4), ConvNorm(8, 8), nn.BatchNorm2d(8)]
    branches = [awake(branch) for branch in branches]
    x = torch.randn(1, 8, 7, 6).double()
    wanted = sum(branch(x) for branch in branches)
    branches[1].fuse()
    weight, bias = merge(branches, kernel=5, groups=1)
    torch.testing.assert_close(F.conv2d(x, weight, bias, padding=2), wanted)
    assert branches[0].conv.bias is None, "merging changed a branch"


def test_a_channel_scale_is_the_depthwise_convolution():
    layer, x = ChannelScale(6), torch.randn(2, 6, 4, 5)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, groups=6))
    folded = ConvNorm(6, 6, groups=6)
    folded.conv = layer
    folded = awake(folded)
    wanted = folded(x.double())
    folded.fuse()
    torch.testing.assert_close(folded(x.double()), wanted)


def test_identity_needs_as_many_channels():
    assert len(MultiGroupLinear(8, 8).branches) == 4
    assert len(MultiGroupLinear(8, 16).branches) == 3


def test_a_training_state_becomes_a_deployed_one():
    def make() -> nn.Module:
        return nn.Sequential(MultiGroupLinear(8, 12), nn.ReLU(), RepDepthwise(12), MultiGroupLinear(12, 12))

    trained, other = awake(make()), awake(make())
    state = {name: value + 0.1 for name, value in trained.state_dict().items()}
    kept = copy.deepcopy(other.state_dict())
    deployed = deployed_state(other, state)
    assert all(torch.equal(value, kept[name]) for name, value in other.state_dict().items()), "the model changed"
    assert sum(v.numel() for v in deployed.values()) < 0.6 * sum(v.numel() for v in state.values())
    target = fuse(make().double())
    target.load_state_dict(deployed)
    trained.load_state_dict(state)
    x = torch.randn(2, 8, 5, 5).double()
    torch.testing.assert_close(target(x), trained(x))

"""How the goldens of fmvit are computed."""

from __future__ import annotations

import golden
from torch import Tensor, nn

from cases.common import Outputs
from vitalloy.layers.reparam import MultiGroupLinear, RepDepthwise


def fill(norm: nn.BatchNorm2d, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor) -> None:
    norm.load_state_dict(
        {"weight": gamma, "bias": beta, "running_mean": mean, "running_var": var, "num_batches_tracked": Tensor([0])}
    )


def depthwise_merge(record: dict) -> Outputs:
    given = golden.inputs_of(record)
    layer = RepDepthwise(given["x"].shape[1]).double().eval()
    three, one, identity = layer.branches
    for branch, side in ((three, "3"), (one, "1")):
        branch.conv.weight.copy_(given[f"w{side}"])
        fill(branch.norm, *(given[part + side] for part in "gbmv"))
    fill(identity, *(given[part] for part in ("gamma", "beta", "mean", "var")))
    return merged(layer, given["x"], lambda: layer.conv)


def multigroup_merge(record: dict) -> Outputs:
    given = golden.inputs_of(record)
    groups = [int(name[1:]) for name in given if name.startswith("w")]
    layer = MultiGroupLinear(given["x"].shape[1], len(given["w1"]), groups, identity="gamma" in given).double().eval()
    for branch, count in zip(layer.branches, groups, strict=False):
        branch.conv.weight.copy_(given[f"w{count}"])
        fill(branch.norm, *(given[f"{part}{count}"] for part in ("gamma", "beta", "mean", "var")))
    return merged(layer, given["x"], lambda: layer.linear)


def merged(layer: nn.Module, x: Tensor, single) -> Outputs:
    """What the branches compute, and the one layer that they become."""
    branches = layer(x)
    layer.fuse()
    assert (layer(x) - branches).abs().max() < 1e-12
    return {"out.branches": branches, "out.weight": single().weight, "out.bias": single().bias}


CASES = {
    "depthwise_merge": depthwise_merge,
    "multigroup_merge_124": multigroup_merge,
}

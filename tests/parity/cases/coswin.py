"""How the goldens of coswin are computed."""

from __future__ import annotations

import math
import re

import golden
import torch
from torch import Tensor, nn

import vitalloy
from cases.common import Model, Outputs
from vitalloy.backbones.coswin import Block, LocalBranch
from vitalloy.layers.windows import Windows
from vitalloy.training.objectives.supervised import SupervisedLoss
from vitalloy.training.schedules import warmup_cosine


def tokens(x: Tensor) -> Tensor:
    return x.flatten(1, -2)


def square(x: Tensor) -> Tensor:
    side = math.isqrt(x.shape[1])
    return x.unflatten(1, (side, side))


MODEL = Model(
    "coswin_cifar10",
    {"num_classes": 10},
    rename={
        "out.conv0": "layers.0.blocks.0.local",
        "out.attn0": "layers.0.blocks.0.attn",
        "out.block0": "layers.0.blocks.0",
        "out.block1_shifted": "layers.0.blocks.1",
        "out.stage1": "layers.1.downsample",
        "out.stage2": "layers.2.downsample",
        "out.stage3": "layers.2",
    },
    reshape={
        name: tokens
        for name in (
            *("out.patch_embed", "out.conv0", "out.block0", "out.block1_shifted"),
            *("out.stage1", "out.stage2", "out.stage3"),
        )
    },
)


def load(part: nn.Module, state: dict[str, Tensor], record: dict) -> None:
    part.double().train(record["train"]).load_state_dict(state)
    assert sum(p.numel() for p in part.parameters()) == record["params"]


def shapes(record: dict) -> dict[str, list[int]]:
    return {key: shape for key, shape, _ in record["state"]}


def block(record: dict) -> Outputs:
    x, has = square(golden.inputs_of(record)["tokens"]), shapes(record)
    rows, heads = has["attn.relative_position_bias_table"]
    window = ((math.isqrt(rows) + 1) // 2,) * 2
    dim = x.shape[-1]
    made = Block(dim, heads, window, has["mlp.fc1.weight"][0] / dim, "convInfluenceWeight" in has, 0.0, 0.0)
    cut = Windows(tuple(x.shape[1:3]), window, shifted="attn_mask" in has).double()(x)
    rename = vitalloy.create_model("coswin_nano").convert_state
    state = rename({f".{key}": value for key, value in golden.state_of(record).items()})
    load(made, {key[1:]: value for key, value in state.items()}, record)
    return {"out": tokens(made(x, cut))}


def local_branch(record: dict) -> Outputs:
    x = square(golden.inputs_of(record)["tokens"])
    state = golden.state_of(record)
    part = LocalBranch(x.shape[-1])
    load(part, {k.replace("conv.0", "conv1").replace("conv.2", "conv2"): v for k, v in state.items()}, record)
    return {"out": tokens(part(x))}


def label_smoothing(record: dict) -> Outputs:
    given = golden.inputs_of(record)
    return {
        name: SupervisedLoss(float(name.removeprefix("out.loss_")))(given["logits"], given["target"])
        for name in record["outputs"]
    }


def schedule(record: dict) -> Outputs:
    """Outputs are named e<epochs>_w<warm-up epochs>_n<steps an epoch>."""
    result = {}
    for name in record["outputs"]:
        epochs, warmup, steps = map(int, re.findall(r"\d+", name))
        rate = warmup_cosine(epochs * steps, warmup * steps, floor=1e-3)
        result[name] = torch.tensor([1e-3 * rate(t) for t in range(epochs * steps)], dtype=torch.float64)
    return result


CASES = {
    "cifar10_32": MODEL,
    "swin_baseline_32": Model("coswin_no_local", {"num_classes": 10}, MODEL.rename, reshape=MODEL.reshape),
    "block_shifted": block,
    "local_branch": local_branch,
    "label_smoothing": label_smoothing,
    "schedule": schedule,
}

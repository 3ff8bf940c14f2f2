"""How the goldens of lpvit are computed."""

from __future__ import annotations

import golden
import torch
from torch import Tensor

import vitalloy
from cases.common import Outputs
from vitalloy.compression.pruning.lpvit import allocation, curves, masks
from vitalloy.compression.pruning.lpvit.layers import gradients, layers_of

BLOCKS = {"16": (16, 16), "16x32": (16, 32), "32x16": (32, 16)}
POINTS = 20


def scalar(value: float | Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64).reshape(1)


def block_masks(record: dict) -> Outputs:
    weight, gradient = golden.inputs_of(record).values()
    found = {}
    for name in record["outputs"]:  # out.taylor_16x32_0.5, out.l1_16
        score, block, *amount = name.removeprefix("out.").split("_")
        found[name] = masks.block_mask(weight, gradient, float(amount[0]) if amount else 0.5, BLOCKS[block], score)
    return found


def block_mask_conv(record: dict) -> Outputs:
    weight, gradient = golden.inputs_of(record).values()
    return {"out.mask": masks.block_mask(weight, gradient, 0.5)}


def curve_tools(record: dict) -> Outputs:
    inputs = golden.inputs_of(record)
    y = inputs["y"].square().cumsum(0)
    points = len(y) - 1
    shares = curves.amounts(points)
    x = torch.tensor(shares, dtype=torch.float64)
    found = {}
    for name in record["outputs"]:
        kind = name.removeprefix("out.")
        if kind.startswith("smooth"):
            found[name] = curves.smooth_curve(y, float(kind.removeprefix("smooth")))
        elif kind.startswith("derivative"):
            found[name] = curves.derivative(x, y, int(kind.removeprefix("derivative_h")))
    slopes = [curves.derivative(x, curve, 4) for curve in (y, 2 * y + inputs["x"])]
    chosen = [allocation.at_slope(slopes, slope, shares, 0.05) for slope in (10, 40, 100)]
    return {**found, "out.pareto": torch.tensor(chosen, dtype=torch.float64).flatten()}


def second_order(record: dict) -> Outputs:
    inputs = golden.inputs_of(record)
    change, step, gradient = inputs["dw"], inputs["ddw"], inputs["g"]
    change, step = change * (change > 0), step * (step > 0.5)
    return {
        "out.hessian_times_delta": curves.hessian_times(step, gradient),
        "out.increment": scalar(curves.second_order_increment(change, step, gradient)),
        "out.full_blocks_of_64": scalar(curves.quadratic_form(change, gradient, 64)),
    }


def end_to_end(record: dict) -> Outputs:
    state = {name.removeprefix("m."): value for name, value in golden.state_of(record).items()}
    config = {"patch_size": 32, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 10}
    model = vitalloy.create_model("vit_nano", img_size=224, **config).double()
    vitalloy.load_checkpoint(model, state)
    assert sum(p.numel() for p in model.parameters()) == record["params"]
    images = golden.inputs_of(record)["images"]
    layers = layers_of(model, images[:1])
    weights = [layer.module.weight for layer in layers]
    found = gradients(model, images, weights, batch_size=len(images) // 2)
    power = "with the power term" in record["entry"]
    result = allocation.allocate(layers, found, macs=0.5, points=POINTS, power=power)
    out = {
        "out.dense_flops": scalar(sum(layer.flops() for layer in layers)),
        "out.slope": scalar(result.slope),
        "out.amounts": torch.tensor(result.amounts, dtype=torch.float64),
        "out.flops_ratio": scalar(result.share),
        "out.lambda_power": scalar(result.power_weight),
    }
    for i, layer in enumerate(layers):
        out |= {f"out.grad{i}": found[i], f"out.distortion{i}": result.distortions[i]}
        if power:
            out[f"out.power{i}"] = result.powers[i]
        assert layer.module.weight.shape == found[i].shape
    return out


CASES = {
    "block_masks": block_masks,
    "block_mask_conv": block_mask_conv,
    "curve_tools": curve_tools,
    "second_order": second_order,
    "allocation_nopower": end_to_end,
    "allocation_power": end_to_end,
}

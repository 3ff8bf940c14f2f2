"""How the goldens of q_hyvit that hold formulas of the methods it is compared with are computed."""

from __future__ import annotations

import golden
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cases.common import Outputs
from vitalloy.compression.observers import percentile_grid, percentile_log_sqrt2, power_of_two_grid
from vitalloy.compression.quantization.easyquant import best_grids
from vitalloy.compression.quantization.fq_vit import IntegerLayerNorm, LogSoftmax
from vitalloy.compression.quantizers import Log2, TwinGelu, TwinSoftmax, Uniform
from vitalloy.compression.scale_search import Product

SYSTEM = "q_hyvit"


def percentiles(channel: int | None):
    def run(record: dict) -> Outputs:
        x = golden.inputs_of(record)["x"]
        grid = percentile_grid(x, 6, channel)
        return {"out.y": grid(x), "out.scale": grid.scale.reshape(-1), "out.zero": grid.zero_point.reshape(-1)}

    return run


def log_sqrt2(record: dict) -> Outputs:
    attention = golden.inputs_of(record)["x"].softmax(-1)
    grid = percentile_log_sqrt2(attention, 6)
    return {"out.y": grid(attention), "out.delta": grid.scale.reshape(1), "out.attn": attention}


def log2(record: dict) -> Outputs:
    attention, grid = golden.inputs_of(record)["x"].softmax(-1), Log2(4)
    return {"out.code": grid.codes(attention).clamp_max(15), "out.y": grid(attention)}


def log_int_softmax(record: dict) -> Outputs:
    scale = torch.tensor(record["constants"]["scale"], dtype=torch.float64)
    x, softmax = golden.inputs_of(record)["q"] * scale, LogSoftmax(4)
    return {
        "out.exp_int": softmax.exponentials(x, scale),
        "out.log_code": softmax.codes(x, scale).clamp_max(15),
        "out.y": softmax(x, scale),
    }


def spread(record: dict) -> Tensor:
    x = golden.inputs_of(record)["x"]
    return x * 2 ** torch.linspace(-5, 0, x.shape[-1], dtype=x.dtype)


def power_of_two_factor(record: dict) -> Outputs:
    x = spread(record)
    grid = power_of_two_grid(x, 8, as_published=True)
    return {
        "out.scale": grid.scale,
        "out.zero": grid.zero_point[:1],
        "out.factor_log2": (grid.scale / grid.scale.min()).log2(),
        "out.y": grid(x),
    }


def integer_layer_norm(record: dict) -> Outputs:
    x = spread(record)
    norm = nn.LayerNorm(x.shape[-1], eps=1e-6).double()
    norm.load_state_dict({k.removeprefix("norm."): v for k, v in golden.state_of(record).items()})
    exact = norm(x)
    step = (exact.max() - exact.min()) / 255
    norm.__class__ = IntegerLayerNorm
    norm.input_quantizer, norm.output_quantizer = power_of_two_grid(x, 8, as_published=True), Uniform(8, step)
    scales = norm.input_quantizer.scale
    return {
        "out.scale_in": scales,
        "out.scale_out": step.reshape(1),
        "out.y_float": exact,
        "out.y_int": norm.on_grid(x),
    }


def twin_softmax(record: dict) -> Outputs:
    constants, x = record["constants"], golden.inputs_of(record)["x"].softmax(-1)
    split = torch.tensor(constants["split"], dtype=x.dtype)
    return {"out.y": TwinSoftmax(constants["bits"], split, as_published=True)(x)}


def twin_gelu(record: dict) -> Outputs:
    constants, x = record["constants"], F.gelu(golden.inputs_of(record)["x"])
    grid = TwinGelu(constants["bits"], torch.tensor(constants["positive_interval"], dtype=x.dtype))
    return {"out.y": grid(x), "out.neg_interval": torch.tensor([grid.negative_scale])}


def easyquant_linear(record: dict) -> Outputs:
    x, weight = golden.inputs_of(record)["x"], golden.state_of(record)["fc.weight"]
    inputs, weights = best_grids(Product(x, weight), 6, 6)
    return {
        "out.w_scale": weights.scale.reshape(1),
        "out.x_scale": inputs.scale.reshape(1),
        "out.y": F.linear(inputs(x), weights(weight)),
    }


CASES = {
    "repq_uniform_tensor": percentiles(None),
    "repq_uniform_channel": percentiles(-1),
    "repq_uniform_weight": percentiles(0),
    "repq_logsqrt2": log_sqrt2,
    "fq_log2": log2,
    "fq_log_int_softmax": log_int_softmax,
    "fq_ptf": power_of_two_factor,
    "fq_int_layernorm": integer_layer_norm,
    "ptq4vit_twin_softmax": twin_softmax,
    "ptq4vit_twin_gelu": twin_gelu,
    "easyquant_linear": easyquant_linear,
}

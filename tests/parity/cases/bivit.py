"""How the goldens of bivit are computed: values, and gradients of sum(y * linspace(-1, 1, numel))."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import golden
import torch
from torch import Tensor, nn

from cases.common import Outputs
from vitalloy.compression.quantization.bivit import BinaryLinear, binarize, bits, sign, softmax_aware, zero_one
from vitalloy.layers.attention import SelfAttention
from vitalloy.layers.mlp import Mlp


def gradients(y: Tensor, of: Mapping[str, Tensor]) -> Outputs:
    ramp = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    found = torch.autograd.grad((y * ramp).sum(), [*of.values()])
    return {f"out.grad_{name}": gradient for name, gradient in zip(of, found, strict=True)}


@torch.enable_grad()
def pointwise(function: Callable[[Tensor], Tensor], record: dict) -> Outputs:
    x = golden.inputs_of(record)["x"].requires_grad_()
    y = function(x)
    return {"out.y": y, **gradients(y, {"x": x})}


@torch.enable_grad()
def module(made: nn.Module, record: dict, prefix: str = "") -> Outputs:
    made = made.double().train(record["train"])
    state = {key.removeprefix(prefix): value for key, value in golden.state_of(record).items()}
    missing, unexpected = made.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"scaling_factor"}  # not in the record of the first call
    x = golden.inputs_of(record)["x"].requires_grad_()
    y = made(x)
    wanted = {"x": x, **dict(made.named_parameters())}
    return {
        "out.y": y,
        **gradients(y, {name: t for name, t in wanted.items() if f"out.grad_{name}" in record["outputs"]}),
    }


def linear(**options: object) -> Callable[[dict], Outputs]:
    def run(record: dict) -> Outputs:
        out_features, in_features = record["state"][0][1]
        return module(BinaryLinear(in_features, out_features, **options), record, "fc.")

    return run


def attention(**options: object) -> Callable[[dict], Outputs]:
    def run(record: dict) -> Outputs:
        dim, heads = numbers(record)[:2]
        return module(binarize(nn.Sequential(SelfAttention(dim, heads)), **options)[0], record)

    return run


def mlp(**options: object) -> Callable[[dict], Outputs]:
    def run(record: dict) -> Outputs:
        dim, _, hidden = numbers(record)
        return module(binarize(Mlp(dim, hidden), **options), record)

    return run


def numbers(record: dict) -> list[int]:
    """Width, heads and hidden width, as the record's entry tells them: "name: dim 24, heads 3, hidden 96"."""
    return [int(part.split()[-1]) for part in record["entry"].split(":")[1].split(",")]


@torch.enable_grad()
def softmax_map(record: dict) -> Outputs:
    x = golden.inputs_of(record)["x"].requires_grad_()
    y = softmax_aware(x)
    return {
        "out.binary": y,
        "out.ones_per_row": y.sum(-1),
        "out.grad_x_softmax_ste": gradients(y, {"x": x})["out.grad_x"],
    }


def popcount(record: dict) -> Outputs:
    a, w = golden.inputs_of(record).values()
    words = bits.pack(a), bits.pack(w)
    return {
        "out.packed_a": torch.from_numpy(bits.pack_bytes(a)),
        "out.dot_pm1": torch.from_numpy(bits.dot_signs(*words, a.shape[-1])),
        "out.dot_01_pm1": torch.from_numpy(bits.dot_zero_one(*words)),
    }


CASES = {
    "sign": lambda record: pointwise(sign, record),
    "zero_one": lambda record: pointwise(zero_one, record),
    "zero_one_scaled": lambda record: pointwise(lambda x: zero_one(x, scaled=True), record),
    "softmax_aware": softmax_map,
    "linear_mean_scale": linear(scale="mean"),
    "linear_mean_scale_float_act": linear(scale="mean", activation_bits=32),
    "linear_learned_scale": linear(),
    "linear_learned_scale_first_call": linear(),
    "linear_learned_scale_float_act": linear(activation_bits=32),
    "linear_float_weight_binary_act": linear(weight_bits=32),
    "attention_baseline": attention(scale="mean", softmax=False),
    "attention_sab": attention(),
    "mlp_w1a1": mlp(mlp_activations=1, scale="mean"),
    "mlp_w1a32": mlp(scale="mean"),
    "mlp_w1a32_learned": mlp(),
    "xnor_popcount": popcount,
}

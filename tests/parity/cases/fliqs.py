"""How the goldens of fliqs are computed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import golden
import torch
from torch import Tensor, nn

from cases.common import Outputs
from vitalloy.compression.quantization import fliqs


def reward(record: dict) -> Outputs:
    given = golden.inputs_of(record)
    return {f"out.{name}": rule(given["acc"], given["cost"], 50.0) for name, rule in fliqs.REWARDS.items()}


def entropy_schedule(record: dict) -> Outputs:
    def over(schedule: str) -> Tensor:
        weights = [fliqs.entropy_weight(s, 100, 1000, 0.5, schedule) for s in golden.inputs_of(record)["step"].tolist()]
        return torch.tensor(weights, dtype=torch.float64)

    return {f"out.{schedule}": over(schedule) for schedule in ("linear", "cosine", "heaviside")}


def controller(record: dict) -> Outputs:
    given = golden.inputs_of(record)
    policy = fliqs.Controller(5, 3, steps=120, delay=20, lr=0.05, momentum=0.9)
    updates = [policy.update(*pair) for pair in zip(given["idx"], given["rew"].tolist(), strict=True)]
    return {
        "out.logits": policy.logits,
        "out.probs": policy.probabilities(),
        "out.advantage": torch.tensor([u.advantage for u in updates], dtype=torch.float64),
        "out.entropy": torch.tensor([u.entropy for u in updates], dtype=torch.float64),
    }


def layer(formats: str, make: Callable[[], nn.Module], **scales: str | float) -> Callable[[dict], Outputs]:
    def run(record: dict) -> Outputs:
        state, x = golden.state_of(record), golden.inputs_of(record)["x"].requires_grad_()
        name = next(iter(state)).partition(".")[0]
        model = nn.Sequential(OrderedDict({name: make().double()}))
        model.load_state_dict(state)
        (quantized,) = fliqs.searchable(model, **scales).values()
        fliqs.set_format(quantized, formats)
        with torch.enable_grad():
            y = model(x)
            (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        bits = quantized.weight_bits, quantized.activation_bits
        weights = quantized.weight.numel()
        return {
            "out.y": y,
            "out.grad_x": x.grad,
            "out.grad_weight": quantized.weight.grad,
            "out.memory_mib": torch.tensor([fliqs.mebibytes(weights, bits[0])], dtype=torch.float64),
            "out.compute": torch.tensor([fliqs.code_compute(weights, *bits)], dtype=torch.float64),
        }

    return run


def formats(dim: int | None) -> Callable[[dict], Outputs]:
    def run(record: dict) -> Outputs:
        x = golden.inputs_of(record)["x"]
        return {name: fliqs.fake_quantize(x, name.removeprefix("out."), dim) for name in record["outputs"]}

    return run


def bops(record: dict) -> Outputs:
    given = golden.inputs_of(record)
    each = fliqs.gbops(given["macs"].double() * 1e6, given["wb"], given["ab"])
    return {"out.gbops": each, "out.total": each.sum().view(1)}


CASES = {
    "reward": reward,
    "entropy_schedule": entropy_schedule,
    "controller": controller,
    "quant_linear_w4a4": layer("INT4", lambda: nn.Linear(24, 10)),
    "quant_linear_w4a8_channel_token": layer(
        "INT4/INT8",
        lambda: nn.Linear(24, 10),
        weight_scale="channel",
        activation_scale="token",
        weight_factor=0.9,
        activation_factor=0.95,
    ),
    "quant_conv_w4a8": layer("INT4/INT8", lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1)),
    "formats_tensor": formats(None),
    "formats_row": formats(-1),
    "bops": bops,
}

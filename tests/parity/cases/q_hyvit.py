"""How the goldens zero_point and hybrid_choice of q_hyvit are computed; its baselines have a file of their own."""

from __future__ import annotations

import golden
import torch

from cases.common import Outputs
from vitalloy.compression.quantization.q_hyvit.choice import scores, zero_points


def zero_point(record: dict) -> Outputs:
    given = record["constants"]
    x = golden.inputs_of(record)["x"] * (given["high"] - given["low"]) + given["low"]
    made = zero_points(x.min(), x.max(), given["bits"])
    values = {name: grid.quantizer()(x) for name, grid in made.items()}
    errors = [(values[name] - x).square().mean() for name in ("unbounded", "saturated", "stretched")]
    return {
        "out.range_scale": made["unbounded"].scale.view(1),
        "out.zero_unbounded": made["unbounded"].zero_point.view(1),
        "out.zero_saturated": made["saturated"].zero_point.view(1),
        "out.y_unbounded": values["unbounded"],
        "out.y_saturated": values["saturated"],
        "out.y_zero_in_range": values["stretched"],
        "out.mse": torch.stack(errors),
    }


def hybrid_choice(record: dict) -> Outputs:
    given = golden.inputs_of(record)
    found = scores(given["x"], golden.state_of(record)["fc.weight"], given["g"], 6)
    return {"out.scores": found, "out.best": found.argmin().view(1)}


CASES = {"zero_point": zero_point, "hybrid_choice": hybrid_choice}

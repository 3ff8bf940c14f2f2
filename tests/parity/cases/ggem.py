"""How the golden of ggem, which holds the published formula, is computed."""

from __future__ import annotations

import golden
import torch
from torch import Tensor

from cases.common import Outputs
from vitalloy.layers.pooling import GeneralizedMean


def pool(record: dict) -> Outputs:
    x, p = golden.inputs_of(record).values()
    channels = x.shape[-1]

    def mean(exponents: Tensor, **kwargs: float) -> GeneralizedMean:
        module = GeneralizedMean(len(exponents), **kwargs).to(x.dtype)
        module.load_state_dict({"p": exponents})
        return module

    ggem, leaf = mean(p), x.clone().requires_grad_()
    with torch.enable_grad():
        pooled = ggem(leaf)
        grad_p, grad_x = torch.autograd.grad(pooled.square().sum(), (ggem.p, leaf))
    return {
        "out.ggem": pooled,
        "out.grad_p_of_sum_of_squares": grad_p,
        "out.grad_x_of_sum_of_squares": grad_x,
        "out.gem_p3": GeneralizedMean().to(x.dtype)(x),
        "out.p1": GeneralizedMean(p=1.0).to(x.dtype)(x),
        "out.per_channel": mean(torch.linspace(1, 5, channels, dtype=x.dtype))(x),
        "out.eps_0.01": mean(p, eps=0.01)(x),
    }


CASES = {"pool_49x24_g4": pool}

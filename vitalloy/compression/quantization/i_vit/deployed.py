"""Shiftmax and LayerNorm as the authors' deployed graph computes them, in 32-bit integers: other roundings than theirs
in training.

Divisions truncate toward zero where the simulation rounds or floors. Ours are held in 64 bits, so that the sums that
overflow in the authors' graph (activation scales below about 0.006) do not here. The models of this library run the
simulation's roundings in all their forms; these functions are for comparing with a graph deployed by the authors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def deployed_shiftmax(q: Tensor, scale: float, shift: int = 16) -> tuple[Tensor, Tensor]:
    """Softmax over the last dimension of integers of a scale: the exponentials, and 8-bit probabilities.

    Args:
        q: int64 tensor of any shape.
        shift: bits behind the point of the exponentials.
    """
    power = q - q.amax(-1, keepdim=True)
    power = power + (power >> 1) - (power >> 4)
    one = math.trunc(-1 / scale - 1)
    power = power.clamp_min(shift * one)
    halvings = torch.div(power, one, rounding_mode="trunc")
    exponential = (((power - one * halvings) >> 1) - one) << (shift - halvings)
    factor = torch.div((2**31 - 1), exponential.sum(-1, keepdim=True), rounding_mode="trunc")
    return exponential, (exponential * factor) >> 24


def deployed_layer_norm(q: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """LayerNorm over the last dimension of int64 integers, with the bias's integers: the result, and the root."""
    centred = q - torch.div(q.sum(-1, keepdim=True), q.shape[-1], rounding_mode="trunc")
    square = (centred * centred).sum(-1, keepdim=True)
    root = torch.full_like(square, 1 << 16)
    for _ in range(10):
        root = (root + torch.div(square, root, rounding_mode="trunc")) >> 1
    factor = torch.div((2**31 - 1), root.clamp_min(1), rounding_mode="trunc")
    return torch.div(centred * factor, 2, rounding_mode="trunc") + bias, root

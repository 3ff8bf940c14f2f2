"""Integer operators of PyTorch that export as one piece: `torch.ops.vitalloy.*`, on integer tensors alone.

`exporting.py` writes each as a few ONNX operators.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("vitalloy::product", mutates_args=())
def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of integers: a (..., N, K) int8, or int32 from 0 to 2^16 - 1; b (..., K, M) int8 -> int32."""
    return torch.matmul(a.int(), b.int())


@product.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a.float(), b.float()).int()


@torch.library.custom_op("vitalloy::convolve", mutates_args=())
def convolve(
    x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> Tensor:
    """Convolution of int8 by int8 -> int32."""
    run = (F.conv1d, F.conv2d, F.conv3d)[weight.ndim - 3]
    return run(x.int(), weight.int(), None, stride, padding, dilation, groups)


@convolve.register_fake
def _(x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int) -> Tensor:
    run = (F.conv1d, F.conv2d, F.conv3d)[weight.ndim - 3]
    return run(x.float(), weight.float(), None, stride, padding, dilation, groups).int()


@torch.library.custom_op("vitalloy::shift_right", mutates_args=())
def shift_right(x: Tensor, shift: Tensor) -> Tensor:
    """x / 2^shift rounded down: int64 within 62 bits, int64 from 0 to 62 -> int64."""
    return x >> shift


@shift_right.register_fake
def _(x: Tensor, shift: Tensor) -> Tensor:
    return torch.empty(torch.broadcast_shapes(x.shape, shift.shape), dtype=torch.int64, device=x.device)


@torch.library.custom_op("vitalloy::quotient", mutates_args=())
def quotient(a: Tensor, b: Tensor) -> Tensor:
    """a / b rounded down: int64, a zero or above, b above."""
    return torch.div(a, b, rounding_mode="floor")


@quotient.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return torch.empty(torch.broadcast_shapes(a.shape, b.shape), dtype=torch.int64, device=a.device)


@torch.library.custom_op("vitalloy::look_up", mutates_args=())
def look_up(table: Tensor, index: Tensor) -> Tensor:
    """table[index]: table (N,), index int32 of any shape, within the table."""
    return table[index]


@look_up.register_fake
def _(table: Tensor, index: Tensor) -> Tensor:
    return torch.empty_like(index, dtype=table.dtype)

"""The layers of the integer runtime: integer tensors in, integer tensors out, all constants made beforehand.

Narrow values are int8, wider ones int32, what may need more int64. Exponentials of 8-bit values are looked up: their
tables hold what the shifts of `arithmetic.py` give.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitalloy.compression.quantization.i_vit import operators  # noqa: F401  registers torch.ops.vitalloy
from vitalloy.compression.quantization.i_vit.arithmetic import WORD, dyadic, limits

ops = torch.ops.vitalloy
HALVES = 16  # bits of the lower part of a number too wide for one product


def stored(bits: int) -> torch.dtype:
    return torch.int8 if bits <= 8 else torch.int32


class Quantize(nn.Module):
    """A real tensor to integers of a grid."""

    def __init__(self, scale: Tensor, bits: int) -> None:
        super().__init__()
        self.register_buffer("inverse", 1 / scale.double())
        self.bits = bits

    def forward(self, x: Tensor) -> Tensor:
        return (x.double() * self.inverse).round().clamp(*limits(self.bits)).to(stored(self.bits))


class Dequantize(nn.Module):
    """Integers to a real tensor, float32."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale.double())

    def forward(self, x: Tensor) -> Tensor:
        return (x.double() * self.scale).float()


class Rescale(nn.Module):
    """round(z m / 2^e), half to even, in 64 bits.

    Args:
        ratio: m / 2^e.
        bound: the largest |z|.
    """

    def __init__(self, ratio: Tensor, bound: int) -> None:
        super().__init__()
        mantissa, shift = (t.long() for t in dyadic(ratio))
        gone = (shift > 62) | (mantissa == 0)  # less than half a step, whatever z is
        mantissa, shift = torch.where(gone, 0, mantissa), torch.where(gone, HALVES + 1, shift)
        self.wide = bound > 2**31
        low = (mantissa & -mantissa).clamp_min(1)  # the largest power of two in m
        # only a z of so many zeros at its end can lie halfway between two steps
        self.ties = bool((torch.where(gone, 2.0**62, 2.0 ** (shift - 1).double() / low) <= bound).any()) or self.wide
        self.register_buffer("mantissa", mantissa)
        self.register_buffer("shift", shift - HALVES if self.wide else shift)
        self.register_buffer("halves", torch.tensor(HALVES))
        self.register_buffer("offset", 1 << (self.shift - 1))

    def forward(self, z: Tensor) -> Tensor:
        z = z.long()
        if not self.wide:
            product = z * self.mantissa
            if not self.ties:
                return ops.shift_right(product + self.offset, self.shift)
            odd = ops.shift_right(product, self.shift) & 1
        else:
            upper = ops.shift_right(z, self.halves)
            lower = (z & (2**HALVES - 1)) * self.mantissa
            product = upper * self.mantissa + ops.shift_right(lower, self.halves)
            rest = ((lower & (2**HALVES - 1)) != 0).long()
            odd = (ops.shift_right(product, self.shift) & 1) | rest
        return ops.shift_right(product + (self.offset - 1) + odd, self.shift)


class Requantize(nn.Module):
    """One value, or the sum of two, to integers of a grid."""

    def __init__(self, addends: list[Rescale], bits: int) -> None:
        super().__init__()
        self.addends, self.bits = nn.ModuleList(addends), bits

    def forward(self, *values: Tensor) -> Tensor:
        total = sum(addend(value) for addend, value in zip(self.addends, values, strict=True))
        return total.clamp(*limits(self.bits)).to(stored(self.bits))


class RequantizeEach(nn.Module):
    """Several values to integers of one grid."""

    def __init__(self, values: list[Requantize]) -> None:
        super().__init__()
        self.values = nn.ModuleList(values)

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        return tuple(one(value) for one, value in zip(self.values, values, strict=True))


class Linear(nn.Module):
    """int8 by int8, with an int32 bias."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight.to(torch.int8).mT.contiguous())
        self.register_buffer("bias", None if bias is None else bias.to(torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        out = ops.product(x, self.weight)
        return out if self.bias is None else out + self.bias


class Conv(nn.Module):
    """int8 by int8, with an int32 bias."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *geometry: object) -> None:
        super().__init__()
        self.register_buffer("weight", weight.to(torch.int8))
        shape = (1, -1, *[1] * (weight.ndim - 2))
        self.register_buffer("bias", None if bias is None else bias.to(torch.int32).view(shape))
        self.geometry = geometry

    def forward(self, x: Tensor) -> Tensor:
        out = ops.convolve(x, self.weight, *self.geometry)
        return out if self.bias is None else out + self.bias


class MatMul(nn.Module):
    """The product of two values."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return ops.product(a, b)


class Shiftmax(nn.Module):
    """Softmax over the last dimension.

    Args:
        table: exponentials of 0, -1, -2, ...; the last stands for all that are smaller.
        bits: of the result.
        word: bits of the numerator.
    """

    def __init__(self, table: Tensor, bits: int, word: int) -> None:
        super().__init__()
        self.register_buffer("largest", torch.tensor(2**word - 1))
        self.register_buffer("table", table.long())
        self.register_buffer("shift", torch.tensor(word + 1 - bits))

    def forward(self, x: Tensor) -> Tensor:
        x = x.int()
        below = (x.amax(-1, keepdim=True) - x).clamp_max(len(self.table) - 1)
        exponential = ops.look_up(self.table, below)
        total = exponential.sum(-1, keepdim=True).minimum(self.largest)
        factor = ops.quotient(self.largest, total)
        return ops.shift_right(exponential * factor, self.shift).int()


class Gate(nn.Module):
    """GELU, SiLU or sigmoid of int8, looked up by the value and the largest of its row.

    Args:
        table: (256 * 256,) results, a row of values -128 to 127 for each largest value.
    """

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table.int())

    def forward(self, x: Tensor) -> Tensor:
        x = x.int() + 128
        return ops.look_up(self.table, x.amax(-1, keepdim=True) * 256 + x)


class Norm(nn.Module):
    """LayerNorm, or group norm of one group.

    Args:
        bias: its integers.
        dims: what is normalized.
        count: how many numbers are.
    """

    def __init__(self, bias: Tensor, dims: tuple[int, ...], count: int) -> None:
        super().__init__()
        self.register_buffer("bias", bias.long())
        self.register_buffer("one", torch.tensor(1))
        self.register_buffer("start", torch.tensor(2**16))
        self.register_buffer("largest", torch.tensor(2**WORD - 1))
        self.dims, self.count = dims, count

    def forward(self, x: Tensor) -> Tensor:
        x = x.long()
        x = x - rounded_mean(x.sum(self.dims, keepdim=True), self.count)
        square = (x * x).sum(self.dims, keepdim=True)
        root = self.start
        for _ in range(10):
            root = ops.shift_right(root + ops.quotient(square, root), self.one)
        factor = ops.quotient(self.largest, root.clamp_min(1))
        return ops.shift_right(x * factor, self.one) + self.bias


def rounded_mean(total: Tensor, count: int) -> Tensor:
    """total / count, half to even, for |total| below 2^50."""
    lift = 2**50 // count * 2  # an even number of counts makes the sum positive
    twice = 2 * (total + lift * count) + count
    mean = ops.quotient(twice, torch.tensor(2 * count, device=total.device))
    tie = (twice == mean * (2 * count)).long()
    return mean - (tie & mean) - lift


class Product(nn.Module):
    """The product of two values, element by element."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a.long() * b.long()


class Rectify(nn.Module):
    """ReLU of values whose scale has this sign."""

    def __init__(self, sign: Tensor) -> None:
        super().__init__()
        self.register_buffer("sign", None if (sign > 0).all() else sign)

    def forward(self, x: Tensor) -> Tensor:
        if self.sign is None:
            return x.clamp_min(0)
        sign = self.sign.to(x.dtype)
        return (x * sign).clamp_min(0) * sign


class Sum(nn.Module):
    """The sum over dimensions; with a count, the mean rounded half to even."""

    def __init__(self, dims: list[int], keepdim: bool, count: int | None = None) -> None:
        super().__init__()
        self.dims, self.keepdim, self.count = dims, keepdim, count

    def forward(self, x: Tensor) -> Tensor:
        total = x.long().sum(self.dims, self.keepdim)
        return total if self.count is None else rounded_mean(total, self.count)


class Pool(nn.Module):
    """Sums over windows of a map."""

    def __init__(self, size: list[int], stride: list[int], padding: list[int]) -> None:
        super().__init__()
        self.size, self.stride, self.padding = size, stride, padding

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x.int(), (self.padding[1], self.padding[1], self.padding[0], self.padding[0]))
        height, width = ((n - k) // s + 1 for n, k, s in zip(x.shape[-2:], self.size, self.stride, strict=True))
        total = None
        for i in range(self.size[0]):
            for j in range(self.size[1]):
                part = x[..., i : i + (height - 1) * self.stride[0] + 1 : self.stride[0], :]
                part = part[..., j : j + (width - 1) * self.stride[1] + 1 : self.stride[1]]
                total = part if total is None else total + part
        return total

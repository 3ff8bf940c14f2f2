"""Products of vectors of signs, 64 entries a word: exclusive or, count of bits. NumPy, on the CPU.

A bit is [value > 0]. Bits are packed along the last axis, the first in the lowest place, and padded with zeros, which
are equal in both operands and so count for nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

WORD = 64
FIT = 255 // WORD  # words whose counts add up in a byte
BLOCK = 1 << 15  # products at a time, so that the intermediate counts stay in the cache
_TABLE = np.array([bin(i).count("1") for i in range(1 << 16)], dtype=np.uint8)


def table_count(words: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Set bits of each word, by a table of 16-bit counts: for NumPy before 2.0."""
    counts = _TABLE[np.ascontiguousarray(words).view(np.uint16)]
    return counts.reshape(*words.shape, WORD // 16).sum(-1, dtype=np.uint8, out=out)


count = getattr(np, "bitwise_count", table_count)


def pack_bytes(x: Tensor) -> np.ndarray:
    """[x > 0] as bytes: (..., n) -> (..., ceil(n / 8)) uint8."""
    return np.packbits((x > 0).numpy(), axis=-1, bitorder="little")


def pack(x: Tensor) -> np.ndarray:
    """[x > 0] as words: (..., n) -> (..., ceil(n / 64)) uint64."""
    packed = pack_bytes(x)
    words = np.zeros((*packed.shape[:-1], -(-x.shape[-1] // WORD) * (WORD // 8)), np.uint8)
    words[..., : packed.shape[-1]] = packed
    return words.view("<u8")


def unpack(words: np.ndarray, n: int) -> Tensor:
    """The signs that words stand for: (..., words) uint64 -> (..., n), -1.0 or 1.0."""
    bits = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, count=n, bitorder="little")
    return torch.from_numpy(bits).float() * 2 - 1


def dot_signs(a: np.ndarray, b: np.ndarray, n: int) -> np.ndarray:
    """Products of all pairs of sign vectors of length n: (..., N, words), (..., M, words) -> (..., N, M) int32."""
    return n - 2 * _counts(a, b, np.bitwise_xor)


def dot_zero_one(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The same for vectors a of zeros and ones and vectors b of signs."""
    return 2 * _counts(a, b, np.bitwise_and) - count(a).sum(-1, dtype=np.int32)[..., None]


def _counts(a: np.ndarray, b: np.ndarray, combine: Callable[..., np.ndarray]) -> np.ndarray:
    """The number of set bits of combine(row of a, row of b), for all pairs of rows."""
    lead = a.shape[:-2]
    a, b = a.reshape(-1, *a.shape[-2:]), np.moveaxis(b.reshape(-1, *b.shape[-2:]), -1, 0)
    groups, rows, words = a.shape
    a, b = np.moveaxis(a, -1, 0)[..., None].copy(), b[:, :, None].copy()  # (words, G, N, 1), (words, G, 1, M)
    pairs = b.shape[-1]
    found = np.empty((groups, rows, pairs), np.int32)
    tall = min(rows, max(1, BLOCK // pairs))
    many = max(1, BLOCK // (tall * pairs)) if tall == rows else 1
    for g in range(0, groups, many):
        for r in range(0, rows, tall):
            total = found[g : g + many, r : r + tall]
            both = np.empty(total.shape, np.uint64)
            bits, some = np.empty(total.shape, np.uint8), np.empty(total.shape, np.uint8)
            total.fill(0)
            for w in range(words):
                combine(a[w, g : g + many, r : r + tall], b[w, g : g + many], out=both)
                if w % FIT:
                    some += count(both, out=bits)
                else:
                    count(both, out=some)
                if w % FIT == FIT - 1 or w == words - 1:
                    total += some
    return found.reshape(*lead, rows, pairs)

"""Reads golden records: weights and inputs that are functions of names, and digests of what the authors' code computed.

The formulas of `fill`, `make_input` and `digest` are fixed: the records were made with them.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

SAMPLES = 64


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def fill(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The values of the state-dict tensor `key`, float64."""
    rng, leaf = np.random.RandomState(zlib.crc32(key.encode()) & 0xFFFFFFFF), key.rsplit(".", 1)[-1]
    if leaf == "running_var":
        return 0.5 + rng.random_sample(shape)
    noise = rng.standard_normal(shape)
    if leaf == "running_mean" or (leaf == "bias" and len(shape) <= 1):
        return 0.1 * noise
    if len(shape) <= 1:  # norm weights, layer scales, temperatures, gates
        return 0.8 + 0.2 * noise
    if shape[0] == 1:  # class tokens, position tables
        return 0.5 * noise
    return noise / np.sqrt(float(np.prod(shape[1:])))


def state_of(record: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The authors' state dict of a record, filled; entries that the constructor computes are left out."""
    dtype = getattr(torch, record["dtype"])
    return {
        k: torch.from_numpy(np.asarray(fill(k, tuple(s)))).to(dtype) for k, s, role in record["state"] if role == "fill"
    }


def make_input(shape, kind: str = "normal", seed: int = 1234, dtype: torch.dtype = torch.float64, **kw) -> torch.Tensor:
    rng, shape = np.random.RandomState(seed), tuple(shape)
    if kind == "normal":
        a = rng.standard_normal(shape) * kw.get("scale", 1.0)
    elif kind == "uniform":
        a = rng.uniform(kw.get("low", 0.0), kw.get("high", 1.0), shape)
    elif kind == "integer":
        return torch.from_numpy(np.asarray(rng.randint(kw["low"], kw["high"], shape)).astype(np.int64))
    elif kind == "binary":
        a = (rng.random_sample(shape) < kw.get("p", 0.5)).astype(np.float64)
    elif kind == "arange":
        a = np.arange(int(np.prod(shape)), dtype=np.float64).reshape(shape) * kw.get("scale", 1.0)
    elif kind == "ones":
        a = np.ones(shape)
    else:
        raise ValueError(f"unknown input kind {kind!r}")
    return torch.from_numpy(np.asarray(a)).to(dtype)


def inputs_of(record: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    dtype = getattr(torch, record["dtype"])
    return {name: make_input(**{"dtype": dtype, **spec}) for name, spec in record["inputs"].items()}


def digest(value: torch.Tensor) -> dict[str, Any]:
    """Shape, moments and 64 sampled values of a tensor."""
    t = value.detach().to(torch.float64).contiguous().flatten().numpy()
    at = np.random.RandomState(99).randint(0, max(t.size, 1), SAMPLES) if t.size > SAMPLES else np.arange(t.size)
    return {
        "shape": list(value.shape),
        "mean": float(t.mean()) if t.size else 0.0,
        "std": float(t.std()) if t.size else 0.0,
        "samples": [float(x) for x in t[at]],
    }


def difference(got: torch.Tensor, want: Mapping[str, Any]) -> float:
    """Largest deviation from a digest relative to the digest's own spread; infinite for another shape or NaN."""
    mine = digest(got)
    if mine["shape"] != list(want["shape"]) or not np.isfinite(mine["samples"]).all():
        return float("inf")
    scale = max(want["std"], abs(want["mean"]), 1e-12)
    worst = max((abs(a - b) for a, b in zip(mine["samples"], want["samples"], strict=True)), default=0.0)
    return max(worst, abs(mine["mean"] - want["mean"]), abs(mine["std"] - want["std"])) / scale


def flatten(result: Any, prefix: str = "out") -> dict[str, torch.Tensor]:
    """Nested results as named tensors: out, out.0, out.name, ..."""
    if isinstance(result, torch.Tensor):
        return {prefix: result}
    if isinstance(result, Mapping):
        items = result.items()
    else:
        items = enumerate(result) if isinstance(result, list | tuple) else ()
    return {k: v for name, item in items for k, v in flatten(item, f"{prefix}.{name}").items()}

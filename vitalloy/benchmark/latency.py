"""How long a call takes, how much memory it needs, and how near the machine's own limit it comes.

Times are wall clock. The median is the number to report and the 90th percentile says how noisy the machine was. Two
calls are compared by timing them in turn (`compare`): on a shared machine the ratio then holds although each number
moves.
"""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

LEAST_RUNS = 5
_STATM = Path("/proc/self/statm")


@dataclass(frozen=True)
class Latency:
    """Milliseconds a call took over `runs` timed runs: the median and the 90th percentile."""

    median_ms: float
    p90_ms: float
    runs: int


def measure(call: Callable[[], Any], *, warmup: int = 3, repeats: int = 30, budget_s: float = 3.0) -> Latency:
    """Time `call()`.

    Args:
        call: takes nothing; its result is dropped. Work it leaves on a CUDA device is waited for.
        warmup: untimed runs before the first timed one.
        repeats: timed runs, never fewer than five.
        budget_s: seconds after which no further run starts, once five are in.
    """
    return compare({"call": call}, warmup=warmup, repeats=repeats, budget_s=budget_s)["call"]


def compare(
    calls: Mapping[str, Callable[[], Any]],
    *,
    warmup: int = 3,
    repeats: int = 30,
    budget_s: float = 3.0,
) -> dict[str, Latency]:
    """Time several calls in turn within one process, so that their ratios hold on a noisy machine.

    Each round runs every call once and starts with another one, so that none always finds the caches its neighbour
    left. Arguments are those of `measure`; `budget_s` is per call, so all together take about `len(calls) * budget_s`.
    """
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    deadline = time.perf_counter() + budget_s * len(names)
    for name in names:
        for done in range(warmup):
            if done and time.perf_counter() > deadline:
                break
            calls[name]()
    _wait_for_device()
    deadline = time.perf_counter() + budget_s * len(names)
    for turn in range(max(repeats, LEAST_RUNS)):
        if turn >= LEAST_RUNS and time.perf_counter() > deadline:
            break
        first = turn % max(len(names), 1)
        for name in names[first:] + names[:first]:
            times[name].append(_seconds(calls[name]))
    return {name: _summary(seconds) for name, seconds in times.items()}


def peak_memory(call: Callable[[], Any]) -> float | None:
    """Megabytes by which the process's resident memory rose above its start while `call()` ran; None off Linux.

    A thread reads `/proc/self/statm` every millisecond: a shorter peak can be missed, and memory that the allocator
    already held is not counted (free pages are given back first where the C library can). Library start-up cost is
    part of a first call, so run the call once before if only its steady need matters.
    """
    if _resident() is None:
        return None
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    start = peak = _resident() or 0
    finished = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not finished.is_set():
            peak = max(peak, _resident() or 0)
            finished.wait(0.001)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        kept = call()
        peak = max(peak, _resident() or 0)
        del kept
    finally:
        finished.set()
        watcher.join()
    return (peak - start) / 1e6


def matmul_rate(dtype: torch.dtype = torch.float32, seconds: float = 0.5) -> float:
    """Floating point operations a second of this machine's own CPU matrix product at the current thread count.

    The best over a few square sizes: the practical limit to hold a model's rate against.
    """
    sizes = (256, 512, 1024)
    best = 0.0
    for size in sizes:
        a, b = torch.ones(2, size, size, dtype=dtype)
        out = torch.empty(size, size, dtype=dtype)
        torch.mm(a, b, out=out)
        deadline = time.perf_counter() + seconds / len(sizes)
        while True:
            start = time.perf_counter()
            torch.mm(a, b, out=out)
            end = time.perf_counter()
            best = max(best, 2 * size**3 / (end - start))
            if end > deadline:
                break
    return best


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    _wait_for_device()
    return time.perf_counter() - start


def _summary(seconds: list[float]) -> Latency:
    p90 = statistics.quantiles(seconds, n=10, method="inclusive")[-1]
    return Latency(statistics.median(seconds) * 1e3, p90 * 1e3, len(seconds))


def _wait_for_device() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _resident() -> int | None:
    try:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError, AttributeError):
        return None

from __future__ import annotations

import time

import torch

from vitalloy.benchmark import compare, matmul_rate, measure, peak_memory


def test_measure_reports_the_time_a_call_takes():
    result = measure(lambda: time.sleep(0.01), warmup=0, repeats=8)
    assert result.runs == 8
    assert 10 <= result.median_ms <= result.p90_ms < 500


def test_measure_stops_at_its_budget_but_not_before_five_runs():
    started = time.perf_counter()
    result = measure(lambda: time.sleep(0.03), warmup=1, repeats=1000, budget_s=0.3)
    assert 5 <= result.runs <= 11 and time.perf_counter() - started < 5
    assert measure(lambda: time.sleep(0.02), warmup=0, repeats=1, budget_s=0.0).runs == 5


def test_compare_takes_turns_and_tells_fast_from_slow():
    order = []
    calls = {
        "short": lambda: (order.append("short"), time.sleep(0.002)),
        "long": lambda: (order.append("long"), time.sleep(0.02)),
    }
    result = compare(calls, warmup=0, repeats=6)
    assert result["long"].median_ms > 1.5 * result["short"].median_ms
    assert order == ["short", "long", "long", "short"] * 3


def test_peak_memory_sees_what_a_call_holds_for_a_moment():
    def call():
        held = torch.ones(25_000_000)  # 100 MB
        time.sleep(0.05)
        return held.sum()

    small, large = peak_memory(lambda: time.sleep(0.02)), peak_memory(call)
    if large is None:  # off Linux
        assert small is None
    else:
        assert 95 < large < 200 and small < 20


def test_the_matmul_rate_is_one_that_a_cpu_can_have():
    assert 1e8 < matmul_rate(seconds=0.1) < 1e14

"""Measuring: latency, memory and work of a model, and the machine they were measured on."""

from vitalloy.benchmark.complexity import Complexity, about_models, count
from vitalloy.benchmark.latency import Latency, compare, matmul_rate, measure, peak_memory
from vitalloy.benchmark.machine import describe

__all__ = [
    "Complexity",
    "Latency",
    "about_models",
    "compare",
    "count",
    "describe",
    "matmul_rate",
    "measure",
    "peak_memory",
]

"""For every test: one thread a worker, no network, and silence about what PyTorch says of itself."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

import vitalloy  # noqa: F401  torchvision must not be imported before it

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

FOREIGN = (
    "ignore::torch.jit.TracerWarning",  # a trace is fixed to its input size
    "ignore:.*torch.jit",
    "ignore:In CPU autocast",
    "ignore:.*_pytree",
    "ignore:Detected pickle protocol",
)


def pytest_configure(config):
    for line in FOREIGN:
        config.addinivalue_line("filterwarnings", line)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Tests that share what their module makes once run in one process (`--dist loadgroup`)."""
    for item in items:
        if any(made[-1].scope == "module" for made in item._fixtureinfo.name2fixturedefs.values()):
            item.add_marker(pytest.mark.xdist_group(item.module.__name__))

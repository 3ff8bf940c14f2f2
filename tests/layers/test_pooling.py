"""Global pooling leaves out the tokens that are no part of the image."""

from __future__ import annotations

import pytest
import torch

from vitalloy.layers.pooling import GlobalPool


def test_each_kind():
    x = torch.randn(2, 6, 3)
    x[:, :2] = 100.0  # two prefix tokens
    assert torch.equal(GlobalPool("token", 2)(x), x[:, 0])
    assert torch.allclose(GlobalPool("avg", 2)(x), x[:, 2:].mean(1))
    assert torch.equal(GlobalPool("max", 2)(x), x[:, 2:].max(1).values)
    assert torch.equal(GlobalPool("", 2)(x), x)


@pytest.mark.parametrize(("kind", "prefix"), [("median", 1), ("token", 0)])
def test_an_impossible_kind_is_refused_with_the_possible_ones(kind, prefix):
    with pytest.raises(ValueError, match=rf"{kind}.*avg"):
        GlobalPool(kind, prefix)

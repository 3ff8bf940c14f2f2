"""Position tables at another grid, against timm's resampling."""

from __future__ import annotations

import pytest
import torch
from timm.layers import resample_abs_pos_embed

from vitalloy.layers.positions import resample_positions


@pytest.mark.parametrize("grid", [(24, 24), (7, 10), (5, 3)])
@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("old", [(14, 14), (6, 9)])
def test_like_timm(grid, prefix, old):
    table = torch.randn(1, prefix + old[0] * old[1], 5)
    wanted = resample_abs_pos_embed(table, list(grid), list(old), num_prefix_tokens=prefix)
    got = resample_positions(table, grid, old_grid=old, prefix=prefix)
    assert got.shape == (1, prefix + grid[0] * grid[1], 5)
    assert torch.allclose(got, wanted, atol=1e-6)
    assert torch.equal(got[:, :prefix], table[:, :prefix])


def test_the_same_grid_is_no_copy_and_the_dtype_stays():
    table = torch.randn(1, 17, 4)
    assert resample_positions(table, (4, 4), prefix=1) is table
    assert resample_positions(table.bfloat16(), (6, 5), prefix=1).dtype == torch.bfloat16
    double = resample_positions(table.double(), (6, 5), prefix=1)
    assert double.dtype == torch.float64
    assert (double - resample_positions(table, (6, 5), prefix=1)).abs().max() < 1e-6


def test_gradients_reach_the_table():
    table = torch.randn(1, 16, 3, requires_grad=True)
    resample_positions(table, (3, 7)).sum().backward()
    assert table.grad.ne(0).all()


def test_rows_that_make_no_grid_are_refused():
    with pytest.raises(ValueError, match="15 rows"):
        resample_positions(torch.zeros(1, 16, 3), (5, 5), prefix=1)
    with pytest.raises(ValueError, match="3x4"):
        resample_positions(torch.zeros(1, 16, 3), (5, 5), old_grid=(3, 4))

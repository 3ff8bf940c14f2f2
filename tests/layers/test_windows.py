"""Windows: nothing is lost in cutting, neighbours alone attend to each other, relative positions are what they say."""

from __future__ import annotations

import pytest
import torch

from vitalloy.layers.windows import Windows, relative_index, resample_relative


@pytest.mark.parametrize("grid", [(8, 8), (9, 6), (4, 11), (3, 3), (2, 9)])
@pytest.mark.parametrize("shifted", [False, True])
def test_join_undoes_split(grid, shifted):
    x = torch.randn(2, *grid, 3)
    for made_for in (grid, (16, 16)):  # kept tables, and tables made at the call
        cut = Windows(made_for, (4, 4), shifted)(x)
        windows = cut.split(x)
        assert windows.shape[1] == cut.area == min(4, grid[0]) * min(4, grid[1])
        assert torch.equal(cut.join(windows, x), x)
        assert windows.abs().sum() == pytest.approx(x.abs().sum().item())  # padding is zero


def test_shifted_windows_see_only_tokens_that_the_grid_puts_together():
    height, width, side = 8, 12, 4
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    cut = Windows((height, width), (side, side), shifted=True)(torch.zeros(1, height, width, 1))
    where = cut.split(torch.stack([y, x], -1).unsqueeze(0).float())  # (windows, N, 2)
    near = (where[:, :, None] - where[:, None]).abs().amax(-1) < side
    assert torch.equal(cut.mask[:, 0] == 0, near)


def test_folded_masks_part_as_well_without_denormal_numbers():
    windows, logits = Windows((8, 8), (4, 4), shifted=True), torch.randn(4, 1, 16, 16)
    before = (logits + windows(torch.zeros(1, 8, 8, 1)).mask).softmax(-1)
    windows.fuse()
    after = (logits + windows(torch.zeros(1, 8, 8, 1)).mask).softmax(-1)
    assert torch.allclose(after, before, atol=1e-20) and after.min() > torch.finfo(torch.float32).tiny
    other = windows(torch.zeros(1, 12, 8, 1)).mask  # a grid that is cut anew
    assert other.min() == windows.mask.min() == windows.FAR


def test_one_axis_of_one_window_is_shifted_along_the_other_alone():
    cut = Windows((4, 8), (4, 4), shifted=True)(torch.zeros(1, 4, 8, 1))
    columns = cut.order.view(2, 4, 4) % 8
    assert columns[0, 0].tolist() == [2, 3, 4, 5] and cut.order[0] == 2


def test_relative_index_of_a_clamped_window_reads_the_middle_of_the_table():
    offsets = torch.stack(torch.meshgrid(torch.arange(-3, 4), torch.arange(-2, 3), indexing="ij"), -1).flatten(0, 1)
    for window in ((4, 3), (2, 3), (3, 1)):
        cells = torch.cartesian_prod(torch.arange(window[0]), torch.arange(window[1])).view(-1, 2)
        wanted = (cells[:, None] - cells).flatten(0, 1)
        assert torch.equal(offsets[relative_index(window, (4, 3))], wanted)


def test_resampled_table_keeps_heads_apart_and_a_constant_constant():
    table = torch.tensor([1.0, -2.0]).expand(49, 2)
    larger = resample_relative(table, (7, 5))
    assert larger.shape == (13 * 9, 2)
    assert torch.allclose(larger, torch.tensor([1.0, -2.0]).expand(117, 2), atol=1e-5)
    with pytest.raises(ValueError, match="50 rows"):
        resample_relative(torch.zeros(50, 2), (7, 7))

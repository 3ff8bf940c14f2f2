"""Polyphase anchoring: rolls, ties, gradients, and convolutions on a torus."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vitalloy.layers import polyphase
from vitalloy.layers.polyphase import CircularConv2d, PolyphaseAnchor, polyphase_anchor


def maps(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("stride", [(2, 2), (3, 4), (6, 8), (1, 4)])
def test_a_shifted_map_is_anchored_to_the_same_cells(stride):
    x = maps(3, 5, 6, 8)
    anchored = polyphase_anchor(x, stride)
    norms = polyphase.phase_norms(anchored, stride)
    assert (norms.argmax(1) == 0).all(), "the strongest component does not start at the corner"
    for shift in ((1, 0), (0, 1), (-2, 3), (5, 7)):
        again = polyphase_anchor(x.roll(shift, (2, 3)), stride)
        for one, other in zip(anchored, again, strict=True):  # each image: the same up to whole cells
            cells = [
                (i, j)
                for i in range(0, 6, stride[0])
                for j in range(0, 8, stride[1])
                if one.roll((i, j), (1, 2)).equal(other)
            ]
            assert len(cells) == 1


def test_memory_layout_does_not_matter_and_small_strides_do_nothing():
    x = maps(2, 4, 6, 6)
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(polyphase_anchor(x, 3), polyphase_anchor(last, 3))
    assert PolyphaseAnchor(1)(x) is x


def test_the_gradient_is_rolled_back():
    x = maps(2, 3, 4, 4).requires_grad_()
    weight = maps(2, 3, 4, 4, seed=1)
    (polyphase_anchor(x, 2) * weight).sum().backward()
    strongest = polyphase.phase_norms(x, (2, 2)).argmax(1)
    wanted = [w.roll((int(i), int(j)), (1, 2)) for w, i, j in zip(weight, strongest // 2, strongest % 2, strict=True)]
    assert torch.equal(x.grad, torch.stack(wanted))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalised_tokens_of_equal_norm_are_told_apart(dtype):
    tokens = nn.functional.layer_norm(maps(8, 12, 12, 16).to(dtype), (16,))
    x = tokens.movedim(-1, 1)
    norms = polyphase.phase_norms(x, (4, 4))
    assert (norms.amax(1) / norms.amin(1)).max() < 1.002, "this test is about ties"
    chosen = polyphase.strongest_phase(x, (4, 4))
    rolled = polyphase.strongest_phase((x + 0).roll((1, 2), (2, 3)), (4, 4))
    assert torch.equal(rolled, (chosen // 4 + 1) % 4 * 4 + (chosen % 4 + 2) % 4)


def test_a_map_that_the_stride_does_not_divide_is_left_alone():
    x = maps(1, 2, 6, 9)
    with pytest.raises(ValueError, match="6x9 map has no phases of stride 4x4"):
        polyphase_anchor(x, 4)
    anchor = PolyphaseAnchor(4)
    assert anchor(x) is x and anchor.stride_on((6, 9)) is None
    assert anchor.stride_on((3, 8)) == (3, 4), "a map shorter than the stride is one cell"


def test_cells_of_an_average():
    anchor = PolyphaseAnchor(cells=7)
    assert anchor.stride_on((14, 21)) == (2, 3) and anchor.stride_on((7, 1)) == (1, 1)
    assert anchor.stride_on((10, 14)) is None and anchor.stride_on((4, 4)) is None


@pytest.mark.parametrize(("kernel", "stride", "padding", "groups"), [(3, 1, 1, 4), (3, 2, 1, 1), (7, 4, 3, 2)])
def test_circular_convolution_is_pytorchs_and_shares_its_weights(kernel, stride, padding, groups):
    conv = nn.Conv2d(4, 4, kernel, stride, padding, groups=groups, padding_mode="circular").double()
    ours = CircularConv2d.of(conv)
    assert ours.weight is conv.weight and ours.bias is conv.bias
    x = maps(2, 4, 8, 12)
    assert torch.allclose(ours(x), conv(x), atol=1e-12)
    shifted = ours(x.roll((stride, -stride), (2, 3)))
    assert torch.allclose(shifted, conv(x).roll((1, -1), (2, 3)), atol=1e-12)


def test_circular_convolution_on_a_map_smaller_than_its_padding():
    conv = CircularConv2d(1, 1, 7, padding=3, bias=False).double()
    nn.init.ones_(conv.weight)
    x = maps(1, 1, 2, 7)
    rows = x[..., [1, 0, 1, 0, 1, 0, 1, 0], :]  # -3 to 4 on the torus
    wanted = torch.stack([rows[:, :, i : i + 7].sum((2, 3)) for i in range(2)], 2)  # seven columns are all columns
    assert torch.allclose(conv(x), wanted.unsqueeze(-1).expand_as(x))

"""Tokens to maps and back without a copy, in the memory layout that convolutions like."""

from __future__ import annotations

import pytest
import torch

from vitalloy.layers.tokens import to_map, to_tokens


@pytest.mark.parametrize("batch", [1, 3])
def test_both_ways_share_memory_and_maps_are_channels_last(batch):
    tokens = torch.randn(batch, 12, 5)
    image = to_map(tokens, (3, 4))
    assert image.shape == (batch, 5, 3, 4) and image.data_ptr() == tokens.data_ptr()
    assert torch.equal(image[0, :, 1, 2], tokens[0, 6])  # row-major
    like = torch.empty(batch, 5, 3, 4).contiguous(memory_format=torch.channels_last)
    assert image.stride()[1:] == like.stride()[1:] and image.is_contiguous(memory_format=torch.channels_last)
    assert image.stride(0) == 60  # even for one image, or a convolution would copy the map
    back = to_tokens(image)
    assert torch.equal(back, tokens) and back.data_ptr() == tokens.data_ptr()


@pytest.mark.parametrize("batch", [1, 2])
def test_a_convolution_keeps_the_layout(batch):
    image = to_map(torch.randn(batch, 36, 8), (6, 6))
    out = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8)(image)
    assert to_tokens(out).data_ptr() == out.data_ptr()

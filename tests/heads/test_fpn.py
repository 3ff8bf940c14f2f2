"""The pyramid: sizes, its kinds of extra maps, and the numbers of the top-down path."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from vitalloy.errors import ModelError
from vitalloy.heads import FPN

MAPS = [torch.randn(2, c, h, w) for c, h, w in ((8, 17, 20), (12, 9, 10), (16, 5, 5))]
CHANNELS = [8, 12, 16]


@pytest.mark.parametrize(
    ("kwargs", "sizes"),
    [
        ({}, [(17, 20), (9, 10), (5, 5)]),
        ({"start_level": 1}, [(9, 10), (5, 5)]),
        ({"num_outs": 4, "extra": "pool"}, [(17, 20), (9, 10), (5, 5), (3, 3)]),
        ({"num_outs": 4, "start_level": 1, "extra": "conv_on_input"}, [(9, 10), (5, 5), (3, 3), (2, 2)]),
    ],
)
def test_sizes(kwargs, sizes):
    outs = FPN(CHANNELS, 6, **kwargs)(MAPS)
    assert [tuple(x.shape) for x in outs] == [(2, 6, *size) for size in sizes]


def test_fine_maps_receive_the_coarse_ones():
    fpn = FPN(CHANNELS, 6)
    laterals = [conv(x) for conv, x in zip(fpn.lateral_convs, MAPS, strict=True)]
    middle = laterals[1] + F.interpolate(laterals[2], size=(9, 10), mode="nearest")
    fine = laterals[0] + F.interpolate(middle, size=(17, 20), mode="nearest")
    torch.testing.assert_close(fpn(MAPS)[0], fpn.fpn_convs[0](fine))


def test_extra_maps():
    pooled = FPN(CHANNELS, 6, num_outs=4, extra="pool")(MAPS)
    assert torch.equal(pooled[3], pooled[2][..., ::2, ::2])
    fpn = FPN(CHANNELS, 6, num_outs=5, extra="conv_on_input")
    outs = fpn(MAPS)
    torch.testing.assert_close(outs[3], fpn.fpn_convs[3](MAPS[2]))
    torch.testing.assert_close(outs[4], fpn.fpn_convs[4](outs[3]))


@pytest.mark.parametrize(
    "kwargs",
    [{"start_level": 3}, {"start_level": -1}, {"num_outs": 2}, {"num_outs": 4}, {"num_outs": 4, "extra": "deconv"}],
)
def test_what_cannot_be_is_refused(kwargs):
    with pytest.raises(ModelError):
        FPN(CHANNELS, 6, **kwargs)

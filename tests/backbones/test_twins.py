"""Twins: published sizes, weights under the authors' names, and what the goldens do not show."""

from __future__ import annotations

import pytest
import torch
from timm.models import twins as timm_twins
from torch import Tensor, nn

import vitalloy
from vitalloy.backbones.twins import Twins

SHAPE = {
    "embed_dims": (16, 24, 32, 40),
    "num_heads": (1, 2, 4, 5),
    "mlp_ratios": (2, 2, 2, 2),
    "depths": (2, 1, 3, 2),
}


def randomised(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model.double().eval()


def timm_pair(window: int | None) -> tuple[nn.Module, Twins]:
    """timm's model of a small shape, whose names are the authors', and ours with the same weights."""
    windows = {"wss": (window,) * 4} if window else {}
    theirs = timm_twins.Twins(
        img_size=64, num_classes=5, sr_ratios=(8, 4, 2, 1), block_cls=timm_twins.Block, **SHAPE, **windows
    )
    ours = Twins(num_classes=5, window_size=window, **SHAPE).double().eval()
    return randomised(theirs), ours


def images(height: int, width: int) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("twins_pcpvt_small", 24_106_216),
        ("twins_pcpvt_base", 43.828),
        ("twins_pcpvt_large", 60.9),
        ("twins_svt_small", 24_060_776),
        ("twins_svt_base", 56.071),
        ("twins_svt_large", 99.2),
        ("polytwins_svt_small", 24_060_776),
        ("polytwins_svt_base", 56.071),
        ("polytwins_svt_large", 99.2),
    ],
)
def test_published_parameter_counts(name, count):
    with torch.device("meta"):
        model = vitalloy.create_model(name)
    found = sum(p.numel() for p in model.parameters())
    if isinstance(count, int):
        assert found == count
    else:  # millions, rounded or cut
        assert abs(found / 1e6 - count) < 10 ** -len(str(count).partition(".")[2])


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("size", [(64, 64), (100, 140), (224, 96)])
def test_windows_are_padded_as_in_timm(window, size):
    theirs, ours = timm_pair(window)
    vitalloy.load_checkpoint(ours, theirs.state_dict())
    x = images(*size)
    with torch.no_grad():
        assert torch.allclose(ours(x), theirs(x), atol=1e-10)


def test_the_authors_files_load(tmp_path):
    theirs, _ = timm_pair(7)
    x = images(64, 64)
    with torch.no_grad():
        wanted = theirs(x)
    for name, content in {
        "alt_gvt.pth": theirs.state_dict(),  # as released
        "checkpoint.pth": {"model": {f"module.{k}": v for k, v in theirs.state_dict().items()}, "epoch": 3},
    }.items():
        torch.save(content, tmp_path / name)
        fresh = Twins(num_classes=5, window_size=7, **SHAPE).double().eval()
        assert vitalloy.load_checkpoint(fresh, tmp_path / name) == vitalloy.checkpoints.Loaded()
        with torch.no_grad():
            assert torch.allclose(fresh(x), wanted, atol=1e-10)


def test_anchored_and_plain_form_load_each_others_weights():
    plain, poly = (randomised(vitalloy.create_model("twins_svt_nano", anchored=a)) for a in (False, True))
    assert vitalloy.load_checkpoint(poly, plain.state_dict()) == vitalloy.checkpoints.Loaded()
    assert vitalloy.load_checkpoint(plain, poly.state_dict()) == vitalloy.checkpoints.Loaded()


def test_only_stages_that_end_unreduced_anchor_the_next_patches():
    def anchored_embeds(**kwargs) -> list[bool]:
        model = vitalloy.create_model("twins_svt_nano", anchored=True, **kwargs)
        return [hasattr(embed, "anchor") for embed in model.patch_embeds]

    assert anchored_embeds() == [True, False, False, False]
    assert anchored_embeds(depths=(3, 2, 2, 2)) == [True, True, False, False]  # ends with a window block
    assert anchored_embeds(reductions=(4, 1, 2, 1)) == [True, False, True, False]


def test_positions_come_from_the_border():
    """Zero padding tells where a token is: without it, all tokens of an even image would be the same."""
    model = randomised(vitalloy.create_model("twins_svt_nano"))
    with torch.no_grad():
        tokens = model.forward_intermediates(torch.ones(1, 3, 32, 32).double(), intermediates_only=True)[0]
    assert (tokens[..., 0, 0] - tokens[..., 8, 8]).abs().max() > 1e-3
    assert torch.allclose(tokens[..., 6, 6], tokens[..., 8, 8])

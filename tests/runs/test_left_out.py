"""Pictures of what a reduced model left out lie on the patches that it had."""

from __future__ import annotations

import pytest
import torch

import vitalloy
from vitalloy.compression.reduction import reduce
from vitalloy.report import pictures
from vitalloy.runs.left_out import pictures_of


@pytest.mark.parametrize("name", ["vit_nano", "cvt_nano", "pvt_v2_nano"])
def test_merged_patches_lie_on_the_grid_that_was_slimmed(name, tmp_path, monkeypatch):
    torch.manual_seed(0)
    images, owners, merged = torch.randn(8, 3, 32, 32), [], pictures.merged
    model = vitalloy.create_model(name, num_classes=10, img_size=32).eval()
    small = reduce(model, images, "sit", macs=0.8, epochs=0)
    monkeypatch.setattr(pictures, "merged", lambda image, owner: merged(image, owners.append(owner) or owner))
    rows = pictures_of(small, images, {"mean": (0.5,) * 3, "std": (0.5,) * 3}, tmp_path / "images" / "sit")
    assert len(rows) == len(owners) == 4 and all((tmp_path / row["file"]).is_file() for row in rows)
    for owner in owners:
        height, width = owner.shape
        assert height == width > 1
        below, beside = ((owner[1:] == owner[:-1]).mean(), (owner[:, 1:] == owner[:, :-1]).mean())
        assert below > 0.1 and beside > 0.1, "each mixture starts at patches that lie together"

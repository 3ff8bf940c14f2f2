"""What leaves work out is a bundle that can be kept, loaded and kept again, whatever the steps."""

from __future__ import annotations

import pytest
import torch

import vitalloy
from vitalloy.compression.reduction import reduce, steps_of
from vitalloy.errors import CompressionError

STEPS = {
    "sit": {"macs": 0.8, "epochs": 0},
    "lpvit": {"macs": 0.8, "epochs": 0},
    "sparsifiner": {"epochs": 0, "predictor_epochs": 0, "kernel": "dense"},
    "lgvit": {"epochs": 0},
}


@pytest.mark.parametrize("names", [*([name] for name in STEPS), [*STEPS]], ids="+".join)
def test_a_bundle_is_kept_and_loaded_any_number_of_times(names, tmp_path):
    torch.manual_seed(0)
    images = torch.randn(8, 3, 32, 32)
    made = vitalloy.create_model("vit_nano", num_classes=10, img_size=32, depth=3).eval()
    for name in names:
        made = reduce(made, images, name, **STEPS[name])
    first = vitalloy.load(vitalloy.save(made, tmp_path / "first"))
    second = vitalloy.load(vitalloy.save(first, tmp_path / "second"))
    with torch.no_grad():
        assert torch.equal(first(images), made(images)) and torch.equal(second(images), made(images))
    assert [step["method"] for step in steps_of(second)] == names
    assert steps_of(first) == steps_of(second)
    assert all(p.requires_grad for p in second.parameters())


def test_what_leaves_no_work_out_is_refused():
    model, images = vitalloy.create_model("vit_nano", num_classes=10, img_size=32, depth=1), torch.randn(8, 3, 32, 32)
    with pytest.raises(CompressionError, match="leaves no work out"):
        reduce(model, images, "easyquant")
    with pytest.raises(CompressionError, match="fused"):
        reduce(model.eval().fuse(), images, "sit")
    with pytest.raises(CompressionError, match="there is no method"):
        reduce(model, images, "magic")

"""Places through which everything flows: where methods cut, slim and end a model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import vitalloy
from vitalloy.benchmark import count
from vitalloy.compression.trunk import Segment, hooked, macs, nearest, points

# (model, places by their names and layouts)
KNOWN = {
    "vit_nano": [("patch_embed", "pair"), ("norm_pre", "tokens"), *((f"blocks.{i}", "tokens") for i in range(6))],
    "swin_nano": [("layers.0.blocks.0", "map_last"), ("layers.0", "map_last"), ("layers.3", "map_last")],
    "cvt_nano": [("stage0.patch_embed", "map"), ("stage1.blocks.0", "tokens"), ("stage2.blocks.0", "tokens")],
    "pvt_v2_nano": [("patch_embed3", "pair"), ("block3.0", "tokens"), ("block4.1", "tokens")],
    "efficientformer_nano": [("patch_embed2", "map"), ("block3.0", "map"), ("norm4", "map")],
    "nextvit_nano": [("stem", "map"), *((f"features.{i}", "map") for i in range(7))],
}


def build(name: str, size: int = 32) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = vitalloy.create_model(name, num_classes=10, img_size=size).eval()
    return model, torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", KNOWN)
def test_a_state_taken_and_put_back_in_pieces_gives_the_models_logits(name):
    model, images = build(name)
    found = points(model, images[:1])
    assert set(KNOWN[name]) <= {(p.name, p.layout) for p in found}
    shares = [p.macs for p in found]
    assert shares == sorted(shares) and shares[0] > 0 and shares[-1] <= 1
    shape = images.shape[1:]
    with torch.no_grad():
        wanted = model(images)
        for start, end in zip([None, *found], [*found, None], strict=True):
            state = images if start is None else Segment(model, None, start, shape)(images)
            last = Segment(model, start, end, shape, found)(state)
            logits = last if end is None else Segment(model, end, None, shape)(last)
            torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("name", KNOWN)
def test_reading_and_writing_a_state_are_inverse_and_images_can_be_taken_out(name):
    model, images = build(name)
    stay = torch.tensor([2, 0])

    def check(point, output):
        tokens = point.read(output)
        assert tokens.patches.shape[0] == 3 and tokens.patches.shape[2] == point.channels
        assert tokens.grid == point.grid and tokens.patches.shape[1] == point.grid[0] * point.grid[1]
        assert (0 if tokens.prefix is None else tokens.prefix.shape[1]) == point.prefix
        again = point.write(output, tokens.patches)
        as_tensor = (lambda state: state[0]) if point.layout == "pair" else (lambda state: state)
        assert torch.equal(as_tensor(again), as_tensor(output))
        return point.images(output, stay)

    with torch.no_grad():
        wanted = model(images)[stay]
        for point in points(model, images[:1]):
            with hooked(model, {point.name: lambda out, p=point: check(p, out)}):
                torch.testing.assert_close(model(images), wanted, atol=1e-4, rtol=1e-4)


def test_two_branches_have_no_place_through_which_everything_flows():
    model, images = build("crossvit_nano")
    assert points(model, images[:1]) == []


def test_a_skip_past_a_module_makes_it_no_point():
    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
            self.head = nn.Linear(3, 2)

        def forward(self, x):
            first = self.blocks[0](x)
            return self.head((first + self.blocks[2](self.blocks[1](first))).mean((2, 3)))

    found = points(Skipping(), torch.zeros(1, 3, 8, 8))
    assert [p.name for p in found] == ["blocks.0"]


def test_work_is_counted_as_the_benchmark_counts_it():
    model, images = build("cvt_nano")
    assert macs(model, images[:1]) == count(model, (3, 32, 32)).macs
    assert macs(model, images) == 3 * macs(model, images[:1])
    assert "nearest is 0.4" in str(nearest(0.1, [0.4, 0.9], "macs"))


def test_pieces_of_a_model_whose_modules_have_hooks_run_these_once():
    """A hook that changes a module's output, as slimming does, belongs to the piece that ends there and to no other."""
    model, images = build("vit_nano")
    model.blocks[2].register_forward_hook(lambda _m, _a, out: torch.cat([out[:, :1], out[:, 1::4]], 1))
    found, shape = points(model, images[:1]), images.shape[1:]
    assert [p.grid for p in found if p.name in ("blocks.1", "blocks.2")] == [(8, 8), (4, 4)]
    with torch.no_grad():
        wanted = model(images)
        for point in found:
            state = Segment(model, None, point, shape, found)(images)
            torch.testing.assert_close(Segment(model, point, None, shape, found)(state), wanted, atol=1e-4, rtol=1e-4)
    assert len(model.blocks[2]._forward_hooks) == 1 and "forward" not in vars(model.blocks[2])

"""Swin against timm's on shared weights, the authors' file layout, and inputs of other sizes."""

from __future__ import annotations

import pytest
import timm
import torch

from vitalloy import create_model
from vitalloy.layers.attention import Attend
from vitalloy.layers.sockets import find

SMALL = {"patch_size": 2, "window_size": 4, "embed_dim": 24, "depths": (2, 2, 2), "num_heads": (1, 2, 4)}


def pair(img_size: int, **kwargs):
    """timm's model and ours with its weights, in float64."""
    theirs = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=img_size, num_classes=5, **SMALL, **kwargs
    ).double()
    ours = create_model("swin_nano", img_size=img_size, num_classes=5, **SMALL).double()
    for table in (p for n, p in theirs.named_parameters() if "table" in n):
        torch.nn.init.normal_(table)
    ours.load_state_dict(ours.convert_state(theirs.state_dict()))
    return theirs.eval(), ours.eval()


@pytest.mark.parametrize("img_size", [32, 44, 58])
def test_same_numbers_as_timm(img_size):
    theirs, ours = pair(img_size)
    x = torch.randn(2, 3, img_size, img_size, dtype=torch.float64)
    assert torch.allclose(ours(x), theirs(x), atol=1e-10)
    maps, wanted = (m.forward_intermediates(x, intermediates_only=True, norm=True) for m in (ours, theirs))
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(maps, wanted, strict=True))


@pytest.mark.parametrize("size", [(48, 80), (34, 70)])
def test_another_input_size_computes_what_a_model_built_for_it_does(size):
    theirs, ours = pair(32, strict_img_size=False)
    built = create_model("swin_nano", img_size=size, num_classes=5, **SMALL).double().eval()
    built.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    assert torch.equal(ours(x), built(x))
    # timm decides by the constructor's image size that the last level, one window there, is never shifted
    maps, wanted = (m.forward_intermediates(x, indices=[0, 1], intermediates_only=True) for m in (ours, theirs))
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(maps, wanted, strict=True))


def test_any_size_runs_even_below_one_window():
    model = create_model("swin_nano", num_classes=3).eval()
    for size in ((7, 90), (33, 31), (3, 3)):
        assert model(torch.randn(1, 3, *size)).isfinite().all()


def test_the_authors_file_layout_loads():
    model = create_model("swin_nano", num_classes=5)
    published = {}
    for key, value in model.state_dict().items():
        part = key.split(".")
        if part[:1] == ["layers"] and part[2] == "downsample":
            key = ".".join(["layers", str(int(part[1]) - 1), *part[2:]])
        published[key] = value + 1
    published["layers.0.blocks.1.attn_mask"] = torch.zeros(16, 16, 16)
    published["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16)
    converted = model.convert_state(published)
    assert all(torch.equal(converted.pop(key), value + 1) for key, value in model.state_dict().items())
    assert not converted


def test_tables_of_another_window_are_resampled():
    source, target = create_model("swin_nano"), create_model("swin_nano", img_size=56, window_size=7)
    target.load_state_dict(target.convert_state(source.state_dict()))
    table = target.layers[0].blocks[0].attn.relative_position_bias_table
    assert table.shape == (169, 1)
    old = source.layers[0].blocks[0].attn.relative_position_bias_table
    assert table[84].item() == pytest.approx(old[24].item(), abs=1e-6)  # offset zero stays in the middle


def test_every_attention_goes_through_the_socket():
    model = create_model("swin_nano")
    assert len(find(model, Attend)) == 7


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("swin_tiny_patch4_window7_224", 28_288_354),
        ("swin_small_patch4_window7_224", 49_606_258),
        ("swin_base_patch4_window7_224", 87_768_224),
        ("swin_large_patch4_window7_224", 196_532_476),
    ],
)
def test_published_parameter_counts(name, count):
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == count


def test_export_keeps_the_batch_free_and_checkpointing_the_gradients():
    model = create_model("swin_nano", num_classes=3, img_size=36, depths=(2, 2), num_heads=(1, 2)).eval()
    x = torch.randn(2, 3, 36, 36)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False).module()
    more = torch.randn(3, 3, 36, 36)
    assert torch.allclose(program(more), model(more), atol=1e-5)
    grads = []
    for on in (False, True):
        model.train().zero_grad()
        model.set_grad_checkpointing(on)
        model(x).square().sum().backward()
        grads.append(model.layers[1].blocks[1].attn.relative_position_bias_table.grad.clone())
    assert grads[0].abs().sum() > 0 and torch.allclose(*grads)

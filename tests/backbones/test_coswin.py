"""CoSwin: its size, the authors' file, its relation to Swin, other inputs, folding and its schedule."""

from __future__ import annotations

import copy
import re

import pytest
import torch

from vitalloy import create_model, load_checkpoint
from vitalloy.layers.window_attention import WindowAttention
from vitalloy.training.schedules import warmup_cosine


def parameters(name: str, num_classes: int) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in create_model(name, num_classes=num_classes).parameters())


@pytest.mark.parametrize(
    ("name", "num_classes", "count"),
    [
        ("coswin_cifar10", 10, 23_460_300),
        ("coswin_cifar100", 100, 23_494_950),
        ("coswin_tiny_imagenet", 200, 23_536_906),
        ("coswin_no_local", 10, 7_048_612),
    ],
)
def test_published_parameter_counts(name, num_classes, count):
    assert parameters(name, num_classes) == count


def test_the_wide_swin_is_as_large_as_coswin():
    assert parameters("coswin_no_local_wide", 10) == pytest.approx(parameters("coswin_cifar10", 10), rel=0.01)


def test_the_authors_file_loads(tmp_path):
    model = create_model("coswin_nano", num_classes=5).eval()
    x = torch.randn(2, 3, 32, 32)
    published = {}
    for key, value in model.state_dict().items():
        key = re.sub(r"^layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", key)
        key = key.replace("local_weight", "convInfluenceWeight")
        published[key.replace("local.conv1", "conv.conv.0").replace("local.conv2", "conv.conv.2")] = value
    assert sum("convInfluenceWeight" in key for key in published) == 6 and "layers.1.downsample.norm.bias" in published
    for s, grid in enumerate((16, 8)):
        published[f"layers.{s}.blocks.1.attn_mask"] = torch.zeros((grid // 4) ** 2, 16, 16)
        published[f"layers.{s}.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.long)
    torch.save({"epoch": 99, "model_state_dict": published, "optimizer_state_dict": {}}, tmp_path / "coswin.pt")
    torch.manual_seed(7)
    fresh = create_model("coswin_nano", num_classes=5).eval()
    load_checkpoint(fresh, tmp_path / "coswin.pt")
    assert torch.equal(fresh(x), model(x))


def test_a_branch_of_no_weight_leaves_swin():
    cfg = {"embed_dim": 24, "depths": (2, 2, 2), "num_heads": (1, 2, 4), "num_classes": 5}
    swin = create_model("swin_nano", **cfg, mlp_ratio=2.0).double().eval()
    without = create_model("coswin_nano", **cfg, local_branch=False).double().eval()
    model = create_model("coswin_nano", **cfg).double().eval()
    without.load_state_dict(swin.state_dict())
    missing = load_checkpoint(model, swin.state_dict(), strict=False).missing
    assert missing and all(".local" in name for name in missing)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert torch.equal(without(x), swin(x)) and not torch.allclose(model(x), swin(x), atol=1e-4)
    with torch.no_grad():
        for block in (b for stage in model.layers for b in stage.blocks):
            assert block.local_weight.sigmoid().item() == pytest.approx(0.622, abs=1e-3)
            block.local_weight.fill_(-1e9)
    assert torch.allclose(model(x), swin(x), atol=1e-12)


@pytest.mark.parametrize("size", [(24, 64), (21, 38)])
def test_another_input_size_computes_what_a_model_built_for_it_does(size):
    model = create_model("coswin_nano", num_classes=5).eval()
    built = create_model("coswin_nano", num_classes=5, img_size=size).eval()
    built.load_state_dict(built.convert_state(model.state_dict()))
    x = torch.randn(1, 3, *size)
    maps, wanted = (m.forward_intermediates(x, indices=[0], intermediates_only=True)[0] for m in (model, built))
    assert maps.shape[-2:] == (-(-size[0] // 2), -(-size[1] // 2))
    assert torch.allclose(maps, wanted, atol=1e-6)


def test_folding_reads_tables_and_weights_once():
    model = create_model("coswin_nano", num_classes=5).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    kept, x = copy.deepcopy(model), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    model.fuse()
    assert not any(name.endswith("local_weight") for name, _ in model.named_parameters())
    assert torch.allclose(model(x), kept(x), atol=1e-12)
    below = x[..., :6]  # narrower than a window: the ready bias does not fit
    assert torch.allclose(model(below), kept(below), atol=1e-12)
    assert model.state_dict().keys() == model.float().state_dict().keys()
    with torch.no_grad():
        for attention in (m for m in model.modules() if isinstance(m, WindowAttention)):
            attention.relative_position_bias_table.zero_()
    assert torch.allclose(model(x.float()), kept(x).float(), atol=1e-4), "a table was read again"


def test_the_first_step_is_cold_even_without_warmup():
    assert [warmup_cosine(4, 0, 0.1)(t) for t in (0, 2)] == pytest.approx([0.1, 0.55])
    assert warmup_cosine(4, 0, 0.1, cold_start=False)(0) == 1
    assert [warmup_cosine(6, 2, 0.1)(t) for t in (0, 1, 2, 6, 9)] == pytest.approx([0.1, 0.55, 1, 0.1, 0.1])

"""What the goldens do not show of the UniFormer for clips: inflation, divided attention, time itself."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import vitalloy
from vitalloy.backbones.uniformer_video import DividedBlock, inflate, inflate_kernel

TINY = {"depths": (1, 1, 2, 1), "embed_dims": (8, 16, 32, 64), "head_dim": 16, "num_classes": 5}


@pytest.fixture
def image_model() -> nn.Module:
    torch.manual_seed(0)
    model = vitalloy.create_model("uniformer_small", **TINY).double()
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=p[0].numel() ** -0.5)
    for _ in range(3):
        model(torch.randn(4, 3, 64, 64, dtype=torch.float64))
    return model.eval()


def video_from(image_model: nn.Module, centre: bool) -> nn.Module:
    model = vitalloy.create_model("uniformer_video_small", **TINY).double().eval()
    assert vitalloy.load_checkpoint(model, inflate(image_model.state_dict(), model, centre)) == (
        vitalloy.checkpoints.Loaded()
    )
    return model


def still(image: torch.Tensor, frames: int) -> torch.Tensor:
    return image.unsqueeze(2).expand(-1, -1, frames, -1, -1)


@pytest.mark.parametrize("frames", [1, 4, 7])
def test_centre_inflation_answers_a_still_clip_as_the_image_model(image_model, frames):
    image = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    model = video_from(image_model, centre=True)
    with torch.no_grad():
        wanted = image_model(image)
        torch.testing.assert_close(model(still(image, frames)), wanted, rtol=0, atol=1e-12)
        torch.testing.assert_close(model.fuse()(still(image, frames)), wanted, rtol=0, atol=1e-11)


def test_spread_inflation_comes_closer_on_longer_clips(image_model):
    image = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    model = video_from(image_model, centre=False)
    with torch.no_grad():
        off = [(model(still(image, t)) - image_model(image)).abs().mean().item() for t in (2, 8, 32)]
    assert off[0] > off[1] > off[2] > 1e-3


def test_kernels_are_inflated_whole():
    weight = torch.randn(6, 4, 2, 2)
    assert torch.equal(inflate_kernel(weight, 1), weight.unsqueeze(2))
    torch.testing.assert_close(inflate_kernel(weight, 4).sum(2), weight)
    centred = inflate_kernel(weight, 4, centre=True)
    assert torch.equal(centred[:, :, 2], weight) and not centred[:, :, [0, 1, 3]].any()


def test_a_classifier_for_other_classes_is_left_out(image_model):
    model = vitalloy.create_model("uniformer_video_small", **{**TINY, "num_classes": 7})
    state = inflate(image_model.state_dict(), model)
    assert not any(name.startswith("head") for name in state)
    loaded = vitalloy.load_checkpoint(model, state, reset_head=True)
    assert set(loaded.reset) == {"head.weight", "head.bias"} and not loaded.missing


def test_the_authors_video_files_load():
    model = vitalloy.create_model("uniformer_video_small", **TINY, split=True)
    file = {}
    for name, value in model.state_dict().items():
        name = name.replace(".pos_embed.conv.", ".pos_embed.").replace(".dwconv.", ".attn.").replace("block", "blocks")
        local = name.startswith(("blocks1", "blocks2")) and name.endswith("weight")
        file[name] = value[..., None, None, None] if local and value.ndim == 2 else value
    assert file["blocks1.0.conv1.weight"].ndim == 5 and "blocks3.1.t_attn.qkv.weight" in file
    assert vitalloy.load_checkpoint(model, file) == vitalloy.checkpoints.Loaded()


def test_divided_attention_starts_without_time_and_its_switch_keeps_it():
    torch.manual_seed(0)
    block, x = DividedBlock(16, 2, 2.0, True, 0.0, 0.0).double(), torch.randn(1, 16, 4, 3, 3, dtype=torch.float64)
    kept = DividedBlock(16, 2, 2.0, True, 0.0, 0.0, time_residual=True).double()
    kept.load_state_dict(block.state_dict())
    assert torch.equal(block(x), kept(x))
    for module in (block, kept):
        nn.init.normal_(module.t_attn.qkv.weight, generator=torch.Generator().manual_seed(1))
    assert not torch.allclose(block(x), kept(x))


def test_models_know_their_clips():
    model = vitalloy.create_model("uniformer_video_nano", img_size=(48, 64), in_chans=1)
    assert model.default_cfg["input_size"] == (1, 8, 48, 64)
    assert model(torch.randn(2, 1, 5, 48, 64)).shape == (2, 1000)
    maps = vitalloy.create_model("uniformer_video_nano", features_only=True)(torch.randn(1, 3, 8, 32, 32))
    assert [tuple(m.shape[2:]) for m in maps] == [(4, 16, 16), (4, 8, 8), (4, 4, 4), (4, 2, 2)]


def moving(images: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips (B, 1, 4, 16, 16) of images that start anywhere and move in a circle, and which way they go."""
    labels, starts = (torch.randint(n, (len(images),), generator=generator) for n in (2, 16))
    canvas = nn.functional.pad(images, (4, 4, 4, 4))
    frames = []
    for t in range(4):
        columns = (torch.arange(16) - (starts + t * (4 * labels - 2))[:, None]) % 16
        frames.append(canvas.gather(2, columns[:, None].expand(-1, 16, -1)))
    return torch.stack(frames, 1).unsqueeze(1), labels


def test_learns_which_way_a_digit_moves():
    """No single frame tells, and a clip run backwards is the other way."""
    digits, generator = torch.tensor(load_digits().images / 16, dtype=torch.float32), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = vitalloy.create_model(
        "uniformer_video_nano", num_classes=2, in_chans=1, depths=(1, 1, 1, 1), embed_dims=(8, 16, 32, 32), head_dim=16
    )
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(40):
        clips, labels = moving(digits[torch.randint(1000, (24,), generator=generator)], generator)
        loss = nn.functional.cross_entropy(model(clips), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    clips, labels = moving(digits[1000:1128], generator)
    model.eval()
    with torch.no_grad():
        right, backwards = ((model(x).argmax(1) == labels).float().mean() for x in (clips, clips.flip(2)))
    assert right > 0.9 and backwards < 0.1

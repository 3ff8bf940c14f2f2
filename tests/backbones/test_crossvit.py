"""What the goldens do not show of CrossViT: counts, timm's files, other sizes, the exchange of class tokens."""

from __future__ import annotations

import pytest
import timm
import torch

import vitalloy
from vitalloy.errors import ModelError


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("crossvit_base_224", 105_025_232),
        ("crossvit_15_dagger_224", 28_209_008),
        ("crossvit_18_dagger_224", 44_266_976),
        ("crossvit_15_dagger_384", 28_500_080),
        ("crossvit_18_dagger_384", 44_606_560),
    ],
)
def test_published_parameter_counts(name, count):
    with torch.device("meta"):
        model = vitalloy.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("size", [(240, 240), (192, 192)])
def test_timm_files_load(size):
    theirs = timm.create_model("crossvit_tiny_240", num_classes=5).eval()
    ours = vitalloy.create_model("crossvit_tiny_224", num_classes=5).eval()
    assert vitalloy.load_checkpoint(ours, theirs.state_dict()) == vitalloy.checkpoints.Loaded()
    x = torch.randn(1, 3, *size)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-4)


def nano(**kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    model = vitalloy.create_model("crossvit_nano", **{"num_classes": 5, **kwargs}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def published(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our state dict under the authors' names."""
    renamed = {}
    for name, tensor in state.items():
        name = name.replace(".0.norm1.", ".norm1.") if ".fusion." in name else name
        name = name.replace(".0.attn.", ".attn.") if ".fusion." in name else name
        if ".wkv." in name:
            for key, half in zip((".wk.", ".wv."), tensor.chunk(2), strict=True):
                renamed[name.replace(".wkv.", key)] = half
        elif name.startswith("head."):
            halves = tensor.split((48, 96), 1) if tensor.ndim == 2 and tensor.shape[1] == 144 else tensor.unbind()
            for b, half in enumerate(halves):
                renamed[name.replace("head", f"head.{b}")] = half
        else:
            renamed[name] = tensor
    return renamed


def test_logits_are_the_mean_of_the_authors_two_heads():
    model, x = nano(), torch.randn(2, 3, 32, 32)
    state = published(model.state_dict())
    tokens = model.forward_features(x)[:, 0].split((48, 96), -1)
    logits = [token @ state[f"head.{b}.weight"].T + state[f"head.{b}.bias"] for b, token in enumerate(tokens)]
    torch.testing.assert_close(model(x), (logits[0] + logits[1]) / 2)
    fresh = nano()
    for p in fresh.parameters():
        p.data.zero_()
    assert vitalloy.load_checkpoint(fresh, state) == vitalloy.checkpoints.Loaded()
    assert torch.equal(fresh(x), model(x))
    assert isinstance(model.fuse().head, torch.nn.Linear)


def test_both_heads_of_a_file_for_other_classes_are_reset():
    state = published(nano().state_dict())
    model = nano(num_classes=7)
    loaded = vitalloy.load_checkpoint(model, state, reset_head=True)
    assert set(loaded.reset) == {"head.weight", "head.bias"} and not loaded.missing and not loaded.unexpected


def test_a_pooling_model_takes_a_published_file_without_the_last_exchange():
    whole, pooling = nano(), nano(global_pool="avg")
    assert vitalloy.load_checkpoint(pooling, published(whole.state_dict())) == vitalloy.checkpoints.Loaded()
    x = torch.randn(1, 3, 32, 32)
    for a, b in zip(*(m.forward_intermediates(x, intermediates_only=True) for m in (whole, pooling)), strict=True):
        assert torch.equal(a, b)


def test_the_exchange_sees_the_other_patches_as_a_set_and_changes_class_tokens_only():
    block = nano().blocks[0]
    small, large = torch.randn(2, 65, 48), torch.randn(2, 26, 96)
    asked = block.ask(0, small, large)
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(25)])
    torch.testing.assert_close(block.ask(0, small, large[:, order]), asked)
    assert torch.equal(asked[:, 1:], small[:, 1:])
    other_token = torch.cat([torch.randn(2, 1, 96), large[:, 1:]], 1)
    assert torch.equal(block.ask(0, small, other_token), asked), "the other class token was seen"
    assert not torch.allclose(block.ask(0, small, -large), asked)


def test_images_are_brought_to_the_size_of_the_model():
    model = nano(fixed_size=True)
    rectangle = torch.randn(1, 3, 32, 50)  # as high as the model's images: the published code fails on it
    maps = model.forward_intermediates(rectangle, intermediates_only=True)
    assert all(m.shape == (1, 144, 8, 8) for m in maps)
    free = nano(fixed_size=False)
    square = torch.randn(1, 3, 32, 32)
    assert torch.equal(model(square), free(square))
    assert free.forward_intermediates(rectangle, intermediates_only=True)[0].shape == (1, 144, 8, 12)


def test_dense_features_keep_the_proportions_of_the_image():
    args = {"embed_dims": (24, 48), "depths": ((1, 1, 0),) * 3, "num_heads": (3, 3)}
    model = vitalloy.create_model("crossvit_tiny_224", features_only=True, out_indices=(0, 2), **args).eval()
    assert [m.shape for m in model(torch.randn(1, 3, 120, 180))] == [(1, 72, 10, 15)] * 2
    assert model.feature_info.reduction() == [12, 12]


def test_tables_are_resized_at_loading():
    state = nano().state_dict()
    model = nano(img_size=(48, 32))
    assert [p.shape[1] for p in model.pos_embed] == [1 + 12 * 8, 1 + 8 * 5]
    vitalloy.load_checkpoint(model, state)
    for b in range(2):
        torch.testing.assert_close(model.pos_embed[b][:, 0], state[f"pos_embed.{b}"][:, 0])
    assert torch.equal(model.cls_token[1], state["cls_token.1"])


def test_tables_and_tokens_are_spared_from_weight_decay():
    assert nano().no_weight_decay() == {"cls_token.0", "cls_token.1", "pos_embed.0", "pos_embed.1"}


def test_three_convolutions_need_a_known_patch_size():
    with pytest.raises(ModelError, match="12 or 16"):
        vitalloy.create_model("crossvit_nano", multi_conv=True)

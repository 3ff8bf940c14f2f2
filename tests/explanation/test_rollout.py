"""Attention rollout on attention that was made by hand."""

from __future__ import annotations

import pytest
import torch

from vitalloy import create_model
from vitalloy.errors import ModelError
from vitalloy.explanation.rollout import RecordedAttend, attention_rollout, roll, supports_rollout
from vitalloy.layers.attention import Attend
from vitalloy.layers.slimming import TokenSlimming
from vitalloy.layers.sockets import find


def planted(cell: int, height: int = 4, width: int = 4, **kwargs) -> tuple[torch.nn.Module, torch.Tensor]:
    """A ViT without positions whose queries all attend to one patch, and the image that has it."""
    model = create_model("vit_nano", num_classes=3, img_size=(4 * height, 4 * width), **kwargs).eval()
    images = torch.zeros(1, 3, 4 * height, 4 * width)
    row, column = divmod(cell, width)
    images[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 1.0
    with torch.no_grad():
        for p in (model.pos_embed, model.patch_embed.proj.weight, model.patch_embed.proj.bias):
            p.zero_()
        model.patch_embed.proj.weight[0] = 0.2  # the bright patch alone has the first channel
        for block in model.blocks:
            for p in block.parameters():
                p.zero_()
            block.norm1.weight.fill_(1)
            wide = model.embed_dim
            for head in range(3):
                at = head * wide // 3
                block.attn.qkv.bias[at] = 20.0  # every query asks for ...
                block.attn.qkv.weight[wide + at, 0] = 1.0  # ... the first channel
    return model, images


def test_recorded_attention_is_attention_and_its_rows_are_distributions():
    q, k, v, bias = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 6, 4), torch.randn(2, 3, 6, 4), torch.randn(5, 6)
    recorder = RecordedAttend(0.0, record := [])
    assert torch.allclose(recorder(q, k, v, 0.7, bias), Attend()(q, k, v, 0.7, bias), atol=1e-5)
    assert torch.allclose(recorder(q, k, v), Attend()(q, k, v), atol=1e-5)
    assert record[0].shape == (2, 5, 6)
    assert torch.allclose(record[0].sum(-1), torch.ones(2, 5))


def test_rolling_a_hand_made_attention():
    """Token 0 looks at 1 alone, 1 at 2 alone, 2 at itself; half of everything stays in place at every layer."""
    look = torch.tensor([[[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]])
    wanted = torch.tensor([[[0.25, 0.5, 0.25], [0.0, 0.25, 0.75], [0.0, 0.0, 1.0]]])
    assert torch.equal(roll([look, look]), wanted)
    back = look.flip(1, 2)
    assert torch.allclose(roll([look, back]), (back + torch.eye(3)) / 2 @ ((look + torch.eye(3)) / 2))
    assert not torch.equal(roll([look, back]), roll([back, look]))
    drawn = [torch.randn(2, 17, 17).softmax(-1) for _ in range(4)]
    assert torch.allclose(roll(drawn).sum(-1), torch.ones(2, 17))


@pytest.mark.parametrize(
    ("cell", "shape", "kwargs"),
    [
        (6, (4, 4), {}),
        (7, (3, 5), {}),  # not square
        (6, (4, 4), {"distilled": True}),
        (6, (4, 4), {"global_pool": "avg"}),
    ],
)
def test_a_planted_patch_is_found(cell, shape, kwargs):
    model, images = planted(cell, *shape, **kwargs)
    model.reset_classifier(0)
    maps = attention_rollout(model, images)
    assert maps.shape == (1, *shape) and maps.flatten().argmax() == cell
    others = maps.flatten()[torch.arange(maps.numel()) != cell]
    assert maps.amax() == 1 and others.max() < 0.1


def test_where_patches_are_averaged_the_class_token_does_not_count():
    model, images = planted(6, global_pool="avg", depth=1)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[: model.embed_dim, 1] = -100.0  # queries that have the second channel ...
        model.cls_token.zero_()
        model.cls_token[..., 1] = 1.0  # ... look elsewhere; only the class token has it
    assert attention_rollout(model, images).flatten().argmax() == 6


def test_the_model_is_left_as_it_was():
    model = create_model("vit_nano", depth=2).eval()
    x = torch.randn(1, 3, 32, 32)
    before, wanted = find(model, Attend), model(x)
    attention_rollout(model, x)
    assert find(model, Attend) == before and torch.equal(model(x), wanted)
    assert all(type(m) is Attend for m in before.values())


def test_only_plain_columns_support_it():
    assert supports_rollout(create_model("vit_nano"))
    assert supports_rollout(create_model("vit_tiny_patch16_224.augreg_in21k", depth=2))
    for name in ("cvt_nano", "swin_nano", "pvt_v2_nano", "convit_nano", "resnet10t"):
        model = create_model(name).eval()
        assert not supports_rollout(model)
    with pytest.raises(ModelError, match="ResNet"):
        attention_rollout(model, torch.randn(1, 3, 32, 32))


def test_the_flow_passes_through_merged_tokens_back_to_the_patches_they_came_from():
    """Behind blocks that leave tokens alone, the one mixture that the class token sees is that of one patch."""
    model, images = planted(6)
    model.blocks[0].slim = TokenSlimming(model.embed_dim, 4, prefix=1)
    model.blocks[0].register_forward_hook(lambda block, _args, out: block.slim(out))
    mixing = torch.zeros(1, 4, 16)
    mixing[0, range(4), [6, 1, 2, 3]] = 1.0
    model.blocks[0].slim.mixing = lambda patches: mixing
    found = attention_rollout(model, images)
    assert found.shape == (1, 4, 4) and found.flatten().argmax() == 6
    seen = found.flatten().nonzero().flatten().tolist()
    assert set(seen) <= {1, 2, 3, 6}  # patches that went into no mixture reach nothing behind

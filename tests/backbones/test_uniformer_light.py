"""What the golden does not show of the light UniFormer: what slimming leaves alone, both answers, robustness."""

from __future__ import annotations

import pytest
import torch

import vitalloy
from vitalloy.backbones.uniformer_light import ScoringAttention, SlimmingBlock, shrink

TINY = {"depths": (1, 1, 3, 2), "embed_dims": (8, 16, 32, 64), "head_dim": 16, "num_classes": 5}


def block(keep: float = 0.5, layer_scale: float | None = None) -> SlimmingBlock:
    torch.manual_seed(0)
    made = SlimmingBlock(16, 2, 3.0, True, 0.0, 0.0, layer_scale, keep, 0.5).double().eval()
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return made


@pytest.mark.parametrize("layer_scale", [None, 0.1])
def test_the_other_tokens_all_change_by_what_the_merged_one_got(layer_scale):
    slimming, x = block(layer_scale=layer_scale), torch.randn(2, 16, 4, 6, dtype=torch.float64)
    scores = torch.rand(2, 24, dtype=torch.float64)
    _, out, renewed = slimming(torch.randn(2, 1, 16, dtype=torch.float64), x, scores)
    change = (out - slimming.pos_embed(x)).flatten(2)  # (B, C, N)
    for i in range(2):
        order = scores[i].argsort(descending=True)
        others = change[i][:, order[12:]]
        torch.testing.assert_close(others, others[:, :1].expand(-1, 12))
        assert (change[i][:, order[:12]] - others[:, :1]).abs().amin(1).min() > 0
        assert torch.equal(renewed[i, order[12:]], scores[i, order[12:]])
        assert (renewed[i, order[:12]] != scores[i, order[:12]]).all()


def test_the_merged_token_is_the_mean_of_the_others_by_score():
    slimming, x = block(), torch.randn(1, 16, 2, 4, dtype=torch.float64)
    scores = torch.tensor([[0.9, 0.1, 0.8, 0.3, 0.7, 0.0, 0.6, 0.2]], dtype=torch.float64)
    seen = []
    slimming.norm1.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    slimming(torch.zeros(1, 1, 16, dtype=torch.float64), x, scores)
    tokens = slimming.pos_embed(x).flatten(2).mT[0]
    merged = (0.1 * tokens[1] + 0.3 * tokens[3] + 0.2 * tokens[7]) / 0.6
    assert seen[0].shape == (1, 6, 16)
    torch.testing.assert_close(seen[0][0, -1], merged)


def test_scores_are_the_class_token_s_attention():
    attention, x = ScoringAttention(16, 2).double(), torch.randn(3, 7, 16, dtype=torch.float64)
    qkv = attention.qkv(x).reshape(3, 7, 3, 2, 8).permute(2, 0, 3, 1, 4)
    weights = (qkv[0] @ qkv[1].mT / 8**0.5).softmax(-1)
    out, scores = attention(x)
    torch.testing.assert_close(scores, weights.mean(1)[:, 0])
    torch.testing.assert_close(out, attention.proj((weights @ qkv[2]).transpose(1, 2).flatten(2)))


def test_shrinking_keeps_the_sum_of_the_scores():
    scores = torch.rand(2, 5 * 6)
    shrunk = shrink(scores, (5, 6))
    assert shrunk.shape == (2, 2 * 3)
    torch.testing.assert_close(shrunk.sum(1), scores.sum(1))


def test_scores_that_are_all_zero_make_no_nan():
    scores = torch.zeros(1, 8, dtype=torch.float64)
    out = block()(torch.randn(1, 1, 16, dtype=torch.float64), torch.randn(1, 16, 2, 4, dtype=torch.float64), scores)
    assert all(part.isfinite().all() for part in out)


def test_two_answers_in_training_and_the_first_in_evaluation():
    model = vitalloy.create_model("uniformer_xxs_224", **TINY)
    x = torch.randn(2, 3, 64, 64)
    by_map, by_class = model.train()(x)
    assert by_map.shape == by_class.shape == (2, 5) and not torch.allclose(by_map, by_class)
    assert model.eval()(x).shape == (2, 5)
    features = model.forward_features(x)
    torch.testing.assert_close(model(x), model.head(features[:, 1:].mean(1)))
    torch.testing.assert_close(model.train().forward_head(features)[1], model.head_cls(features[:, 0]))
    model.reset_classifier(0)
    assert model(x).shape == (2, 64)


def test_nothing_goes_from_one_image_or_call_to_the_next():
    torch.manual_seed(0)
    model = vitalloy.create_model("uniformer_xxs_224", **TINY).double().eval()
    a, b = torch.randn(2, 1, 3, 64, 96, dtype=torch.float64)
    first = model(a)
    model(b)
    assert torch.equal(model(a), first)
    torch.testing.assert_close(model(torch.cat([b, a]))[1:], first)


def test_keeping_every_token_relates_all_of_them():
    everything = {"keep": [[1, 1, 1], [1, 1]], "trade_off": [[1, 0.3, 0.3], [0.3, 0.3]]}
    model = vitalloy.create_model("uniformer_xxs_224", **TINY, **everything).eval()
    counts = []
    for stage in (model.block3, model.block4):
        for part in stage:
            part.norm1.register_forward_pre_hook(lambda _m, args: counts.append(args[0].shape[1]))
    model(torch.randn(1, 3, 64, 64))
    assert counts == [17, 17, 17, 5, 5]
    with pytest.raises(vitalloy.errors.ModelError, match="first block"):
        vitalloy.create_model("uniformer_xxs_224", **TINY, keep=[[0.5, 1, 1], [1, 1]])

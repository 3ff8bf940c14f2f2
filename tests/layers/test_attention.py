"""The attention socket and the plain self-attention against their formula."""

from __future__ import annotations

import pytest
import torch

from vitalloy.layers.attention import Attend, SelfAttention, merge_heads, split_heads


def test_attend_is_softmax_of_scaled_biased_scores():
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    bias = torch.randn(3, 5, 7)
    weights = (0.3 * q @ k.mT + bias).softmax(-1)
    assert torch.allclose(Attend()(q, k, v, scale=0.3, bias=bias), weights @ v, atol=1e-5)
    assert torch.allclose(Attend()(q, k, v), (q @ k.mT * 8**-0.5).softmax(-1) @ v, atol=1e-5)


def test_dropout_is_for_training_alone():
    q = torch.randn(1, 2, 6, 4)
    attend = Attend(0.5)
    assert not torch.equal(attend(q, q, q), attend(q, q, q))
    attend.eval()
    assert torch.equal(attend(q, q, q), attend(q, q, q))


def test_heads_are_contiguous_groups_of_channels():
    x = torch.arange(24.0).view(1, 2, 12)
    heads = split_heads(x, 3)
    assert heads.shape == (1, 3, 2, 4) and heads[0, 1, 0].tolist() == [4, 5, 6, 7]
    assert torch.equal(merge_heads(heads), x)


def test_self_attention_is_pytorchs_multi_head_attention():
    ours, theirs = SelfAttention(12, 3), torch.nn.MultiheadAttention(12, 3, batch_first=True)
    theirs.load_state_dict(
        {
            "in_proj_weight": ours.qkv.weight,
            "in_proj_bias": ours.qkv.bias,
            "out_proj.weight": ours.proj.weight,
            "out_proj.bias": ours.proj.bias,
        }
    )
    x = torch.randn(2, 5, 12)
    assert torch.allclose(ours(x), theirs(x, x, x)[0], atol=1e-6)


def test_heads_that_do_not_share_the_channels_are_refused():
    with pytest.raises(ValueError, match=r"12 channels .* 5 heads"):
        SelfAttention(12, 5)

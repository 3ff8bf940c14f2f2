"""What the goldens do not show of ConViT: local start, any grid, other sizes of the position table, the diagnostic."""

from __future__ import annotations

import pytest
import torch

import vitalloy
from vitalloy.backbones.convit import GatedPositionalAttention, mean_distance, nonlocality
from vitalloy.errors import ModelError


@pytest.fixture(scope="module")
def nano():
    torch.manual_seed(0)
    return vitalloy.create_model("convit_nano", num_classes=5).eval()


def pairwise_positional(attention: GatedPositionalAttention, grid: tuple[int, int]) -> torch.Tensor:
    """The published form: a softmax over all pairs of patches."""
    row, column = (t.flatten() for t in torch.meshgrid(*(torch.arange(s) for s in grid), indexing="ij"))
    dx, dy = column - column[:, None], row - row[:, None]
    table = torch.stack([dx, dy, dx**2 + dy**2], -1).to(attention.pos_proj.weight.dtype)
    return attention.pos_proj(table).permute(2, 0, 1).softmax(-1)


def test_factors_equal_the_softmax_over_pairs():
    attention, grid = GatedPositionalAttention(16, 4).double(), (3, 5)
    rows, columns = attention.position_factors(grid)
    product = torch.einsum("hij,hkl->hikjl", rows, columns).flatten(3).flatten(1, 2)
    torch.testing.assert_close(product, pairwise_positional(attention, grid))


def test_the_output_is_the_attention_map_times_the_values():
    attention, grid = GatedPositionalAttention(16, 4, qkv_bias=True).double().eval(), (3, 5)
    x = torch.randn(2, 15, 16, dtype=torch.float64)
    full = attention.attention_map(x, grid)
    values = attention.v(x).unflatten(-1, (4, 4)).transpose(1, 2)
    torch.testing.assert_close(full.sum(-1), torch.ones(2, 4, 15, dtype=torch.float64))
    torch.testing.assert_close(attention(x, grid), attention.proj((full @ values).transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("heads", [4, 9])
def test_each_head_starts_at_its_own_offset(heads):
    attention = GatedPositionalAttention(8 * heads, heads).double()
    attention.init_local()
    side = int(heads**0.5)
    centre = (side - 1) / 2 if side % 2 == 0 else side // 2
    rows, columns = (f.detach() for f in attention.position_factors((15, 15)))
    place = torch.arange(15, dtype=torch.float64) - 7  # seen from the middle, far from any border
    offsets = [(float(c[7] @ place), float(r[7] @ place)) for r, c in zip(rows, columns, strict=True)]
    wanted = [(h2 - centre, h1 - centre) for h2 in range(side) for h1 in range(side)]
    torch.testing.assert_close(torch.tensor(offsets), torch.tensor(wanted, dtype=torch.float32), atol=1e-4, rtol=0)


def test_nonlocality_of_uniform_attention_is_the_mean_distance():
    uniform = torch.full((2, 3, 4, 4), 0.25)
    expected = (0 + 1 + 1 + 2**0.5) / 4
    torch.testing.assert_close(mean_distance(uniform, (2, 2)), torch.full((3,), expected))


def test_nonlocality_covers_every_block_and_leaves_no_hooks(nano):
    found = nonlocality(nano, torch.randn(2, 3, 24, 32))
    assert list(found) == [f"blocks.{i}" for i in range(6)]
    assert all(v.shape == (4,) and (v > 0).all() for v in found.values())
    assert found["blocks.0"].max() < found["blocks.5"].min()  # the gated blocks start local
    assert not any(b.attn._forward_pre_hooks for b in nano.blocks)


def test_only_the_last_block_knows_the_class_token(nano):
    levels = nano.forward_intermediates(torch.randn(2, 3, 24, 40), return_prefix_tokens=True, intermediates_only=True)
    assert [prefix is None for _, prefix in levels] == [True] * 5 + [False]
    assert all(m.shape == (2, 96, 6, 10) for m, _ in levels)


def test_position_table_fits_another_size():
    state = {**vitalloy.create_model("convit_nano").state_dict(), "blocks.0.attn.rel_indices": torch.zeros(1)}
    other = vitalloy.create_model("convit_nano", img_size=(24, 40))
    vitalloy.load_checkpoint(other, state)
    assert other.pos_embed.shape == (1, 60, 96)


def test_a_block_must_remain_for_the_class_token():
    with pytest.raises(ModelError, match="local_depth=6"):
        vitalloy.create_model("convit_nano", local_depth=6)


def test_every_parameter_has_a_gradient():
    model = vitalloy.create_model("convit_nano", num_classes=3)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []

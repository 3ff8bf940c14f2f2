"""Global pooling leaves out the tokens that are no part of the image; the generalized mean is what was published."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import vitalloy
from vitalloy.layers.pooling import GeneralizedMean, GlobalPool


def test_each_kind():
    x = torch.randn(2, 6, 3)
    x[:, :2] = 100.0  # two prefix tokens
    assert torch.equal(GlobalPool("token", 2)(x), x[:, 0])
    assert torch.allclose(GlobalPool("avg", 2)(x), x[:, 2:].mean(1))
    assert torch.equal(GlobalPool("max", 2)(x), x[:, 2:].max(1).values)
    assert torch.equal(GlobalPool("", 2)(x), x)
    for kind in ("gem", "ggem"):
        assert torch.equal(GlobalPool(kind, 2, 3)(x), GeneralizedMean(3)(x[:, 2:]))
    assert len(GlobalPool("gem", 2, 3).mean.p) == 1 and len(GlobalPool("ggem", 2, 3).mean.p) == 3


@pytest.mark.parametrize(("kind", "prefix"), [("median", 1), ("token", 0)])
def test_an_impossible_kind_is_refused_with_the_possible_ones(kind, prefix):
    with pytest.raises(ValueError, match=rf"{kind}.*avg"):
        GlobalPool(kind, prefix)


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randn(3, 49, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mean(*p: float, eps: float = 1e-6) -> GeneralizedMean:
    module = GeneralizedMean(len(p), eps=eps).double()
    module.load_state_dict({"p": torch.tensor(p, dtype=torch.float64)})
    return module


def test_one_group_is_the_generalized_mean_and_groups_are_contiguous_channels():
    x = tokens()
    clamped = x.clamp(min=1e-6)
    torch.testing.assert_close(GeneralizedMean().double()(x), clamped.pow(3).mean(1).pow(1 / 3))
    grouped = mean(1.5, 2.5, 6.0)(x)
    for i, p in enumerate((1.5, 2.5, 6.0)):
        torch.testing.assert_close(grouped[:, 8 * i : 8 * i + 8], mean(p)(x[..., 8 * i : 8 * i + 8]))
    with pytest.raises(RuntimeError):
        mean(1, 2, 3, 4, 5)(x)


def test_between_the_mean_and_the_maximum():
    x = tokens()
    torch.testing.assert_close(mean(1.0)(x), x.clamp(min=1e-6).mean(1))
    top = x.amax(1)
    for p, share in ((200.0, 0.03), (2000.0, 0.003)):
        pooled = mean(p)(x)
        assert (pooled <= top).all() and (pooled >= (1 - share) * top).all()
    sizes = [mean(p)(x).mean() for p in (1.0, 2.0, 3.0, 8.0)]
    assert sizes == sorted(sizes)


def test_the_order_of_tokens_does_not_matter():
    x = tokens()
    torch.testing.assert_close(mean(1.5, 4.0)(x[:, torch.randperm(49)]), mean(1.5, 4.0)(x))


def test_gradients_are_the_formulas_and_the_finite_differences():
    x, pool = tokens().requires_grad_(), mean(1.3, 3.0, 5.0)
    out = pool(x)
    grad_p, grad_x = torch.autograd.grad(out.sum(), (pool.p, x))
    z, p = x.detach().clamp(min=1e-6), pool.p.detach().repeat_interleave(8)
    kept = out.detach().unsqueeze(1)
    torch.testing.assert_close(grad_x, torch.where(x.detach() > 1e-6, (z / kept) ** (p - 1) / 49, 0.0))
    powers = z**p
    by_channel = (powers * z.log()).sum(1) / powers.sum(1) / p - powers.mean(1).log() / p**2
    wanted = (out.detach() * by_channel).sum(0).unflatten(0, (3, 8)).sum(1)
    torch.testing.assert_close(grad_p, wanted)

    def pooled(small: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(pool, {"p": exponents}, small)

    small = tokens(1)[:, :5, :6].abs().add(0.1).requires_grad_()
    assert torch.autograd.gradcheck(pooled, (small, torch.tensor([1.3, 3.0, 5.0]).double().requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_neither_overflows_nor_loses_the_small(dtype):
    x = 200 * tokens().to(dtype)  # its cube is far beyond float16
    x[:, :, 0] = -1.0  # a channel that is clamped everywhere
    pool = GeneralizedMean(3).to(dtype)
    leaf = x.clone().requires_grad_()
    out = pool(leaf)
    out.float().sum().backward()
    exact = mean(3.0, 3.0, 3.0)(x.double())
    assert out.dtype == dtype
    torch.testing.assert_close(out[:, 1:].double(), exact[:, 1:], rtol=1e-2, atol=1e-3)
    assert leaf.grad.isfinite().all() and pool.p.grad.isfinite().all()
    assert not leaf.grad[:, :, 0].any()


@pytest.mark.parametrize("p", [0.0, -2.0])
def test_an_exponent_that_drifted_to_zero_stays_usable(p):
    x = tokens().abs() + 0.1
    pooled = mean(p)(x)
    torch.testing.assert_close(pooled, x.log().mean(1).exp(), rtol=1e-3, atol=0)  # the limit: the geometric mean


def test_a_vit_norms_its_tokens_before_the_pooling():
    model = vitalloy.create_model("vit_nano", num_classes=5, global_pool="ggem").eval()
    assert isinstance(model.norm, nn.LayerNorm) and isinstance(model.fc_norm, nn.Identity)
    assert len(model.pool.mean.p) == 3  # its heads
    seen = []
    model.pool.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    x = torch.randn(2, 3, 32, 32)
    logits = model(x)
    torch.testing.assert_close(seen[0].mean(-1), torch.zeros(2, 65), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits, model.head(GeneralizedMean(3)(seen[0][:, 1:])))

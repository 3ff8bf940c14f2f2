"""Sparsifiner: kernels agree, masks keep what they should, tokens leave without a trace, and the result is a model."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import Tensor, nn

import vitalloy
from vitalloy.compression.quantization import quantize
from vitalloy.compression.tokens import sparsifiner
from vitalloy.compression.tokens.sparsifiner import SparseAttend, kernels, losses
from vitalloy.compression.trunk import Segment, macs as count_macs, points
from vitalloy.deployment import export_onnx, verify_onnx
from vitalloy.errors import CompressionError
from vitalloy.layers.sockets import find

BACKBONES = {  # least keys, sparse layers, layers left alone
    "vit_nano": (32, 6, 0),
    "cvt_nano": (16, 2, 2),  # fewer keys than queries, a class token in the last stage alone
    "pvt_v2_nano": (16, 6, 2),  # fewer keys than queries
    "nextvit_nano": (16, 1, 2),
    "swin_nano": (16, 6, 1),  # windows, a bias with shift masks
    "efficientformer_nano": (4, 1, 0),  # a bias that learns, values wider than keys
    "crossvit_nano": (32, 3, 12),  # layers of one query are left alone
}
QUICK = {"predictor_epochs": 1, "epochs": 1}


def build(name: str, **options: object) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return vitalloy.create_model(name, num_classes=10, img_size=32, **options).eval(), torch.randn(8, 3, 32, 32)


def attends(model: nn.Module) -> list[SparseAttend]:
    return list(find(model, SparseAttend).values())


def sparse(model: nn.Module, images: Tensor, **options: object) -> nn.Module:
    return sparsifiner.rebuild(copy.deepcopy(model), **sparsifiner.plan(model, images, **options)[0])


@pytest.mark.parametrize("group", [1, 5])
@pytest.mark.parametrize("biased", [False, True])
def test_kernels_agree_and_so_do_their_gradients(group, biased):
    torch.manual_seed(0)
    queries, keys, kept = 17, 12, 4
    q, k, v = torch.randn(2, 3, queries, 8), torch.randn(2, 3, keys, 8), torch.randn(2, 3, keys, 6)
    bias = torch.randn(1, 3, queries, keys) if biased else None
    index = torch.rand(2, 3, -(-queries // group), keys).topk(kept, dim=-1).indices
    mask = kernels.allowed(index, keys, group, queries)
    assert (mask.sum(-1) == kept).all()
    logits = q @ k.mT * 0.3 + (0 if bias is None else bias)
    wanted = logits.masked_fill(~mask, -torch.inf).softmax(-1) @ v
    ways = {
        "masked": lambda q, k, v: kernels.masked(q, k, v, mask, 0.3, bias),
        "gathered": lambda q, k, v: kernels.gathered(q, k, v, index, group, 0.3, bias),
    }
    gradients = {}
    for name, way in ways.items():
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = way(*inputs)
        assert torch.allclose(out, wanted, atol=1e-5), name
        gradients[name] = torch.autograd.grad((out * torch.arange(out.numel()).view_as(out).sin()).sum(), inputs)
    for one, other in zip(*gradients.values(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    square = torch.cat([v, v], -1)[..., :8]  # FlexAttention on CPUs takes values as wide as keys
    expected = logits.masked_fill(~mask, -torch.inf).softmax(-1) @ square
    assert torch.allclose(kernels.flex(q, k, square, mask, 0.3, bias), expected, atol=1e-5)


def test_a_query_that_keeps_nothing_gets_zeros_and_the_class_token_keeps_all():
    model, images = build("vit_nano")
    nothing = sparse(model, images, score_threshold=1e9)
    kept = sparsifiner.links(nothing, images[:1])["blocks.0.attn.attend"]
    assert kept[:, :, 0].all() and not kept[:, :, 1:].any()
    q = torch.randn(1, 3, 65, 32)
    layer = attends(nothing)[0]
    out = layer(q, q, q)
    assert torch.equal(out[:, :, 1:], torch.zeros_like(out[:, :, 1:])) and out[:, :, 0].abs().sum() > 0
    assert nothing(images).isfinite().all()
    assert not kernels.masked(q, q, q, torch.zeros(1, 3, 65, 65, dtype=torch.bool), 1.0).any()


def test_all_links_kept_is_the_dense_model_and_equal_scores_are_taken_in_order():
    model, images = build("vit_nano")
    for kernel in ("dense", "gather"):
        assert torch.allclose(sparse(model, images, keep=1.0, kernel=kernel)(images), model(images), atol=1e-5)
    layer = attends(sparse(model, images, keep=0.1))[0]
    with torch.no_grad():
        layer.predictor.maps.zero_()
    q = torch.randn(1, 3, 65, 32)
    assert torch.equal(layer.choose(q[:, :, 1:], q).sort(-1).values, torch.arange(7).expand(1, 3, 64, 7))


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_becomes_sparse_and_back_from_its_settings(name):
    least, converted, left = BACKBONES[name]
    plain, images = build(name)
    model = sparsifiner.compress(copy.deepcopy(plain), images, least_keys=least, keep=0.5, **QUICK)
    assert (len(attends(model)), len(model.left_alone)) == (converted, left) and not model.training
    for layer, mask in sparsifiner.links(model, images[:2]).items():
        size = model.settings["layers"][layer]
        rows = mask[:, :, size["prefix"] :].sum(-1)
        assert (rows == math.ceil(0.5 * size["keys"])).all() and mask[:, :, : size["prefix"]].all()
        assert mask.shape[1:] == (size["heads"], size["queries"], size["keys"])
    assert {row["kernel"] for row in model.choices} <= {"dense", "gather"} and len(model.choices) == converted
    again = sparsifiner.rebuild(copy.deepcopy(plain), **json.loads(json.dumps(model.settings)))
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        answer = model(images[:3])
        assert torch.equal(again.eval()(images[:3]), answer) and torch.equal(copy.deepcopy(model)(images[:3]), answer)
        assert torch.allclose(model(images[:1]), answer[:1], atol=1e-4)  # a batch of one
    assert not torch.allclose(answer, plain(images[:3]), atol=1e-3), "half of the links are gone"


@pytest.mark.parametrize("group", [1, 16])
def test_gathering_answers_as_masking_in_a_whole_model(group):
    model, images = build("vit_nano")
    dense, gather = (sparse(model, images, group=group, kernel=kernel) for kernel in ("dense", "gather"))
    assert torch.allclose(dense(images), gather(images), atol=1e-5)
    masks = sparsifiner.links(gather, images[:1])["blocks.3.attn.attend"][0, :, 1:]
    together = masks.unflatten(1, (-1, group))
    assert (together == together[:, :, :1]).all(), "neighbours share their keys"
    assert (masks != masks[:, :1]).any(), "others do not"
    for own in (dense, gather):
        own(images).square().sum().backward()
    for one, other in zip(dense.parameters(), gather.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.allclose(one.grad, other.grad, rtol=1e-3, atol=1e-3)


def test_dropped_tokens_answer_as_zeroed_tokens():
    model, images = build("vit_nano")
    options = {"tokens": [0.7, 0.4], "locations": [1, 3], "score_threshold": -1.0}
    dropped, zeroed = (sparse(model, images, drop=drop, **options) for drop in (True, False))
    lengths = []
    dropped.blocks[5].register_forward_hook(lambda _m, _a, out: lengths.append(out.shape[1]))
    with torch.no_grad():
        assert torch.allclose(dropped(images), zeroed(images), atol=1e-5)
        assert torch.equal(dropped(images[:1]), dropped(images[:1])), "nothing is left of the last pass"
    assert lengths[0] == 1 + math.ceil(0.4 * 64)
    ours, theirs = sparsifiner.links(dropped, images[:2]), sparsifiner.links(zeroed, images[:2])
    for name, mask in ours.items():
        assert mask.shape == (2, 3, 65, 65)
        assert torch.equal(mask[:, :, 1:], theirs[name][:, :, 1:] & mask.any(2, keepdim=True)), name


def test_tokens_stay_where_dropping_would_change_the_answer():
    model, images = build("vit_nano")
    pooled = vitalloy.create_model("vit_nano", num_classes=10, img_size=32, global_pool="max").eval()
    with pytest.raises(CompressionError, match="more than its class token"):
        sparsifiner.compress(pooled, images, tokens=0.5, **QUICK)
    pyramid, _ = build("pvt_v2_nano")
    with pytest.raises(CompressionError, match="class token"):
        sparsifiner.compress(pyramid, images, tokens=0.5, least_keys=16, **QUICK)
    for wrong in ({"tokens": 1.5}, {"tokens": [0.5], "locations": [9]}, {"locations": [1]}):
        with pytest.raises(CompressionError, match=r"locations|tokens"):
            sparsifiner.compress(model, images, **wrong, **QUICK)


def test_predictors_learn_to_find_the_strong_links_and_masks_to_be_lived_with():
    model = vitalloy.load("bundled:fashion_vit")
    torch.manual_seed(0)
    images = torch.nn.functional.interpolate(torch.randn(32, 1, 7, 7), 28, mode="bicubic") * 2
    steps = []
    options = {"keep": 0.25, "predictor_epochs": 10, "kernel": "dense"}
    first = sparsifiner.compress(copy.deepcopy(model), images, epochs=0, progress=lambda *n: steps.append(n), **options)
    assert steps == [(i, 10) for i in range(1, 11)]
    found = sparsifiner.recall(first, images[:16])
    assert found["predicted"] > 0.5 > 0.4 > max(found["random"], found["window"])
    untouched = dict(first.named_parameters())
    assert all(torch.equal(value, untouched[name]) for name, value in model.named_parameters())

    second = sparsifiner.compress(copy.deepcopy(model), images, epochs=6, lr=1e-4, **options)
    with torch.no_grad():
        wanted = model(images)
        before, after = ((own(images) - wanted).square().mean() for own in (first, second))
    assert after < 0.5 * before
    for one, other in zip(attends(first), attends(second), strict=True):
        assert torch.equal(one.predictor.maps, other.predictor.maps), "predictors are frozen in the second phase"


def test_labels_are_learned_and_published_reconstruction_runs():
    model, images = build("vit_nano", depth=2)
    labels = torch.arange(8)
    train = [(images[:4], labels[:4]), (images[4:], labels[4:])]
    made = sparsifiner.compress(
        copy.deepcopy(model), images, train=train, predictor_epochs=1, epochs=8, lr=1e-3, as_published=True
    )
    gain = [losses.cross_entropy(own(images), labels).item() for own in (model, made)]
    assert gain[1] < 0.85 * gain[0]
    with pytest.raises(CompressionError, match="no training images"):
        sparsifiner.compress(copy.deepcopy(model), images, train=[], **QUICK)


def test_a_budget_is_met_or_the_nearest_is_named():
    model, images = build("vit_nano", depth=2)
    whole = count_macs(model, images[:1])
    made = sparsifiner.compress(copy.deepcopy(model), images, macs=0.93, kernel="gather", group=16, **QUICK)
    done = count_macs(made, images[:1]) / whole
    assert 0.9 < done <= 0.93
    with pytest.raises(CompressionError, match=r"macs=0.2 is out of reach: the nearest is 0\.[89]"):
        sparsifiner.compress(copy.deepcopy(model), images, macs=0.2, **QUICK)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"keep": 0}, "above 0"),
        ({"keep": 1.2}, "up to 1"),
        ({"keep": float("nan")}, "keep"),
        ({"coefficients": 0}, "coefficients"),
        ({"n_factor": 0.5}, "n_factor"),
        ({"kernel": "cuda"}, "kernel"),
        ({"kernel": "gather", "score_threshold": 0.1}, "score_threshold"),
        ({"basis_threshold": 1e3}, "basis_threshold"),
        ({"predictor_lr": float("nan")}, "learning rate"),
        ({"least_keys": 1000}, "65 keys, fewer than 1000"),
    ],
)
def test_wrong_options_are_refused(options, says):
    model, images = build("vit_nano")
    with pytest.raises(CompressionError, match=says):
        sparsifiner.compress(model, images, **{**QUICK, **options})


def test_models_without_attention_and_sparse_models_are_refused():
    convolutions, images = build("mobilevig_nano")
    with pytest.raises(CompressionError, match="no attention that could be sparse"):
        sparsifiner.compress(convolutions, images, **QUICK)
    model, images = build("vit_nano")
    with pytest.raises(CompressionError, match="sparse already"):
        sparsifiner.compress(sparse(model, images), images, **QUICK)


@pytest.mark.parametrize("kernel", ["dense", "gather"])
def test_an_image_that_is_not_a_number_spoils_no_other(kernel):
    model, images = build("vit_nano")
    own = sparse(model, images, kernel=kernel, tokens=0.7)
    wanted = own(images[:3])
    spoiled = images[:3].clone()
    spoiled[1] = torch.nan
    answer = own(spoiled)
    assert answer[1].isnan().all(), "what is not a number is not passed off as an answer"
    assert torch.allclose(answer[[0, 2]], wanted[[0, 2]], atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"kernel": "dense"}, {"kernel": "gather", "group": 16, "tokens": [0.6], "locations": [0]}],
    ids=["masked", "skipping"],
)
def test_exports_to_onnx_with_any_number_of_images(tmp_path, options):
    model, images = build("vit_nano", depth=2)
    own = sparse(model, images, **options)
    export_onnx(own, images[:2], tmp_path / "sparse.onnx")
    found = verify_onnx(own, tmp_path / "sparse.onnx", [images[:1], images[1:]], tolerance=1e-4)
    assert found.images == 8


def test_pieces_of_a_model_that_drops_tokens_begin_a_pass_of_their_own():
    model, images = build("vit_nano", depth=3)
    own, shape = sparse(model, images, tokens=[0.6], locations=[1]), images.shape[1:]
    found = points(own, images[:1])
    first = next(point for point in found if point.name == "blocks.0")
    with torch.no_grad():
        wanted = own(images)[:3]
        state = Segment(own, None, first, shape, found)(images)[:3]  # the others left
        own(images)  # a pass that ends with fewer tokens
        torch.testing.assert_close(Segment(own, first, None, shape, found)(state), wanted, atol=1e-4, rtol=1e-4)


def test_a_sparse_model_can_be_quantized():
    model, images = build("vit_nano", depth=2)
    own = sparse(model, images, tokens=[0.7], locations=[0])
    small = quantize(own, images, "easyquant")
    with torch.no_grad():
        assert (small(images) - own(images)).abs().max() < 0.2 * own(images).abs().max()
    assert len(attends(small)) == 2


def test_the_curve_says_where_skipping_pays():
    rows = sparsifiner.crossover(2, 16, (65,), (0.5, 0.1), groups=(16,), seconds=0.01)
    assert [(row["tokens"], row["keep"]) for row in rows] == [(65, 0.5), (65, 0.1)]
    assert all(row["speedup"] == row["dense"] / row["layer"] > 0 for row in rows)
    made_up = [{"tokens": 9, "group": 1, "keep": keep, "speedup": s} for keep, s in ((0.5, 2), (0.25, 0.9), (0.1, 1.5))]
    assert sparsifiner.pays_below(made_up) == {(9, 1): 0.1}
    assert sparsifiner.pays_below(made_up[1:2]) == {(9, 1): None}

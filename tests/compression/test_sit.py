"""SiT: slimmed models of every kind answer, learn, come back from their settings, and say where tokens came from."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import vitalloy
from vitalloy.compression.tokens import sit
from vitalloy.compression.tokens.sit.placing import blocks_and_stages, smaller
from vitalloy.compression.tokens.sit.slimmed import GridSlimming
from vitalloy.compression.trunk import macs, points
from vitalloy.deployment import export_onnx, verify_onnx
from vitalloy.errors import CompressionError
from vitalloy.layers.slimming import TokenSlimming

KINDS = [
    "vit_nano",  # tokens alone
    "lvvit_nano",  # a convolutional stem
    "cvt_nano",  # convolutional projections
    "pvt_v2_nano",  # tokens and their grid
    "swin_nano",  # windows on maps, channels last
    "efficientformer_nano",  # maps
]


def build(name: str, **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    return vitalloy.create_model(name, num_classes=10, img_size=32, **kwargs).eval()


def noise(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", KINDS)
def test_any_backbone_is_slimmed_within_the_budget_and_comes_back_from_its_settings(name):
    plain, images = build(name), noise(8)
    full = macs(plain, images[:1])
    slim = sit.compress(copy.deepcopy(plain), images, macs=0.7, epochs=0)
    share = macs(slim, images[:1]) / full
    assert share <= 0.7 and slim.settings["macs"] == pytest.approx(share)
    answer = slim(images)
    assert answer.shape == (8, 10) and torch.allclose(slim(images[:1]), answer[:1], atol=1e-5)
    assert not torch.allclose(answer, plain(images), atol=1e-3)

    again = sit.rebuild(build(name), **json.loads(json.dumps(slim.settings)))
    again.load_state_dict(slim.state_dict())
    for other in (again, copy.deepcopy(slim), pickle.loads(pickle.dumps(slim)), copy.deepcopy(slim).fuse()):
        assert torch.allclose(other.eval()(images), answer, atol=1e-5)
    assert set(plain.state_dict()) < set(slim.state_dict())

    shares = sit.origins(slim, images[:3])
    for rows in shares:
        assert rows.min() >= 0 and torch.allclose(rows.sum(-1), torch.ones(()), atol=1e-5)
    last = slim.settings["slims"][-1]
    assert shares[-1].shape[1] == last["after"][0] * last["after"][1]
    values = torch.rand(3, shares[-1].shape[1])
    map_ = sit.to_patches(slim, values, images[:3])
    assert map_.shape == (3, *slim.settings["slims"][0]["before"])
    assert torch.allclose(map_.sum((1, 2)), values.sum(1), atol=1e-4)


def test_untrained_mixtures_stay_where_they_are():
    """Local pooling at the start: the top left mixture comes from the top left, in each of three slimmings."""
    model = sit.compress(build("vit_nano"), noise(8), keep=0.5, epochs=0)
    assert len(model.settings["slims"]) == 3
    for rows in sit.origins(model, noise(1)):
        corner = rows[0, 0].unflatten(0, (8, 8))
        assert corner[:4, :4].sum() > 0.8 and rows[0, -1].unflatten(0, (8, 8))[4:, 4:].sum() > 0.8


def test_no_share_is_a_denormal_number():
    """Processors take ten times as long over them, which made slimmed maps of many patches slower than whole ones."""
    model = GridSlimming(24, (28, 28), (14, 14))
    assert model.mixing(torch.zeros(1, 784, 24)).min() > torch.finfo(torch.float32).tiny


def test_folding_takes_the_scale_along():
    model, tokens = TokenSlimming(24, 9, prefix=1), noise(2).reshape(2, 128, 24)
    model.scale.data.fill_(3.0)
    folded = copy.deepcopy(model)
    for _ in range(2):
        folded.fuse()
    assert torch.allclose(folded(tokens), model(tokens), atol=1e-6) and folded.scale is folded.score[-1].bias is None


def test_exported_with_a_free_batch(tmp_path):
    model, images = sit.compress(build("efficientformer_nano"), noise(8), macs=0.7, epochs=0), noise(3, seed=2)
    exported = export_onnx(model, images, tmp_path / "slim.onnx")
    assert verify_onnx(model, exported.path, [images, images[:1]], tolerance=1e-4).images == 4


def digits(count: int) -> Tensor:
    found = torch.from_numpy(load_digits().images[:count]).float().unsqueeze(1) / 8 - 1
    return nn.functional.interpolate(found, size=28, mode="bilinear")


def test_training_brings_the_answers_and_tokens_of_the_full_model_back():
    """Without labels, from the calibration images alone; the reverse modules leave nothing behind."""
    full, images = vitalloy.load("bundled:fashion_vit"), digits(96)
    seen = []

    def slimmed(**options: object) -> nn.Module:
        return sit.compress(copy.deepcopy(full), images, after=["blocks.1"], lr=5e-4, **options)

    start = slimmed(epochs=0)
    taught = slimmed(epochs=4, progress=lambda done, of: seen.append((done, of)))

    def distance(model: nn.Module) -> float:
        with torch.no_grad():
            return float(sit.logit_distance(model(images), full(images)))

    assert distance(taught) < 0.75 * distance(start)
    assert taught.lesson.by_token[-1] < taught.lesson.by_token[0]
    assert taught.lesson.reverse_parameters == taught.settings["reverse_parameters"] > 0
    assert set(taught.state_dict()) == set(start.state_dict()) and not taught.training
    assert seen == [(n, 4) for n in range(1, 5)]

    batches = [(images[:16], torch.arange(16) % 10)]
    a, b, other = (slimmed(train=batches, epochs=1, token_weight=w) for w in (0.0, 0.0, 2.0))
    assert torch.equal(a(images), b(images)) and not torch.equal(a(images), other(images))
    assert a.settings["reverse_parameters"] == 0 and a.lesson.by_class[0] > 0


def test_places_can_be_named_and_the_model_slimmed_again():
    model = sit.compress(build("vit_nano"), noise(8), after=["blocks.1"], macs=0.75, epochs=0)
    assert [row["point"]["name"] for row in model.settings["slims"]] == ["blocks.1"]
    found = {p.name for p in blocks_and_stages(model, noise(1))}
    assert "blocks.3" in found and {p.name for p in points(model, noise(1))} >= found
    first = macs(model, noise(1))
    again = sit.compress(model, noise(8), after=["blocks.3"], epochs=0)
    assert macs(again, noise(1)) < first and len(sit.origins(again, noise(2))) == 2


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("vit_nano", {"macs": 0.01}, "macs=0.01 is out of reach: the nearest is"),
        ("vit_nano", {"macs": 1.5}, "macs=1.5 must be between 0 and 1"),
        ("vit_nano", {"keep": 0.0}, "keep=0 must be"),
        ("vit_nano", {"after": ["blocks.99"]}, "blocks.4"),
        ("vit_nano", {"train": []}, "no training images"),
        ("vit_nano", {"train": [(noise(2) / 0, torch.zeros(2, dtype=torch.long))]}, "use a smaller lr"),
        ("crossvit_nano", {}, "has no place to slim tokens at"),
    ],
)
def test_what_cannot_be_done_is_said(name, options, says):
    with pytest.raises(CompressionError) as caught:
        sit.compress(build(name), noise(8), **options)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_other_sizes_and_models_without_slimming_are_refused():
    model = sit.compress(build("vit_nano"), noise(8), after=["blocks.2"], epochs=0)
    with pytest.raises(CompressionError, match="maps of 8x8 got one of 144 places"):
        model(torch.zeros(1, 3, 48, 48))
    with pytest.raises(CompressionError, match="no slimming module"):
        sit.origins(build("vit_nano"), noise(1))
    with pytest.raises(CompressionError, match="mixtures an image, but values"):
        sit.to_patches(model, torch.zeros(1, 5), noise(1))


def test_published_slimmed_models_say_where_tokens_came_from():
    model = build("lvvit_nano", slim_after=(1, 2, 4))
    shares = sit.origins(model, noise(2))
    assert [rows.shape for rows in shares] == [(2, 32, 64), (2, 16, 64), (2, 8, 64)]
    assert sit.to_patches(model, torch.ones(2, 8), noise(2)).shape == (2, 8, 8)


@pytest.mark.parametrize(
    ("grid", "keep", "wanted"),
    [((14, 14), 0.5, (10, 10)), ((8, 8), 0.5, (5, 6)), ((1, 10), 0.5, (1, 5)), ((1, 2), 0.9, (1, 1))],
)
def test_smaller_grids_keep_count_and_proportions(grid, keep, wanted):
    assert smaller(grid, keep) in (wanted, wanted[::-1])

"""APHQ-ViT on any backbone: reconstruction brings few bits nearer to the float model; what its Hessian measures."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import vitalloy
from vitalloy.compression.calibration import prepared
from vitalloy.compression.quantization import quantize
from vitalloy.compression.quantization.aphq import layerwise, perturbation_report, search
from vitalloy.compression.quantization.aphq.mlp import find_perceptrons
from vitalloy.compression.quantization.aphq.units import find_units
from vitalloy.compression.simulated import QuantizedAttend, QuantizedConv2d, quantized_layers
from vitalloy.errors import CompressionError

CHEAP = {"iterations": 2, "mlp_iterations": 2, "rounds": 1}


@pytest.fixture(scope="module")
def digits():
    """A small model that reads digits, calibration images, and others."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 8 - 1  # (1797, 1, 8, 8)
    labels = torch.from_numpy(data.target)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = vitalloy.create_model(
            "vit_nano", num_classes=10, in_chans=1, img_size=8, patch_size=2, embed_dim=32, depth=2, num_heads=2
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(6):
            for rows in torch.randperm(1400).split(100):
                loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return model.eval(), images[:128], images[1400:]


@pytest.fixture(autouse=True)
def small_samples(monkeypatch):
    """The search sees little, so that the tests are fast."""
    monkeypatch.setattr(layerwise, "ROWS", 64)
    monkeypatch.setattr(layerwise, "MAPS", 2)
    monkeypatch.setattr(layerwise, "QUERIES", 8)


@torch.no_grad()
def distance(made: nn.Module, model: nn.Module, images: torch.Tensor) -> float:
    return ((made(images) - model(images)).norm() / model(images).norm()).item()


def test_reconstruction_brings_three_bits_nearer_to_float(digits):
    model, images, others = digits
    shared = {"weights": 3, "activations": 3, "mlp_reconstruction": False, "iterations": 40, "rounding_rate": 3e-2}
    searched, learnt = (
        distance(quantize(model, images, "aphq", reconstruction=kind, **shared), model, others)
        for kind in ("none", "aphq")
    )
    assert learnt < 0.9 * searched


def test_the_seed_decides(digits):
    model, images, others = digits
    before = torch.get_rng_state()
    made = [quantize(model, images[:32], "aphq", seed=seed, **CHEAP)(others[:8]) for seed in (0, 0, 1)]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    assert torch.equal(before, torch.get_rng_state())


def test_perceptrons_become_one_sided_and_stay_near(digits):
    model, images, others = digits
    own = prepared(model).requires_grad_(False)
    names = find_perceptrons(own, images)
    assert [second for _, _, second in names] == ["blocks.0.mlp.fc2", "blocks.1.mlp.fc2"]
    fitted, swapped = (
        quantize(model, images, "aphq", weights=8, activations=8, reconstruction="none", mlp_iterations=n)
        for n in (60, 0)
    )
    for made in (fitted, swapped):
        assert isinstance(made.blocks[0].mlp.act, nn.ReLU)
    assert isinstance(model.blocks[0].mlp.act, nn.GELU)
    assert distance(fitted, model, others) < 0.8 * distance(swapped, model, others)


@pytest.mark.parametrize(
    ("name", "size", "units"),
    [
        ("swin_nano", 32, {"patch_embed", "layers.0.blocks.1", "layers.1.downsample", "head"}),
        ("crossvit_nano", 32, {"patch_embed.0.proj", "blocks.0.blocks.1.1", "blocks.0.fusion.0.0", "head"}),
        ("efficientformerv2_nano", 32, {"patch_embed1", "block2.0", "patch_embed4", "block4.1", "head"}),
        ("mobilevit_xxs", 64, {"stem", "stages.1.0", "stages.2.1.transformer.0", "head"}),
    ],
)
def test_any_backbone(name, size, units):
    kwargs = {} if name.startswith("mobilevit") else {"img_size": size}
    torch.manual_seed(0)
    model = vitalloy.create_model(name, num_classes=10, **kwargs).eval()
    images = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(0))
    assert units <= {unit.name for unit in find_units(prepared(model).requires_grad_(False), images)}
    steps = []
    made = quantize(model, images, "aphq", weights=3, activations=4, progress=lambda *s: steps.append(s), **CHEAP)
    assert [done for done, _ in steps] == list(range(1, steps[-1][1] + 1))
    floats = []
    for layer in quantized_layers(made).values():
        assert layer.weight_bits == (4 if isinstance(layer, QuantizedAttend) else 3)
        floats += [layer] if layer.activation_bits != 4 else []
    assert all(isinstance(layer, QuantizedConv2d) and layer.in_channels == 3 for layer in floats)  # takes the images
    assert len(floats) <= 2
    with torch.no_grad():
        assert made(images).isfinite().all()
        for layer in quantized_layers(made).values():
            if not isinstance(layer, QuantizedAttend):
                assert all(len(row.unique()) <= 8 for row in layer.weight_quantizer(layer.weight).flatten(1))


def test_a_push_alike_for_all_channels_measures_rounding_noise(digits):
    model, images, _ = digits
    report = perturbation_report(model, images[:32])
    blocks = [report[f"blocks.{i}"] for i in range(2)]
    assert all(row["ones_survives"] < 1e-4 for row in blocks)
    assert all(0.9 < row["rademacher_survives"] < 1.1 for row in blocks)


def test_the_output_error_is_the_same_both_ways():
    make = torch.Generator().manual_seed(0)
    e, w, d = (torch.randn(*s, dtype=torch.float64, generator=make) for s in ((5, 2, 6, 4), (2, 9, 4), (2, 6, 9)))
    direct = (e @ w.mT + d).square().sum(-1)
    assert torch.allclose(search.output_error(e, w, d), direct)


@pytest.mark.parametrize(
    ("option", "says"),
    [({"weights": 1}, "2 to 8"), ({"perturbation": "twos"}, "rademacher"), ({"reconstruction": "kl"}, "mse")],
)
def test_wrong_options_are_refused(option, says, digits):
    with pytest.raises(CompressionError, match=says):
        quantize(digits[0], digits[1], "aphq", **option)

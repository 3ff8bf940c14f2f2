"""BiViT: what becomes binary, what training gives back, and that bits compute what the simulation computes."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vitalloy
from vitalloy.compression.calibration import prepared
from vitalloy.compression.finetune import finetune
from vitalloy.compression.quantization.bivit import (
    BinaryAttend,
    BinaryConv2d,
    BinaryLinear,
    bits,
    load_packed,
    packed,
    packed_bytes,
    quantize,
    save_packed,
    sign,
)
from vitalloy.compression.quantization.bivit.packed import PackedAttend, PackedLinear
from vitalloy.errors import CheckpointError, CompressionError
from vitalloy.layers.attention import Attend
from vitalloy.layers.sockets import find

BACKBONES = [
    "vit_nano",
    "swin_nano",  # windows, shift masks, a bias
    "pvt_v2_nano",  # keys and values of another number
    "crossvit_nano",  # two branches, one query
    "convit_nano",  # a projection whose weight is read and not called
    "nextvit_nano",  # 1x1 convolutions
    "efficientformerv2_nano",  # strided attention, convolutional perceptrons
    "mobilevit_xxs",  # timm's
]


def build(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    size = 64 if name.startswith("mobilevit") else 32
    model = vitalloy.create_model(name, num_classes=10, **({} if size == 64 else {"img_size": size}))
    return prepared(model), torch.randn(2, 3, size, size)


@pytest.mark.parametrize("name", BACKBONES)
def test_bits_answer_as_the_simulation_on_every_backbone(name):
    model, images = build(name)
    classifier, attends = model.get_classifier(), len(find(model, Attend))
    binary = quantize(model, images, mlp_activations=1)
    assert attends == len(find(binary, BinaryAttend)) == len(find(binary, Attend)) > 0
    assert type(classifier) is nn.Linear and classifier is binary.get_classifier()
    small = packed(binary)
    with torch.no_grad():
        assert torch.equal(small(images), binary(images))
    assert not find(small, (BinaryLinear, BinaryConv2d))


def test_attention_is_told_from_perceptrons():
    model, images = build("efficientformerv2_nano")
    binary = quantize(model, images)
    owners = {name.rpartition(".")[0] for name in find(binary, BinaryAttend)}
    layers = find(binary, (BinaryLinear, BinaryConv2d))
    inside = {name: any(name.startswith(f"{owner}.") for owner in owners) for name in layers}
    assert 0 < sum(inside.values()) < len(inside)
    assert all(layers[name].activation_bits == (1 if within else 32) for name, within in inside.items())
    assert all(layer.weight_bits == 1 for layer in layers.values())
    convs = [m for m in binary.modules() if type(m) is nn.Conv2d]
    assert convs and all(m.kernel_size != (1, 1) or m.groups > 1 for m in convs), "larger or grouped kernels stay float"


def test_a_folded_projection_stays_float():
    model, images = build("convit_nano")
    floats = [name for name, m in quantize(model, images).named_modules() if type(m) is nn.Linear]
    assert floats == [*(f"blocks.{i}.attn.pos_proj" for i in range(5)), "head"]


def test_learned_scales_start_from_the_weights_and_survive_a_round_trip():
    torch.manual_seed(0)
    layer, x = nn.Linear(12, 7, bias=False), torch.randn(3, 12)
    made = BinaryLinear.of(layer)
    torch.testing.assert_close(made.scaling_factor, layer.weight.abs().mean(1, keepdim=True))
    with torch.no_grad():
        made.scaling_factor.mul_(3).sub_(0.1)
    again = BinaryLinear(12, 7)
    again.load_state_dict(made.state_dict())
    assert torch.equal(again(x), made(x)) and again.scaling_factor.equal(made.scaling_factor)

    # a float checkpoint has no scale: it is set in the first call, and only then
    again = BinaryLinear(12, 7)
    again.load_state_dict({"weight": layer.weight, "bias": torch.ones(7)}, strict=False)
    assert not again.scaling_factor.any()
    torch.testing.assert_close(again.eval()(x), BinaryLinear.of(layer)(x) + 1)
    with torch.no_grad():
        again.weight.mul_(2)
    assert again(x).equal(BinaryLinear.of(layer)(x) + 1), "the scale followed the weight after the first call"


@pytest.mark.parametrize("width", [1, 7, 16, 32, 48, 64, 100])
def test_the_map_of_integers_is_the_map_of_softmax(width):
    """Largest - floor(ln 4 * sqrt(d)) in whole numbers, and a quarter of the largest weight in real ones."""
    threshold = PackedAttend(True).thresholds(width)
    largest = torch.arange(-width, width + 1)
    assert torch.equal(threshold.long(), (largest - math.floor(math.log(4) * math.sqrt(width))).clamp_min(-width))
    products = torch.randint(-width, width + 1, (50, 9), generator=torch.Generator().manual_seed(width))
    softmax = (products.double() * width**-0.5).softmax(-1)
    wanted = softmax >= 0.25 * softmax.amax(-1, keepdim=True)
    assert torch.equal(products >= threshold[products.amax(-1, keepdim=True) + width], wanted)


@pytest.mark.parametrize("counter", [bits.count, bits.table_count])
@pytest.mark.parametrize("n", [1, 37, 64, 300])
def test_counted_products_are_the_products_of_signs(n, counter, monkeypatch):
    monkeypatch.setattr(bits, "count", counter)
    monkeypatch.setattr(bits, "BLOCK", 64)  # several blocks
    generator = torch.Generator().manual_seed(n)
    a, b = torch.randn(3, 11, n, generator=generator), torch.randn(3, 9, n, generator=generator)
    a[:, 0], b[:, 0] = 0, 0  # the sign of 0 is -1
    packed_a, packed_b = bits.pack(a), bits.pack(b)
    assert packed_a.dtype == np.uint64 and packed_a.shape == (3, 11, math.ceil(n / 64))
    signs = sign(a, zero=-1) @ sign(b, zero=-1).mT
    assert torch.equal(torch.from_numpy(bits.dot_signs(packed_a, packed_b, n)).float(), signs)
    ones = (a > 0).float() @ sign(b, zero=-1).mT
    assert torch.equal(torch.from_numpy(bits.dot_zero_one(packed_a, packed_b)).float(), ones)
    assert torch.equal(bits.unpack(packed_a, n), sign(a, zero=-1))


def test_layers_count_the_integers_of_the_simulation():
    torch.manual_seed(0)
    layer = BinaryLinear.of(nn.Linear(70, 9), sign_of_zero=-1)
    x = torch.randn(2, 5, 70).round(decimals=0)  # with exact zeros
    counted = packed(nn.Sequential(layer))[0].sums(x)
    signs = torch.where(x > 0, 1.0, -1.0) @ layer.signs().mT
    assert torch.equal(counted, signs) and signs.abs().max() > 3


def test_packed_file_is_as_small_as_told_and_loads_equal(tmp_path):
    model, images = build("nextvit_nano")
    fresh, floats = copy.deepcopy(model), sum(p.numel() for p in model.parameters())
    binary = quantize(model, images)
    small = packed(binary)
    layers = find(small, PackedLinear)
    inside = tuple(f"{name}." for name in layers)
    rest = [tensor for name, tensor in small.state_dict().items() if not name.startswith(inside)]
    words = sum(len(m.scale) * math.ceil(m.in_features / 64) * 8 for m in layers.values())
    scales = sum(2 * 4 * len(m.scale) for m in layers.values())  # and biases
    assert packed_bytes(small) == words + scales + sum(t.nbytes for t in rest) < floats
    path = save_packed(small, tmp_path / "small.safetensors")
    assert packed_bytes(small) < path.stat().st_size < packed_bytes(small) + 40_000
    loaded = load_packed(fresh, path)
    with torch.no_grad():
        assert torch.equal(loaded(images), small(images))
    with pytest.raises(CheckpointError, match="holds another model than this VisionTransformer"):
        load_packed(build("vit_nano")[0], path)
    with pytest.raises(CheckpointError, match="not a packed BiViT model"):
        load_packed(fresh, tmp_path / "nothing.safetensors")


def test_what_cannot_be_done_is_refused():
    model, images = build("vit_nano")
    for options in ({"weights": 8}, {"activations": 4}, {"mlp_activations": 8}, {"scale": "max"}, {"stages": 3}):
        with pytest.raises(CompressionError, match=rf"bivit takes {next(iter(options))}="):
            quantize(model, images, **options)
    with pytest.raises(CompressionError, match="has no binary layers"):
        packed(model)
    with pytest.raises(CompressionError, match="sign_of_zero=-1"):
        packed(quantize(model, images, sign_of_zero=0))


TRAIN = 512  # of the 720 images


class Batches:
    """Batches of images and labels in an order that is the same in every run."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels
        self.generator = torch.Generator().manual_seed(0)

    def __iter__(self):
        for chosen in torch.randperm(len(self.images), generator=self.generator).split(64):
            yield self.images[chosen], self.labels[chosen]


def digits() -> tuple[nn.Module, Tensor, Tensor]:
    """A small vision transformer that reads four handwritten digits, the digits, and their labels."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(n_class=4, return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1, torch.tensor(labels)
    torch.manual_seed(0)
    small = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 48, "depth": 2, "global_pool": "avg"}
    model = vitalloy.create_model("vit_nano", num_classes=4, **small)
    finetune(model, Batches(images[:TRAIN], labels[:TRAIN]), epochs=8, lr=4e-3)
    return prepared(model), images, labels


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return (model(images[TRAIN:]).argmax(1) == labels[TRAIN:]).float().mean().item()


def test_training_in_stages_brings_the_accuracy_back():
    model, images, labels = digits()
    state = torch.get_rng_state()
    untrained = quantize(copy.deepcopy(model), images[:32], mlp_activations=1)
    seen = []
    trained = quantize(
        copy.deepcopy(model),
        images[:32],
        mlp_activations=1,
        train=Batches(images[:TRAIN], labels[:TRAIN]),
        epochs=4,
        lr=4e-3,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert torch.equal(state, torch.get_rng_state()), "the caller's random state moved"
    assert seen == [(i, 8) for i in range(1, 9)]
    assert not trained.training and all(m.activation_bits == 1 for m in find(trained, BinaryLinear).values())
    before, after = (accuracy(m, images, labels) for m in (untrained, trained))
    assert after > before + 0.2, (before, after)
    with torch.no_grad():
        assert torch.equal(packed(trained)(images[TRAIN:]), trained(images[TRAIN:]))

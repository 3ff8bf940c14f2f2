"""EasyQuant, FQ-ViT, PTQ4ViT and RepQ-ViT on any backbone: near the float model at 8 bits, and what each adds."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import vitalloy
from vitalloy.compression import accounting, scale_search
from vitalloy.compression.norm_folding import fold, norms_and_layers
from vitalloy.compression.quantization import quantize
from vitalloy.compression.quantization.fq_vit import IntegerAttend, IntegerLayerNorm
from vitalloy.compression.quantizers import LogSqrt2, TwinGelu, TwinSoftmax, Uniform
from vitalloy.compression.simulated import quantized_layers
from vitalloy.errors import CompressionError

METHODS = ("easyquant", "fq_vit", "ptq4vit", "repq_vit")
BACKBONES = ("vit_nano", "swin_nano", "efficientformerv2_nano", "pvt_v2_nano", "nextvit_nano")
SEARCHED = ("easyquant", "ptq4vit")  # with rounds


@pytest.fixture(scope="module")
def digits():
    """A small model that reads digits, calibration images, test images and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 8 - 1  # (1797, 1, 8, 8)
    labels = torch.from_numpy(data.target)
    kept = torch.arange(len(images)) % 4 > 0
    train, truth = images[kept], labels[kept]
    torch.manual_seed(0)
    model = vitalloy.create_model(
        "vit_nano", num_classes=10, in_chans=1, img_size=8, patch_size=2, embed_dim=32, depth=2, num_heads=2
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(12):
        for rows in torch.randperm(len(train)).split(50):
            loss = nn.functional.cross_entropy(model(train[rows]), truth[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval(), train[:32], images[~kept], labels[~kept]


def accuracy(model: nn.Module, digits) -> float:
    with torch.no_grad():
        return (model(digits[2]).argmax(-1) == digits[3]).float().mean().item()


@pytest.mark.parametrize("method", METHODS)
def test_eight_bits_keep_the_accuracy(method, digits):
    model, images, *_ = digits
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options = {"rounds": 1} if method in SEARCHED else {}
    made = quantize(model, images, method, **options)
    assert accuracy(model, digits) > 0.8
    assert accuracy(made, digits) > accuracy(model, digits) - 0.03
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    again = quantize(model, images, method, **options)
    with torch.no_grad():
        assert torch.equal(made(images), again(images))
    rows = accounting.table(made, images)
    assert len(rows) == 12 and all(row["sqnr_db"] > 10 for row in rows if row["sqnr_db"] is not None)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", BACKBONES)
def test_every_layer_of_any_backbone_is_quantized(name, method, monkeypatch):
    monkeypatch.setattr(scale_search, "ROWS", 16)
    torch.manual_seed(0)
    model = vitalloy.create_model(name, num_classes=10, img_size=32).eval()
    images = torch.randn(8, 3, 32, 32)
    options = {"rounds": 1} if method in SEARCHED else {}
    if method in SEARCHED:
        around = scale_search.Candidates.around
        few = classmethod(lambda cls, *args: around(*args, steps=6))
        monkeypatch.setattr(scale_search.Candidates, "around", few)
    made = quantize(model, images, method, weights=6, activations=7, **options)
    with torch.no_grad():
        answer = made(images)
    assert answer.shape == (8, 10) and answer.isfinite().all()
    layers = quantized_layers(made).values()
    called = [layer for layer in layers if layer.weight_bits != 32]
    assert len(called) >= len(layers) - 4  # tables computed once may stay as they are
    for layer in called:
        attends = not hasattr(layer, "weight")
        assert layer.weight_bits == (7 if attends else 6)
        assert layer.activation_bits == 7 or (method == "ptq4vit" and not attends)  # what the image enters


def test_repq_absorbs_channels_of_unlike_range(digits):
    model, images, tests, _ = digits
    model = copy.deepcopy(model)
    for norm, layers in norms_and_layers(model, images):  # the same function, with channels up to 16 times as wide
        steps = 2.0 ** -(torch.arange(len(norm.weight)) % 5)
        fold(norm, layers, steps, torch.zeros_like(steps))
    with torch.no_grad():
        exact = model(tests)
        assert torch.allclose(exact, digits[0](tests), atol=1e-4)
        folded, plain = (
            (quantize(model, images, "repq_vit", weights=6, activations=6, reparameterize=on)(tests) - exact).norm()
            for on in (True, False)
        )
    assert folded < 0.7 * plain


def test_each_method_has_its_own_grids(digits):
    model, images, *_ = digits
    fq = quantize(model, images, "fq_vit")
    assert all(isinstance(m, IntegerLayerNorm) for m in fq.modules() if isinstance(m, nn.LayerNorm))
    attend = fq.blocks[0].attn.attend
    assert isinstance(attend, IntegerAttend) and attend.map_quantizer.bits == 4
    uniform = quantize(model, images, "fq_vit", attention=8, integer_softmax=False)
    assert isinstance(uniform.blocks[0].attn.attend.map_quantizer, Uniform)

    twin = quantize(model, images, "ptq4vit", rounds=1)
    block = twin.blocks[0]
    assert isinstance(block.attn.attend.map_quantizer, TwinSoftmax)
    assert isinstance(block.mlp.fc2.input_quantizer, TwinGelu)
    assert len(block.attn.qkv.weight_quantizer.scale.unique()) == 3
    assert twin.patch_embed.proj.activation_bits == 32
    assert (
        quantize(model, images, "ptq4vit", rounds=1, as_published=True).blocks[0].attn.attend.map_quantizer.as_published
    )

    repq = quantize(model, images, "repq_vit", activations=4)
    assert isinstance(repq.blocks[0].attn.attend.map_quantizer, LogSqrt2)
    gamma = model.blocks[0].norm1.weight / repq.blocks[0].norm1.weight  # r: a channel's step over the common one
    assert gamma.min() < 0.95 < 1.05 < gamma.max()

    easy = quantize(model, images, "easyquant", rounds=1)
    for layer in quantized_layers(easy).values():
        grids = [m for m in layer.modules() if isinstance(m, Uniform)]
        assert len(grids) in (2, 4) and all(grid.signed and grid.scale.numel() == 1 for grid in grids)


@pytest.mark.parametrize("method", METHODS)
def test_bits_out_of_range_are_refused(method, digits):
    with pytest.raises(CompressionError, match=r"weights=1 .* 2 to 8"):
        quantize(digits[0], digits[1], method, weights=1)

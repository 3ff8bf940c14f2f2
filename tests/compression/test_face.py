"""The one face of the quantizers: what it refuses, what it reports, and the parts that all methods stand on."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import vitalloy
from vitalloy.benchmark import count
from vitalloy.compression import accounting
from vitalloy.compression.calibration import fisher_loss, images_for, prepared, record
from vitalloy.compression.finetune import finetune
from vitalloy.compression.quantization import METHODS, quantize
from vitalloy.compression.quantizers import symmetric
from vitalloy.compression.simulated import QuantizedAttend, float_modules, simulate
from vitalloy.errors import CompressionError


def model(name: str = "vit_nano", **kwargs):
    torch.manual_seed(0)
    return vitalloy.create_model(name, num_classes=10, img_size=32, **kwargs).eval()


def images(count: int = 32, size: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("calibration", "says"),
    [
        (None, "no images"),
        ([], "no images"),
        (images(3), "3 images"),
        (torch.ones(16, 3, 32, 32), "all calibration images are the same"),
        (images()[:, :1], "do not fit"),
        (images()[0], "tensors (B, C, H, W)"),
        ([images(8), images(8, size=16)], "differ in shape"),
        (images().log(), "not finite"),
        (["x.png"], "str"),
    ],
)
def test_a_calibration_set_that_cannot_be_used_is_named(calibration, says):
    with pytest.raises(CompressionError) as caught:
        quantize(model(), calibration, "easyquant")
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_weights_that_are_not_finite_are_named():
    broken = model()
    with torch.no_grad():
        broken.blocks[2].mlp.fc1.weight[0, 0] = float("nan")
    with pytest.raises(CompressionError, match=r"blocks\.2\.mlp\.fc1\.weight"):
        quantize(broken, images(), "easyquant")


@pytest.mark.parametrize("method", METHODS)
def test_bits_out_of_range_and_unknown_options_are_refused(method):
    for options in ({"weights": 0}, {"weights": 33}, {"wieghts": 4}):
        with pytest.raises(CompressionError):
            quantize(model(), images(), method, **options)
    with pytest.raises(CompressionError, match="Did you mean"):
        quantize(model(), images(), method[:-1] + "x")


def test_few_images_and_another_size_are_remarked_on(caplog):
    logger = logging.getLogger("vitalloy")
    logger.propagate = True  # a command may have turned it off
    assert images_for(model(), images(8, size=64)).shape == (8, 3, 64, 64)
    assert "Only 8 calibration images" in caplog.text and "64x64 for a model of 32x32" in caplog.text


def test_a_loader_of_labelled_batches_is_a_calibration_set_too():
    batches = [(images(16), torch.zeros(16)), (images(16), torch.zeros(16))]
    assert images_for(model(), batches, limit=24).shape == (24, 3, 32, 32)


@pytest.mark.parametrize("name", ["vit_nano", "swin_nano", "cvt_nano", "efficientformerv2_nano", "mobilevig_nano"])
def test_simulated_layers_compute_the_same_until_they_are_given_grids(name):
    ours, x = model(name), images(4)
    own = prepared(ours)
    layers = simulate(own)
    assert len(layers) > 20
    with torch.no_grad():
        torch.testing.assert_close(own(x), ours(x), atol=1e-4, rtol=1e-4)
        for layer in layers.values():
            if hasattr(layer, "weight"):
                layer.weight_quantizer = symmetric(layer.weight, 2, tuple(range(1, layer.weight.ndim)))
        assert (own(x) - ours(x)).abs().max() > 1e-3
    own(x).sum().backward()  # rounding lets gradients through
    first = next(layer for layer in layers.values() if hasattr(layer, "weight"))
    assert first.weight.grad is not None and first.weight.grad.abs().sum() > 0


def test_accounting_counts_every_product_and_every_bit():
    own = prepared(model())
    layers = simulate(own)
    for layer in layers.values():
        if hasattr(layer, "weight"):
            layer.weight_quantizer = symmetric(layer.weight.detach(), 4, tuple(range(1, layer.weight.ndim)))
            layer.input_quantizer = symmetric(torch.tensor([6.0]), 8)
    rows = accounting.table(own, images())
    assert sum(row["macs"] for row in rows) == count(model(), (3, 32, 32)).macs
    attention = [row for row in rows if row["kind"] == "attention"]
    assert len(attention) == 6 and all(row["weight_bits"] == row["activation_bits"] == 32 for row in attention)
    linear = sum(row["macs"] for row in rows if row["kind"] != "attention")
    assert accounting.bit_operations(rows) == 32 * linear + 1024 * sum(row["macs"] for row in attention)
    assert all(5 < row["sqnr_db"] < 40 for row in rows if row["kind"] != "attention")
    quantized = sum(layer.weight.numel() for layer in layers.values() if hasattr(layer, "weight"))
    whole = sum(v.numel() for v in [*own.parameters(), *own.buffers()])
    assert accounting.size_bytes(own) == quantized / 2 + 4 * (whole - quantized)


def test_modules_with_matrices_of_their_own_are_reported_as_float():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(3, 3))

        def forward(self, x):
            return torch.einsum("bchw,cd->bdhw", x, self.table)

    own = nn.Sequential(Odd(), nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    made = quantize(own, images(), "easyquant")
    assert float_modules(made) == ["0"]
    assert made[4].weight_bits == made[1].weight_bits == 8 and made(images(2)).shape == (2, 4)


def test_records_hold_what_a_layer_saw_and_its_gradient():
    own = prepared(model())
    layers = simulate(own)
    attend = next(layer for layer in layers.values() if isinstance(layer, QuantizedAttend))
    loss = lambda logits: fisher_loss(logits, torch.Generator().manual_seed(0))  # noqa: E731  as short as can be
    seen = record(own, [attend, own.head], images(8), batch_size=4, loss=loss)
    assert [x.shape[:2] for x in seen[attend].inputs] == [(8, 3)] * 3
    logits = own(images(8))
    torch.testing.assert_close(seen[own.head].output, logits.detach())
    # the gradient of a cross entropy is softmax - one hot: zero sum, and one entry below zero
    gradient = seen[own.head].gradient
    assert gradient.sum(1).abs().max() < 1e-5 and ((gradient < 0).sum(1) == 1).all()
    assert seen[attend].gradient.abs().sum() > 0 and all(p.grad is None for p in own.parameters())


def test_finetuning_learns_and_says_what_is_wrong():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    x = torch.randn(64, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    y = x.flatten(1)[:, :3].argmax(1)
    told = []
    losses = finetune(net, [(x, y)], epochs=30, lr=0.05, progress=lambda *at: told.append(at))
    assert losses[-1] < 0.7 * losses[0] and told[-1] == (30, 30) and not net.training
    with pytest.raises(CompressionError, match="no training images"):
        finetune(net, [], epochs=1, lr=0.1)
    with pytest.raises(CompressionError, match="smaller learning rate"):
        finetune(net, [(x * float("inf"), y)], epochs=1, lr=0.1)

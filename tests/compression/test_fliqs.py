"""FLIQS: the formats are the standard ones, the search finds what it must, resumes, and works on any backbone."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import vitalloy
from vitalloy.benchmark.complexity import count
from vitalloy.compression.quantization import fliqs
from vitalloy.compression.quantizers import Uniform
from vitalloy.errors import CompressionError

BACKBONES = {  # name: image size
    "vit_nano": 32,
    "swin_nano": 32,
    "pvt_v2_nano": 32,
    "efficientformerv2_nano": 32,
    "mobilevig_nano": 32,
    "mobilevitv2_050": 64,
}


def create(name: str) -> nn.Module:
    torch.manual_seed(0)
    size = BACKBONES[name]
    own = {} if name == "mobilevitv2_050" else {"img_size": size}
    return vitalloy.create_model(name, num_classes=10, **own).eval()


class Sensitive(nn.Module):
    """Four layers that copy their input. The second has one huge unused weight, so that 4 bits round the rest to 0."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(width, width) for _ in range(4)))
        for layer in self.layers:
            nn.init.eye_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.layers[1].weight.data[0, 0] = 40.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 5 * self.layers(x.flatten(1))


def sensitive_batches(count: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """One-hot images of classes 1 to 7: the channel of the huge weight is always 0."""
    labels = torch.randint(1, 8, (count, 32), generator=torch.Generator().manual_seed(0))
    return [(nn.functional.one_hot(y, 8).float().view(-1, 1, 2, 4), y) for y in labels]


def test_small_floats_are_the_hardware_formats():
    for name, dtype in (("E4M3", torch.float8_e4m3fn), ("E5M2", torch.float8_e5m2), ("BF16", torch.bfloat16)):
        number_format = fliqs.parse(name)
        top = number_format.largest if number_format.exponent else 1e4
        x = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-7, 2, 20_000)
        x = torch.cat([x.clamp(-top, top), torch.tensor([0.0, top, -top])])
        assert torch.equal(fliqs.fake_quantize(x, name), x.to(dtype).float()), name


def test_grids_hold_two_to_the_bits_values():
    for name in ("INT2", "INT5", "E2M1", "E3M0", "E2M2", "E3M2", "E3M3"):
        number_format = fliqs.parse(name)
        x = torch.linspace(-number_format.largest, number_format.largest, 200_001, dtype=torch.float64)
        values = fliqs.fake_quantize(x, name).unique()
        assert len(values) == 2**number_format.bits - 1, name  # two zeros, or the most negative integer, are not hit


def test_costs_follow_the_layers_work():
    model = create("vit_nano")
    layers = fliqs.searchable(model)
    work, attention = fliqs.measure(model, layers, torch.zeros(1, 3, 32, 32))
    assert sum(w.macs for w in work.values()) + attention == count(create("vit_nano"), (3, 32, 32)).macs
    table = fliqs.CostTable.of(work, {n: [n] for n in layers}, ["INT4", "E4M3", "INT4/INT8"])
    macs = sum(w.macs for w in work.values())
    for option, product in ((0, 16), (1, 64), (2, 32)):
        assert table.cost(torch.full((len(layers),), option)) == pytest.approx(macs * product / 1e9)
    assert table.reach == pytest.approx((table.uniform(4), table.uniform(8)))


def test_the_search_keeps_the_sensitive_layer_at_eight_bits():
    model = Sensitive()
    bits = [4, 8, 4, 4]
    target = sum(64 * b * b for b in bits) / 1e9
    before = torch.get_rng_state()
    found = fliqs.search(model, sensitive_batches(), target=target, steps=300, lr=0.0)
    assert torch.equal(torch.get_rng_state(), before)
    assert found.formats == {f"layers.{i}": f"INT{b}" for i, b in enumerate(bits)}
    assert found.cost == pytest.approx(target)
    assert found.history["entropy"][0] > 0.6 and found.history["entropy"][-1] < 0.1
    assert {layer.format for layer in model.layers} == {"INT4", "INT8"}
    assert len(found.history["cost"]) == 300


def test_an_interrupted_search_ends_as_an_uninterrupted_one(tmp_path):
    images = torch.randn(48, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    data = torch.utils.data.TensorDataset(images, torch.arange(48) % 10)

    def run(progress=None, checkpoint=None, steps=8):
        torch.manual_seed(0)
        model = vitalloy.create_model("vit_nano", num_classes=10, img_size=32, depth=2, drop_path_rate=0.5)
        loader = torch.utils.data.DataLoader(data, 16, shuffle=True, generator=torch.Generator().manual_seed(1))
        options = {"steps": steps, "delay": 2, "lr": 1e-3, "checkpoint": checkpoint, "checkpoint_every": 1}
        return fliqs.search(model, loader, progress=progress, formats="fliqs-l-float", **options)

    def stop(done, _steps):
        if done == 5:
            raise KeyboardInterrupt

    state = tmp_path / "state.pt"
    whole = run()
    with pytest.raises(KeyboardInterrupt):
        run(stop, state)
    resumed = run(checkpoint=state)
    assert resumed == whole  # formats, costs and the whole history
    for mine, theirs in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)

    whole.save(tmp_path / "found.json")
    assert fliqs.Found.load(tmp_path / "found.json") == whole
    with pytest.raises(CompressionError, match="is of another search: its steps was 8, now it is 9"):
        run(checkpoint=state, steps=9)


@pytest.mark.parametrize("name", BACKBONES)
def test_a_mixed_map_runs_forward_and_backward(name):
    size = BACKBONES[name]
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    plain, model = create(name), create(name)
    cycle = ("INT4", "E2M1", "INT8", "E4M3", "BF16", "INT6/INT8")
    names = [n for n, m in plain.named_modules() if type(m) in (nn.Linear, nn.Conv2d)]
    formats = {n: cycle[i % len(cycle)] for i, n in enumerate(names)}
    model = fliqs.quantize(model, images, formats=json.loads(json.dumps(formats)))
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "format")}
    assert {n: m.format for n, m in layers.items()} == formats
    widths = {"INT4": 4, "E2M1": 4, "INT8": 8, "E4M3": 8, "BF16": 16, "INT6/INT8": 6}
    assert all(m.weight_bits == widths[m.format] for m in layers.values())
    logits = model(images)
    assert logits.isfinite().all() and not torch.allclose(logits, plain(images), rtol=1e-4)
    logits.square().sum().backward()
    for n, layer in layers.items():
        assert layer.weight.grad is not None and layer.weight.grad.isfinite().all(), n

    exact = fliqs.quantize(create(name), images, weights=32, activations=32)
    torch.testing.assert_close(exact(images), plain(images))


def test_static_scales_keep_the_answer_on_their_own_images():
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    dynamic = fliqs.quantize(create("vit_nano"), images, weights=4, activations=8)
    static = fliqs.quantize(create("vit_nano"), images, weights=4, activations=8, static=True)
    with torch.no_grad():
        torch.testing.assert_close(static(images), dynamic(images), rtol=1e-3, atol=1e-4)
        alone = static(images[:1]) - static(images)[:1]
    assert alone.abs().max() < 1e-4  # a constant scale does not see the rest of the batch
    assert all(isinstance(m.input_quantizer, Uniform) for m in static.modules() if hasattr(m, "format"))


def test_blocks_decide_together():
    model = create("vit_nano")
    names = [n for n, m in model.named_modules() if type(m) in (nn.Linear, nn.Conv2d)]
    groups = fliqs.grouped(names, model, "block")
    assert groups["blocks.0"] == [n for n in names if n.startswith("blocks.0.")] and groups["head"] == ["head"]
    assert fliqs.grouped(names, model, "model") == {"model": names}
    assert sum(map(len, fliqs.grouped(names, model, ["blocks.*", "[!b]*"]).values())) == len(names)
    with pytest.raises(CompressionError, match=r"'head' fits none"):
        fliqs.grouped(names, model, ["blocks.*", "patch_embed*"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"weights": 1}, "weights=1: formats have 2 to 8 bits"),
        ({"formats": {"layers.0": "INT44"}}, "'INT44' is no number format"),
        ({"formats": {"layer.0": "INT4"}}, "'layer.0', which is no quantizable layer.*Did you mean 'layers.0'"),
        ({"formats": {}, "train": sensitive_batches()}, "not both"),
        ({"target_bits": 5}, "give `train`"),
        ({"train": sensitive_batches(), "weights": 4}, "a search takes target_bits"),
        ({"train": sensitive_batches(), "target_bits": 12}, r"from 4.096e-06 to 1.638e-05 GBOPs, which is 4 to 8 bits"),
        ({"train": sensitive_batches(), "space": "fliqs-xl"}, "is no search space.*fliqs-s-int"),
        ({"train": []}, "no training images"),
        ({"train": iter(sensitive_batches())}, "only once"),
        ({"train": sensitive_batches(), "steps": 0}, "at least one step"),
        ({"exclude": ["head"]}, "exclude='head' fits no layer"),
    ],
)
def test_what_cannot_be_is_refused(options, says):
    with pytest.raises(CompressionError, match=says):
        fliqs.quantize(Sensitive(), sensitive_batches()[0][0], **options)


def test_the_exponential_rewards_need_a_positive_quality():
    with pytest.raises(CompressionError, match="quality='accuracy'"):
        fliqs.search(Sensitive(), sensitive_batches(), reward="hard_exponential", steps=2)
    found = fliqs.search(Sensitive(), sensitive_batches(), reward="hard_exponential", quality="accuracy", steps=2)
    assert max(found.history["quality"]) <= 1

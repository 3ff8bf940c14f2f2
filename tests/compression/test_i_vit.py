"""I-ViT: any backbone in integers, the same in simulation, in the integer runtime and in ONNX Runtime."""

from __future__ import annotations

import copy

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vitalloy
from vitalloy.compression.quantization import i_vit
from vitalloy.compression.quantization.i_vit import arithmetic, layers
from vitalloy.compression.quantization.i_vit.integer import in_double
from vitalloy.deployment import OnnxModel
from vitalloy.errors import CompressionError
from vitalloy.layers.fusion import fuse

SMALL = {"num_classes": 10, "img_size": 8, "in_chans": 1, "patch_size": 2, "embed_dim": 48, "depth": 2}


def built(name: str, gain: float, **arguments: object) -> nn.Module:
    """A model with weights that keep the size of what passes, not those of a start of training, which shrink it."""
    torch.manual_seed(0)
    model = vitalloy.create_model(name, num_classes=10, **arguments)
    for parameter in model.parameters():
        if parameter.ndim > 1 and len(parameter) > 1:
            nn.init.normal_(parameter, std=gain * parameter[0].numel() ** -0.5)
    return fuse(model).requires_grad_()


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(data.images[:, None] / 8 - 1, dtype=torch.float32)[order], torch.tensor(data.target)[order]


@pytest.fixture(scope="module")
def trained(digits) -> nn.Module:
    torch.manual_seed(0)
    model = vitalloy.create_model("vit_nano", **SMALL)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(25):
        for at in torch.randperm(1400).split(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(digits[0][at]), digits[1][at]).backward()
            optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def quantized(trained, digits) -> torch.fx.GraphModule:
    return i_vit.quantize(copy.deepcopy(trained), digits[0][:256])


def accuracy(model: nn.Module, digits: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        return (model(digits[0][1400:]).argmax(-1) == digits[1][1400:]).float().mean().item()


class Kinds(TorchDispatchMode):
    """Notes of every operation whether a real number goes in or comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.real: list[bool] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        self.real.append(any(t.is_floating_point() for t in tensors))
        return out


def assert_integers_alone(runtime: nn.Module, example: Tensor) -> None:
    """Real numbers only until the image is quantized and when the logits are scaled."""
    with torch.no_grad(), Kinds() as kinds:
        runtime(example)
    start, end = kinds.real.index(False), len(kinds.real) - kinds.real[::-1].index(False)
    assert end - start > 50 and not any(kinds.real[start:end]), "a real number among the integers"
    assert start <= 5 and len(kinds.real) - end <= 3, "real numbers outside of the scaling of image and logits"


def test_accuracy_stays_and_the_runtime_gives_the_same_integers(trained, quantized, digits):
    runtime = i_vit.to_integer(quantized)
    before, simulated = accuracy(trained, digits), accuracy(quantized, digits)
    assert before > 0.85 and simulated > before - 0.03
    with torch.no_grad():
        exact = in_double(quantized)(digits[0][1400:1500].double())
        assert torch.equal(runtime(digits[0][1400:1500]), exact.float())
    assert_integers_alone(runtime, digits[0][:2])


def test_a_walk_finds_a_real_operation(quantized, digits):
    class Cheating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.runtime = i_vit.to_integer(quantized)

        def forward(self, x: Tensor) -> Tensor:
            return (self.runtime(x).softmax(-1) * 100).int()

    with pytest.raises(AssertionError, match="real number"):
        assert_integers_alone(Cheating(), digits[0][:2])


def test_a_reloaded_model_computes_the_same(trained, quantized, digits):
    again = i_vit.convert(copy.deepcopy(trained), digits[0][:2])
    again.load_state_dict(quantized.state_dict())
    with torch.no_grad():
        assert torch.equal(again(digits[0][:50]), quantized(digits[0][:50]))
    assert not any(m.running for m in again.modules() if isinstance(m, layers.QuantAct))
    assert set(trained.state_dict()) <= set(quantized.state_dict())


def test_training_on_the_grids_learns(trained, digits):
    broken = copy.deepcopy(trained)
    with torch.no_grad():
        broken.head.weight.mul_(0.1)
        for block in broken.blocks:
            block.mlp.fc1.weight.add_(
                0.1 * torch.randn(block.mlp.fc1.weight.shape, generator=torch.Generator().manual_seed(0))
            )
    before = accuracy(i_vit.quantize(copy.deepcopy(broken), digits[0][:256]), digits)
    train = [(digits[0][at], digits[1][at]) for at in torch.arange(1400).split(100)]
    steps: list[tuple[int, int]] = []
    model = i_vit.quantize(
        broken, digits[0][:256], train=train, epochs=2, lr=1e-3, progress=lambda *step: steps.append(step)
    )
    assert accuracy(model, digits) > before + 0.02 and steps[-1] == (10, 10)


@pytest.mark.slow
def test_onnx_gives_the_same_logits(digits, tmp_path):
    import onnx
    import onnxruntime

    model = vitalloy.create_model("vit_nano", **{**SMALL, "depth": 1}).eval()
    runtime = i_vit.to_integer(i_vit.quantize(model, digits[0][:32]))
    path = i_vit.export_integer_onnx(runtime, digits[0][:2], tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    noise = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    for images in (digits[0][1400:1411], noise):
        assert torch.equal(torch.from_numpy(session.run(None, {"image": images.numpy()})[0]), runtime(images))
    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    kinds = {node.op_type for node in graph.node}
    assert {"MatMulInteger", "ConvInteger", "BitShift"} <= kinds
    assert not kinds & {"MatMul", "Gemm", "Conv", "Softmax", "Erf", "LayerNormalization", "Sqrt", "Exp"}
    types = {info.name: info.type.tensor_type.elem_type for info in graph.value_info}
    assert len(types) > 100 and sum(kind in (1, 10, 11) for kind in types.values()) <= 16


def test_parts_of_a_split_are_loaded_by_onnx_runtime(tmp_path):
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Conv2d(3, 24, 4, 4), nn.Linear(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            one, two = self.embed(x).split([8, 16], dim=1)
            left, right = two.chunk(2, dim=1)
            return self.head((one.relu() + left - right).mean((2, 3)))

    torch.manual_seed(0)
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    runtime = i_vit.to_integer(i_vit.quantize(Halves().eval(), images))
    path = i_vit.export_integer_onnx(runtime, images[:2], tmp_path / "halves.onnx")
    assert torch.equal(OnnxModel(path)(images), runtime(images))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "gain", "least"),
    [
        ("swin_nano", 32, 1.0, 0.9),
        ("cvt_nano", 32, 1.0, 0.9),
        ("efficientformer_nano", 32, 1.0, 0.9),
        ("pvt_v2_nano", 32, 1.0, 0.9),
        ("duoformer_nano", 32, 1.0, 0.9),
        ("mobilevitv2_050", 64, 1.6, 0.5),  # 8 bits a tensor cost untrained MobileViTs much
    ],
)
def test_any_backbone(name, size, gain, least):
    model = built(name, gain, **({} if name.startswith("mobilevit") else {"img_size": size}))
    images = torch.randn(6, 3, size, size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted = model(images)
        made = i_vit.quantize(model, images)
        got, runtime = made(images), i_vit.to_integer(made)
        assert torch.equal(runtime(images[:3]), in_double(made)(images[:3].double()).float())
    assert made.float_nodes == []
    similarity = nn.functional.cosine_similarity(got - got.mean(0), wanted - wanted.mean(0))
    assert similarity.min() > least
    assert_integers_alone(runtime, images[:2])


def test_what_has_no_integer_form_is_named_or_stays_in_floating_point():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wave, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.wave(x).sin().mean((2, 3)))

    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    with pytest.raises(CompressionError, match=r"sin in the model.*allow_float"):
        i_vit.quantize(Odd().eval(), images)
    torch.manual_seed(0)
    model = Odd().eval()
    made = i_vit.quantize(copy.deepcopy(model), images, allow_float=True)
    assert copy.deepcopy(made).float_nodes == ["sin in the model"]
    assert (made(images) - model(images)).abs().max() < 0.05
    assert (i_vit.to_integer(made)(images) - made(images)).abs().max() < 0.02


def test_other_bits_are_refused(trained, digits):
    with pytest.raises(CompressionError, match="weights=4"):
        i_vit.quantize(trained, digits[0][:8], weights=4)
    with pytest.raises(CompressionError, match="activations=16"):
        i_vit.quantize(trained, digits[0][:8], activations=16)


@pytest.mark.parametrize("scale", [0.0005, 0.004, 0.03])
def test_the_shift_functions_stay_near_the_real_ones(scale):
    """At every step size, also where the authors' sums saturate."""
    x = torch.arange(-127.0, 128.0, dtype=torch.float64).repeat(3, 1) * scale
    pair = x, torch.tensor([scale], dtype=torch.float64)
    real = x.softmax(-1)
    assert (layers.Shiftmax()(pair)[0] - real).abs().max() < 0.08 * real.max()
    assert (layers.ShiftGate()(pair)[0] - nn.functional.gelu(x)).abs().max() < 0.02 + 0.01 * x.max()


def test_a_residual_of_halves_rounds_to_even():
    """Ties are where a rounding that is merely near goes wrong."""
    from vitalloy.compression.quantization.i_vit.runtime import Rescale

    z = torch.arange(-4096, 4097)
    for ratio in (0.5, 0.25, 0.375, -0.5, 0.001, 3.0):
        want = arithmetic.rescale(z.double() * ratio, torch.tensor([ratio]).double(), torch.tensor([1.0]))
        for bound in (4096, 2**33):  # in one product and in two
            assert torch.equal(Rescale(torch.tensor([ratio]).double(), bound)(z).double(), want), (ratio, bound)

"""Weight files: the authors' under their names, ours, and everything that is neither."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import vitalloy
from vitalloy.applications.deepfake import NetworkA, NetworkB, load_network, open_networks, save_network
from vitalloy.applications.deepfake.weights import PUBLISHED
from vitalloy.errors import CheckpointError

sys.path.insert(0, str(Path(__file__).parents[2] / "parity"))
import golden

RECORDS = Path(__file__).parents[2] / "parity" / "goldens" / "genconvit"


@pytest.fixture(scope="module")
def published() -> dict[str, torch.Tensor]:
    """Network A's weights under the authors' names, the Swin that they never use included."""
    return {k: v.float() for k, v in golden.state_of(golden.load(RECORDS / "ed_tiny_224.json")).items()}


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before PyTorch 1.6"])
def test_the_authors_file_loads(tmp_path, published, image, zipped):
    file = tmp_path / PUBLISHED["a"]
    torch.save({"epoch": 4, "state_dict": published}, file, _use_new_zipfile_serialization=zipped)
    network, source = load_network(file)
    expected = NetworkA().eval()
    vitalloy.load_checkpoint(expected, published)
    with torch.no_grad():
        assert torch.allclose(network(image), expected(image), atol=1e-4)
    assert (source.net, source.file) == ("a", file.name)
    assert len(source.sha256) == 64
    assert "DFDC" in source.about


def test_half_precision_files_run_in_float32(tmp_path, published, image):
    file = tmp_path / "half.pth"
    torch.save({k: v.half() for k, v in published.items()}, file)
    network, source = load_network(file)
    assert network(image).dtype == torch.float32
    assert source.about == "not said in the file"


def test_network_b_is_told_by_its_keys_and_drops_what_it_never_uses(tmp_path):
    torch.manual_seed(0)
    network = NetworkB("convnext_tiny", img_size=64, logvar=True)
    file = save_network(network, tmp_path / "b.safetensors", {"summary": "trained on nothing"})
    loaded, source = load_network(file)
    assert (source.net, source.about) == ("b", "trained on nothing")
    image = torch.randn(2, 3, 64, 64)
    assert torch.allclose(loaded(image), network.eval()(image), atol=1e-4)


@pytest.mark.parametrize("net", [NetworkA, NetworkB])
def test_our_file_comes_back_with_its_backbone_and_size(tmp_path, net):
    torch.manual_seed(0)
    network = net("pvt_v2_nano", img_size=64).eval()
    loaded, _ = load_network(save_network(network, tmp_path / "mine.safetensors", {}))
    image = torch.randn(2, 3, 64, 64)
    assert torch.allclose(loaded(image), network(image), atol=1e-5)
    assert loaded.build_args == network.build_args


def test_networks_come_a_before_b_and_only_those_given(tmp_path):
    a, b = (save_network(n("pvt_v2_nano", 64), tmp_path / f"{n.net}.safetensors", {}) for n in (NetworkA, NetworkB))
    assert [s.net for _, s in open_networks([b, a])] == ["a", "b"]
    assert [s.net for _, s in open_networks([b])] == ["b"]
    assert [s.net for _, s in open_networks([b, a], "A")] == ["a"]
    with pytest.raises(CheckpointError, match="second file for network A"):
        open_networks([a, a])
    with pytest.raises(CheckpointError, match="a, b or ab"):
        open_networks([a], "c")


def test_untrained_networks_only_on_request(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match=r"genconvit_ed_inference\.pth as Deressa/GenConViT"):
        open_networks()
    ((network, source),) = open_networks(nets="a", demo=True)
    ((again, _),) = open_networks(nets="a", demo=True)
    assert source.file is None
    assert torch.equal(network.fc.weight, again.fc.weight)


def test_other_files_are_refused(tmp_path):
    vit = tmp_path / "vit.pth"
    torch.save(vitalloy.create_model("vit_tiny_patch16_224").state_dict(), vit)
    with pytest.raises(CheckpointError, match="neither network A nor network B"):
        load_network(vit)
    with pytest.raises(CheckpointError, match="no such file"):
        load_network(tmp_path / "nothing.pth")
    text = tmp_path / "text.onnx"
    text.write_text("no graph")
    with pytest.raises(CheckpointError, match="ONNX"):
        load_network(text)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(save_network(NetworkA("pvt_v2_nano", 64), tmp_path / "a.safetensors", {}).read_bytes()[:100_000])
    with pytest.raises(CheckpointError, match="not a complete safetensors"):
        load_network(cut)

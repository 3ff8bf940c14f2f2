"""The networks beyond their goldens: published counts, noise, folding, other backbones and sizes, losses."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitalloy.applications.deepfake.inspection import inspect
from vitalloy.applications.deepfake.model import NETWORKS, NetworkA, NetworkB, Outputs, loss_b
from vitalloy.errors import ModelError

SMALL = {"backbone": "pvt_v2_nano", "img_size": 64}
SWIN, PROJECTION = 28_288_354, 1000 * 768 + 768


def faces(side: int = 64, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_parameters_are_the_published_ones_without_what_nothing_uses():
    with torch.device("meta"):
        a, b, short = NetworkA(), NetworkB(logvar=True), NetworkB()
    unused = (25088 * 256 + 256) + (256 * 128 + 128) + (1000 * 500 + 500)  # linear layers of network B
    assert sum(p.numel() for p in a.parameters()) == 59_214_875 - SWIN - PROJECTION
    assert sum(p.numel() for p in b.parameters()) == 695_210_767 - SWIN - PROJECTION - unused
    assert sum(p.numel() for p in short.parameters()) == sum(p.numel() for p in b.parameters()) - 25089 * 12544


def test_network_b_draws_in_training_alone():
    torch.manual_seed(0)
    network, image = NetworkB(**SMALL), faces()
    assert not torch.equal(network.encoder.train()(image).z, network.encoder(image).z)
    latent = network.encoder.eval()(image)
    assert torch.equal(latent.z, latent.mean)
    assert torch.equal(network.encoder(image, torch.zeros_like(latent.z)).z, latent.z)


@pytest.mark.parametrize("net", NETWORKS)
def test_folding_changes_nothing(net):
    torch.manual_seed(0)
    network, image = NETWORKS[net](**SMALL).double(), faces(dtype=torch.float64)
    network.train()(image)  # norm statistics that matter
    expected = network.eval()(image, reconstruction=True)
    folded = copy.deepcopy(network).fuse()(image, reconstruction=True)
    assert torch.allclose(folded.logits, expected.logits, atol=1e-9)
    assert torch.allclose(folded.reconstruction, expected.reconstruction, atol=1e-9)
    assert expected.reconstruction.shape == image.shape


@pytest.mark.parametrize("net", NETWORKS)
def test_a_face_does_not_depend_on_its_batch(net):
    network, image = NETWORKS[net](**SMALL).double().eval(), faces(dtype=torch.float64)
    assert torch.allclose(network(image)[1:2], network(image[1:2]), atol=1e-9)


@pytest.mark.parametrize("backbone", ["convnext_tiny", "pvt_v2_nano", "vit_tiny_patch16_224"])
def test_inspection_gives_the_same_logits_and_maps_of_the_faces_size(backbone):
    torch.manual_seed(0)
    network, image = NetworkA(backbone, img_size=64).eval(), faces()
    found = inspect(network, image)
    expected = network(image, reconstruction=True)
    assert torch.allclose(found.logits, expected.logits, atol=1e-4)
    assert torch.allclose(found.errors, (expected.reconstruction - image).abs().mean(1), atol=1e-4)
    assert found.saliency.shape == (3, 64, 64)
    assert found.saliency.min() >= 0
    assert found.saliency.max() <= 1


class Brightness(nn.Module):
    """A backbone whose every output is the mean brightness."""

    num_features, build_args = 3, {"name": "brightness"}

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(x, 8)

    def forward_head(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((1, 2, 3)).unsqueeze(1).expand(-1, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


@pytest.mark.parametrize("sign", [1, -1])
def test_saliency_is_the_evidence_for_fake(sign):
    """Where brightness speaks for fake the bright corner is salient; where it speaks against, nothing is."""
    network = NetworkA(Brightness(), img_size=64).eval()
    torch.nn.init.constant_(network.fc.weight, 1e-3)
    network.fc2.weight.data = torch.tensor([[1e-3], [-1e-3]]).expand(2, 500) * sign
    image = torch.zeros(1, 3, 64, 64)
    image[..., :16, :16] = 3.0
    saliency = inspect(network, image).saliency[0]
    assert saliency[32:, 32:].max() == 0
    assert saliency[:12, :12].min() > 0.9 if sign > 0 else saliency.max() == 0


def test_kl_enters_the_loss_when_asked_for():
    network, image, target = NetworkB(**SMALL, logvar=True).eval(), faces(), torch.tensor([0, 1, 1])
    outputs = network(image, reconstruction=True)
    plain = loss_b(outputs, target, image)
    assert torch.isclose(loss_b(outputs, target, image, kl_weight=0.5), plain + 0.5 * outputs.kl.squeeze())
    with pytest.raises(ModelError, match="logvar"):
        loss_b(Outputs(outputs.logits, outputs.reconstruction), target, image, kl_weight=0.5)


def test_a_side_that_cannot_be_halved_is_refused():
    with pytest.raises(ModelError, match="multiple of 32"):
        NetworkA(img_size=100)

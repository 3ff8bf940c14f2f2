"""GenConViT: two networks that tell forged faces from genuine ones by the face and their own redrawing of it.

"GenConViT: Deepfake Video Detection Using Generative Convolutional Vision Transformer", Wodajo et al., 2023,
arXiv 2307.07036. The authors' files load: genconvit_ed_inference.pth (network A, an autoencoder) and
genconvit_vae_inference.pth (network B, a variational autoencoder). Class 0 is fake, class 1 is real.

We compute what the authors' code computes. What that code holds but never uses is not built, and is dropped from their
files: the Swin that the paper describes as the embedder and its projection (the ConvNeXt never calls them), three
linear layers of network B, and, unless `logvar` is set, the matrix of the log variance (1.26 GB), which enters only
the KL value that the authors leave out of the loss. Network B draws its latent with a width made from the mean, as
coded. The authors draw at inference too, so that answers change from run to run; here a network in evaluation mode
takes the mean unless noise is given.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitalloy.errors import ModelError
from vitalloy.layers.backbone import rename_keys
from vitalloy.layers.fusion import fuse
from vitalloy.registry import create_model

CLASSES = ("fake", "real")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WIDTH = 1000  # of the backbone's answer: its ImageNet classifier stays


class Outputs(NamedTuple):
    """Logits (B, 2); how the network redraws the faces (B, 3, S, S); network B's KL value (1,), or None."""

    logits: Tensor
    reconstruction: Tensor
    kl: Tensor | None = None


class Latent(NamedTuple):
    """z and its mean (B, L); log variance (B, L) and KL value (1,), or None where the encoder has no such head."""

    z: Tensor
    mean: Tensor
    logvar: Tensor | None
    kl: Tensor | None


class Encoder(nn.Module):
    """Faces (B, 3, S, S) -> (B, 256, S / 32, S / 32)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential()
        for a, b in ((3, 16), (16, 32), (32, 64), (64, 128), (128, 256)):
            # a ReLU behind the pooling gives what it gives before it, on a quarter of the values
            self.features.extend([nn.Conv2d(a, b, 3, 1, 1), nn.MaxPool2d(2), nn.ReLU()])

    def forward(self, image: Tensor) -> Tensor:
        return self.features(image)


class Decoder(nn.Module):
    """(B, 256, H, W) -> a picture (B, 3, H 2^n, W 2^n), n up-convolutions with `act` behind each, the last one too."""

    def __init__(self, widths: tuple[int, ...], act: type[nn.Module]) -> None:
        super().__init__()
        self.features = nn.Sequential()
        for a, b in itertools.pairwise(widths):
            self.features.extend([nn.ConvTranspose2d(a, b, 2, 2), act()])

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)


class VariationalEncoder(nn.Module):
    """Faces (B, 3, S, S) -> a latent vector; strided convolutions, then a linear layer larger than all the rest.

    Args:
        logvar: build the head of the log variance, which only the KL value needs.
    """

    def __init__(self, img_size: int = 224, latent_dims: int = 12544, logvar: bool = False) -> None:
        super().__init__()
        self.features = nn.Sequential()
        for a, b in ((3, 16), (16, 32), (32, 64), (64, 128)):
            self.features.extend([nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.LeakyReLU()])
        flat = 128 * (img_size // 16) ** 2
        self.mean = nn.Linear(flat, latent_dims)
        self.logvar = nn.Linear(flat, latent_dims) if logvar else None

    def forward(self, image: Tensor, eps: Tensor | None = None) -> Latent:
        """eps (B, L) is the noise; without it a standard normal draw in training and none in evaluation."""
        x = self.features(image).flatten(1)  # (C, H, W) order
        mean = self.mean(x)
        if eps is None and self.training:
            eps = torch.randn_like(mean)
        # the width of the draw comes from the mean, as in the published code
        z = mean if eps is None else mean + eps * (0.5 * mean).exp()
        if self.logvar is None:
            return Latent(z, mean, None, None)
        logvar = self.logvar(x)
        kl = -0.5 * (1 + logvar - mean.square() - logvar.exp()).sum(1)
        return Latent(z, mean, logvar, 0.5 * kl.mean(0, keepdim=True))

    def convert_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The authors' names to ours; two layers that nothing calls go, and the log variance where it is not built."""
        spread = None if self.logvar is None else "logvar."
        return rename_keys(state, ((r"^fc\d\.", None), (r"^mu\.", "mean."), (r"^(?:var|logvar)\.", spread)))


class Network(nn.Module, ABC):
    """What A and B share: a backbone that looks at the face and at its redrawing, and a classifier of both answers.

    Args:
        backbone: any model of the registry, by name, or one made with 1000 classes.
        img_size: S, the side of the faces in pixels; a multiple of 32.

    Attributes:
        net: "a" or "b".
        build_args: the arguments that build the network again.
    """

    net: str
    key_table = ((r"^(?:embedder|fc3)\.", None), (r"^convnext_backbone\.", "backbone."))

    def __init__(self, backbone: str | nn.Module, img_size: int, num_classes: int, act: nn.Module) -> None:
        super().__init__()
        if img_size < 32 or img_size % 32:
            raise ModelError(f"img_size={img_size}: GenConViT halves its input five times; give a multiple of 32.")
        if isinstance(backbone, str):
            backbone = create_model(backbone, num_classes=WIDTH, img_size=img_size)
        self.backbone = backbone
        self.fc = nn.Linear(2 * WIDTH, WIDTH // 2)
        self.fc2 = nn.Linear(WIDTH // 2, num_classes)
        self.act = act
        self.img_size = img_size
        name = backbone.build_args["name"]
        self.build_args: dict[str, Any] = {"backbone": name, "img_size": img_size, "num_classes": num_classes}

    def forward(self, image: Tensor, *eps: Tensor, reconstruction: bool = False) -> Tensor | Outputs:
        """Normalized faces (B, 3, S, S) -> logits (B, 2), or `Outputs` when the reconstruction is asked for.

        Args:
            eps: network B alone: the latent's noise (B, L); without it a standard normal draw in training and none
                in evaluation.
        """
        redrawn, kl = self.redraw(image, *eps)
        if redrawn.shape[-1] == image.shape[-1]:
            answers = self.backbone(torch.cat([redrawn, image]))  # both in one pass
            of_redrawn, of_image = answers[: image.shape[0]], answers[image.shape[0] :]
        else:
            of_image, of_redrawn = self.backbone(image), self.backbone(redrawn)
        logits = self.classify(of_image, of_redrawn)
        if not reconstruction:
            return logits
        if redrawn.shape[-1] != image.shape[-1]:
            redrawn = F.interpolate(redrawn, image.shape[-2:], mode="bilinear", align_corners=False)
        return Outputs(logits, redrawn, kl)

    @abstractmethod
    def redraw(self, image: Tensor, *eps: Tensor) -> tuple[Tensor, Tensor | None]:
        """The redrawing of faces, and network B's KL value."""

    def classify(self, of_image: Tensor, of_redrawn: Tensor) -> Tensor:
        """The backbone's answers to both views, (B, 1000) each -> logits (B, 2)."""
        views = (of_image, of_redrawn) if self.net == "b" else (of_redrawn, of_image)
        return self.fc2(self.act(self.fc(self.act(torch.cat(views, 1)))))

    def fuse(self) -> Network:
        """Fold norms and scales into the layers beside them, in place, for deployment; load weights first."""
        return fuse(self).requires_grad_(False)

    def convert_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A published (or own) state dict under our names, without what no output depends on."""
        state = rename_keys(state, self.key_table)
        for name in ("encoder", "backbone"):
            part = getattr(self, name)
            inner = {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
            state = {k: v for k, v in state.items() if not k.startswith(f"{name}.")}
            if name == "backbone" and not hasattr(part, "patch_embed"):  # the authors' unused Swin
                inner = {k: v for k, v in inner.items() if not k.startswith("patch_embed.")}
            state |= {f"{name}.{k}": v for k, v in getattr(part, "convert_state", dict)(inner).items()}
        return state


class NetworkA(Network):
    """The autoencoder ("ed"). Only its classifier is trained: no loss asks the redrawing to look like the face."""

    net = "a"

    def __init__(self, backbone: str | nn.Module = "convnext_tiny", img_size: int = 224, num_classes: int = 2) -> None:
        super().__init__(backbone, img_size, num_classes, nn.GELU())
        self.encoder = Encoder()
        self.decoder = Decoder((256, 128, 64, 32, 16, 3), nn.ReLU)

    def redraw(self, image: Tensor) -> tuple[Tensor, None]:
        return self.decoder(self.encoder(image)), None


class NetworkB(Network):
    """The variational autoencoder ("vae"); the backbone sees its redrawing at half the side.

    Args:
        logvar: build the head of the log variance too, for a loss with the KL term.
    """

    net = "b"

    def __init__(
        self,
        backbone: str | nn.Module = "convnext_tiny",
        img_size: int = 224,
        num_classes: int = 2,
        logvar: bool = False,
    ) -> None:
        super().__init__(backbone, img_size, num_classes, nn.ReLU())
        self.build_args["logvar"] = logvar
        self.grid = (256, img_size // 32, img_size // 32)
        self.latent_dims = math.prod(self.grid)
        self.encoder = VariationalEncoder(img_size, self.latent_dims, logvar)
        self.decoder = Decoder((256, 64, 32, 16, 3), nn.LeakyReLU)

    def redraw(self, image: Tensor, eps: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        latent = self.encoder(image, eps)
        return self.decoder(latent.z.unflatten(1, self.grid)), latent.kl


NETWORKS: dict[str, type[Network]] = {"a": NetworkA, "b": NetworkB}


def normalize(faces: Any) -> Tensor:
    """RGB faces (N, H, W, 3) of 0..255 -> what the networks take, (N, 3, H, W) float32."""
    x = torch.as_tensor(faces).movedim(-1, 1).float() / 255
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def loss_a(logits: Tensor, target: Tensor) -> Tensor:
    """Network A's loss: cross-entropy of logits (B, 2) with classes (B,)."""
    return F.cross_entropy(logits, target)


def loss_b(outputs: Outputs, target: Tensor, image: Tensor, kl_weight: float = 0.0) -> Tensor:
    """Network B's loss: cross-entropy and the squared error of the redrawing of normalized faces (B, 3, S, S).

    Args:
        kl_weight: weight of the KL value, which the authors compute and leave out; needs `NetworkB(logvar=True)`.
    """
    loss = F.cross_entropy(outputs.logits, target) + F.mse_loss(outputs.reconstruction, image)
    if not kl_weight:
        return loss
    if outputs.kl is None:
        raise ModelError("kl_weight needs the head of the log variance: build NetworkB with logvar=True.")
    return loss + kl_weight * outputs.kl.squeeze()

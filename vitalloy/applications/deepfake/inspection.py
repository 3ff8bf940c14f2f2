"""What a person may check beside a score: how a network redraws a face, and where its evidence for "fake" lies.

The saliency is Grad-CAM (Selvaraju et al., ICCV 2017, arXiv 1610.02391) on the last map of the backbone for the face
itself, of the difference between the logits of fake and real. Both come at no second pass through the backbone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitalloy.applications.deepfake.model import Network


class Inspection(NamedTuple):
    """Logits (B, 2); mean absolute error of the redrawing (B, S, S) in normalized units; saliency (B, S, S) of 0..1."""

    logits: Tensor
    errors: Tensor
    saliency: Tensor


@torch.no_grad()
def inspect(network: Network, image: Tensor, *eps: Tensor) -> Inspection:
    """A network in evaluation mode on normalized faces (B, 3, S, S); `eps` is network B's noise, if any."""
    backbone, size = network.backbone, image.shape[-2:]
    redrawn, _ = network.redraw(image, *eps)
    face, other = backbone.forward_features(image), backbone.forward_features(redrawn)
    of_redrawn = backbone.forward_head(other)
    with torch.enable_grad():  # from the answer back to the last map of the face, and no further
        face = face.detach().requires_grad_()
        logits = network.classify(backbone.forward_head(face), of_redrawn)
        grad = torch.autograd.grad((logits[:, 0] - logits[:, 1]).sum(), face)[0]
    maps, slopes = as_map(face.detach(), backbone), as_map(grad, backbone)
    cam = (slopes.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True).clamp_min(0)
    cam = cam / cam.amax((1, 2, 3), keepdim=True).clamp_min(1e-12)
    if redrawn.shape != image.shape:
        redrawn = F.interpolate(redrawn, size, mode="bilinear", align_corners=False)
    saliency = F.interpolate(cam, size, mode="bilinear", align_corners=False)[:, 0]
    return Inspection(logits.detach(), (redrawn - image).abs().mean(1), saliency)


def as_map(x: Tensor, backbone: nn.Module) -> Tensor:
    """Features of square images, as tokens (B, N, C) or a map (B, C, h, w) or (B, h, w, C), as a map (B, C, h, w)."""
    if x.ndim == 4:
        return x if x.shape[1] == backbone.num_features else x.movedim(-1, 1)
    x = x[:, getattr(backbone, "num_prefix_tokens", 0) :]
    side = int(x.shape[1] ** 0.5)
    return x.transpose(1, 2).unflatten(2, (side, side))

"""Why the model said so: one method a file, one face for all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vitalloy.errors import ModelError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

METHODS = {
    "rollout": "Attention rollout: where information can flow from the patches to the answer. It is the same for every "
    "class and does not show what the classifier made of it.",
    "gradcam": "Grad-CAM: which regions of a feature map raise the predicted class. Coarse, and blind to evidence "
    "against the class.",
    "gradient": "Smoothed gradient: the pixels that the predicted class is most sensitive to. Sensitivity is not the "
    "same as importance.",
}


@dataclass(frozen=True)
class Explanation:
    """Maps (B, H, W) of the images' size, 0 to 1; the classes (B,) they speak of; the method, and what it shows."""

    maps: Tensor
    target: Tensor
    method: str

    @property
    def meaning(self) -> str:
        return METHODS[self.method]


def explain(model: nn.Module, images: Tensor, target: Tensor | None = None, method: str = "auto") -> Explanation:
    """Saliency maps of a model in evaluation mode.

    Args:
        images: (B, C, H, W), normalised as the model expects.
        target: the classes (B,) to explain; the predicted ones when not given.
        method: "rollout", "gradcam" or "gradient". "auto" takes rollout where every block is plain attention,
            Grad-CAM where the model has feature maps, the gradient otherwise.

    Raises:
        ModelError: the model has nothing that the named method could read, or the method is unknown.
    """
    import torch
    import torch.nn.functional as F

    from vitalloy.explanation.gradients import grad_cam, smooth_gradient
    from vitalloy.explanation.rollout import attention_rollout, supports_rollout

    if method != "auto" and method not in METHODS:
        raise ModelError(f"method={method!r} is not one of {', '.join(METHODS)}, auto.")
    if target is None:
        with torch.no_grad():
            target = model(images).argmax(1)
    maps = None
    if method == "rollout" or (method == "auto" and supports_rollout(model)):
        method, maps = "rollout", attention_rollout(model, images)
    elif method in ("gradcam", "auto"):
        maps = grad_cam(model, images, target)
        if maps is None and method == "gradcam":
            raise ModelError(f"{type(model).__name__} has no feature map that Grad-CAM could use.")
        method = "gradient" if maps is None else "gradcam"
    if maps is None:
        maps = smooth_gradient(model, images, target)
    size = images.shape[-2:]
    maps = F.interpolate(maps[:, None].float(), size=size, mode="bilinear", align_corners=False)[:, 0]
    return Explanation(maps.clamp(0, 1), target, method)


def overlay(image: Image, saliency: Tensor, strength: float = 0.55) -> Image:
    """An RGB image with a map (h, w) of 0..1 laid over it: the more salient, the more colour."""
    import matplotlib
    import numpy as np
    from PIL import Image as PIL

    heat = PIL.fromarray(np.uint8(saliency.cpu().numpy() * 255)).resize(image.size, PIL.Resampling.BILINEAR)
    weight = np.asarray(heat, np.float32) / 255
    color = matplotlib.colormaps["magma"](0.15 + 0.85 * weight)[..., :3] * 255
    alpha = strength * weight[..., None]
    return PIL.fromarray(np.uint8(np.asarray(image.convert("RGB"), np.float32) * (1 - alpha) + color * alpha))

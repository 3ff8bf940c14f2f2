"""Maps from gradients: Grad-CAM on a feature map of the model, and the smoothed gradient of the image itself.

"Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization", Selvaraju et al., ICCV 2017,
arXiv 1610.02391; "SmoothGrad: removing noise by adding noise", Smilkov et al., 2017, arXiv 1706.03825.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn


def grad_cam(model: nn.Module, images: Tensor, target: Tensor) -> Tensor | None:
    """Images (B, C, H, W), target classes (B,) -> maps (B, h, w) with a maximum of 1.

    The deepest feature map that the chosen logits depend on is used (behind a class token the last one does not count).
    None where no feature map of the model can be read.
    """
    kept: dict[str, Tensor] = {}
    info = getattr(model, "feature_info", None)
    modules = dict(model.named_modules())
    rows = {row["module"]: row for row in (info if isinstance(info, list) else []) if row.get("module") in modules}
    if not rows:
        return None
    hooks = [
        modules[name].register_forward_hook(
            lambda _m, _i, out, name=name: kept.__setitem__(name, out if isinstance(out, Tensor) else out[0])
        )
        for name in rows
    ]
    try:
        with torch.enable_grad():
            logits = model(images.detach().requires_grad_())
            score = logits.gather(1, target[:, None]).sum()
            maps = list(kept.values())
            grads = torch.autograd.grad(score, maps, allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    for (name, x), grad in zip(reversed(kept.items()), reversed(grads), strict=True):
        if grad is None:
            continue
        x, grad = (_as_map(model, t, rows[name], images) for t in (x.detach(), grad))
        if x is None or min(x.shape[-2:]) < 2 or not grad.any():
            continue
        weights = grad.mean((2, 3), keepdim=True)
        cam = (weights * x).sum(1).clamp_min(0)
        return cam / cam.amax((1, 2), keepdim=True).clamp_min(1e-12)
    return None


def _as_map(model: nn.Module, x: Tensor, row: dict[str, Any], images: Tensor) -> Tensor | None:
    """Tokens, with or without prefix tokens, or a channels-last map as (B, C, h, w)."""
    if x.ndim == 4:
        return x if x.shape[1] == row["num_chs"] else x.permute(0, 3, 1, 2)
    if x.ndim != 3:
        return None
    sides = [{side // row["reduction"], math.ceil(side / row["reduction"])} for side in images.shape[-2:]]
    for prefix in (getattr(model, "num_prefix_tokens", 0), 0):  # the token may join in a later block
        for grid in itertools.product(*sides):
            if grid[0] * grid[1] == x.shape[1] - prefix:
                return x[:, prefix:].transpose(1, 2).unflatten(2, grid)
    return None


def smooth_gradient(model: nn.Module, images: Tensor, target: Tensor, samples: int = 8, noise: float = 0.1) -> Tensor:
    """Mean absolute gradient of the chosen logits under noise of `noise` times the image's range -> (B, H, W)."""
    generator = torch.Generator(images.device).manual_seed(0)
    spread = noise * (images.amax() - images.amin())
    total = torch.zeros_like(images[:, 0])
    for _ in range(samples):
        noisy = images + spread * torch.randn(images.shape, generator=generator, device=images.device)
        with torch.enable_grad():
            noisy.requires_grad_()
            score = model(noisy).gather(1, target[:, None]).sum()
            total += torch.autograd.grad(score, noisy)[0].abs().sum(1)
    return total / total.amax((1, 2), keepdim=True).clamp_min(1e-12)

"""Small models of the three kinds that export differently: a plain transformer, a windowed one, and convolutions."""

from __future__ import annotations

import torch

SIDE = 32


def build(kind: str) -> torch.nn.Module:
    import timm

    torch.manual_seed(0)
    arguments = {
        "deit_tiny_patch16_224": {"img_size": SIDE, "patch_size": 8, "depth": 2},
        "swin_tiny_patch4_window7_224": {
            "img_size": SIDE,
            "window_size": 4,
            "depths": (2,),
            "num_heads": (3,),
        },
        "resnet10t": {},
    }
    model = timm.create_model(kind, num_classes=10, **arguments[kind])
    for parameter in model.parameters():  # a fresh head or gain of zero would make all logits equal
        if parameter.ndim > 1:
            torch.nn.init.xavier_uniform_(parameter)
    return model.eval()


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    """Smooth random images, nearer to photographs than white noise."""
    coarse = torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, SIDE, mode="bicubic")

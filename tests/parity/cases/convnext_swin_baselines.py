"""How the goldens of convnext_swin_baselines are computed."""

from __future__ import annotations

from cases.common import Model

CASES = {
    "convnext_tiny_224": Model(
        "convnext_tiny",
        rename={"out.head.norm": "norm"},
        result="out.out",
        reshape={"out.head.norm": lambda t: t[:, :, None, None]},
    ),
    "swin_tiny_224": Model("swin_tiny_patch4_window7_224", result="out.out"),
    "swin_tiny_w4_96": Model(
        "swin_tiny_patch4_window7_224", {"img_size": 96, "window_size": 4, "num_classes": 10}, result="out.out"
    ),
}

"""Feature pyramid network: gives fine maps the meaning of coarse ones, and all of them the same channels.

"Feature Pyramid Networks for Object Detection", Lin et al., CVPR 2017, arXiv 1612.03144. Computes what mmdetection's
FPN computes, and loads its `neck.` entries.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from vitalloy.errors import ModelError

EXTRA = ("none", "conv_on_input", "pool")


class FPN(nn.Module):
    """Maps of any channels, from fine to coarse -> as many or more maps of `out_channels`.

    Args:
        in_channels: channels of all maps that come in.
        out_channels: channels of all maps that go out.
        num_outs: maps that go out; by default one for each map that is used.
        start_level: the first map that is used; finer ones are passed by.
        extra: how maps beyond those that came in are made, each half the size of the one before. "conv_on_input" takes
            strided convolutions, the first on the last map as it came in (RetinaNet); "pool" takes every second pixel
            of the last output (Mask R-CNN).

    Raises:
        ModelError: a level, a number of outputs or a kind of extra map that cannot be.
    """

    key_table = ((r"^((?:lateral|fpn)_convs\.\d+)\.conv\.", r"\1."),)

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int = 256,
        num_outs: int | None = None,
        start_level: int = 0,
        extra: str = "none",
    ) -> None:
        super().__init__()
        used = list(in_channels[start_level:]) if start_level >= 0 else []
        if not used:
            raise ModelError(f"start_level={start_level} leaves nothing of an encoder with {len(in_channels)} levels.")
        num_outs = len(used) if num_outs is None else num_outs
        if extra not in EXTRA:
            raise ModelError(f"extra={extra!r} is not one of {', '.join(EXTRA)}.")
        if num_outs < len(used) or (num_outs > len(used) and extra == "none"):
            raise ModelError(
                f"{num_outs} outputs cannot be made of {len(used)} levels with extra={extra!r}: ask for {len(used)}, "
                "or for more with extra='conv_on_input' or 'pool'."
            )
        self.start_level, self.num_outs, self.extra = start_level, num_outs, extra
        self.lateral_convs = nn.ModuleList(nn.Conv2d(dim, out_channels, 1) for dim in used)
        self.fpn_convs = nn.ModuleList(nn.Conv2d(out_channels, out_channels, 3, padding=1) for _ in used)
        for i in range(num_outs - len(used) if extra == "conv_on_input" else 0):
            self.fpn_convs.append(nn.Conv2d(out_channels if i else used[-1], out_channels, 3, stride=2, padding=1))
        for conv in (*self.lateral_convs, *self.fpn_convs):
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        maps = maps[self.start_level :]
        merged = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=True)]
        for i in range(len(merged) - 1, 0, -1):
            coarse = F.interpolate(merged[i], size=merged[i - 1].shape[-2:], mode="nearest")
            merged[i - 1] = merged[i - 1] + coarse
        outs = [conv(x) for conv, x in zip(self.fpn_convs, merged, strict=False)]
        if self.extra == "conv_on_input":
            x = maps[-1]
            for conv in self.fpn_convs[len(merged) :]:
                x = conv(x)
                outs.append(x)
        while len(outs) < self.num_outs:
            outs.append(F.max_pool2d(outs[-1], 1, stride=2))
        return outs

"""From an image to a sequence of patch tokens."""

from __future__ import annotations

from torch import Tensor, nn

from vitalloy.layers.tokens import to_tokens


class PatchEmbed(nn.Module):
    """Cuts an image into patches and projects each: (B, C, H, W) -> (B, N, D) and the patch grid."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x = self.proj(x)
        return to_tokens(x), x.shape[-2:]

"""CoSwin: Swin for small images, with a convolution branch beside the attention of every block.

"CoSwin: Convolution Enhanced Hierarchical Shifted Window Attention For Small-Scale Vision", Khadka et al., 2025,
arXiv 2509.08959. Loads the files of the authors' review copy (`checkpoint_coswin_CIFAR10.pt` and so on) and, with
`local_branch=False`, files of Swin at the same configuration.

The branch is two dense 3x3 convolutions on the block's input; a learned weight between 0 and 1 says how much of it is
added to the attention. It more than triples parameters and multiplications, so the published gains compare a model
with a smaller one. Two Swins stand beside it: `coswin_no_local` is the same configuration without the branch, the
published comparison; `coswin_no_local_wide` has as many parameters as CoSwin.

Three levels, as the released configuration (the paper's text speaks of four). Departures: any input size runs, as in
our Swin, where the authors refuse all but one; the branch works on maps that are not square. The authors decay every
parameter; here biases, norms, the branch weight and the relative positions are spared, as everywhere in this library.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from vitalloy.layers.fusion import fold_scale
from vitalloy.layers.mlp import Mlp
from vitalloy.layers.window_attention import WindowAttention
from vitalloy.layers.window_pyramid import WindowPyramid
from vitalloy.layers.windows import Cut, Pair
from vitalloy.registry import Variant, register


class LocalBranch(nn.Module):
    """Two dense 3x3 convolutions with a ReLU between: (B, H, W, C) -> the same shape."""

    EXPANSION = 1.1

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = int(self.EXPANSION * dim)
        self.conv1 = nn.Conv2d(dim, hidden, 3, padding=1)
        self.act = nn.ReLU()
        self.conv2 = nn.Conv2d(hidden, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2).contiguous()  # the kernels are larger than such maps and would be copied otherwise
        return self.conv2(self.act(self.conv1(x))).permute(0, 2, 3, 1)


class FlatConv(nn.Module):
    """A folded 3x3 convolution. Its kernels lie flat so that they keep their layout when others turn channels-last."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight = nn.Parameter(conv.weight.flatten(2), requires_grad=False)  # (out, in, 9)
        self.bias = conv.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.unflatten(2, (3, 3)), self.bias, padding=1)


class Block(nn.Module):
    """Window attention plus the weighted local branch, then a perceptron, each with a residual.

    Args:
        local_branch: without it this is Swin's block.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: Pair,
        mlp_ratio: float,
        local_branch: bool,
        attn_drop: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.local = LocalBranch(dim) if local_branch else None
        self.local_weight = nn.Parameter(torch.tensor(0.5)) if local_branch else None  # the branch counts sigmoid of it
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, window, dropout=attn_drop)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        """x (B, H, W, C) -> the same shape."""
        mixed = cut.join(self.attn(cut.split(self.norm1(x)), cut), x)
        if self.local is not None:
            local = self.local(x)  # of the input before its norm
            fused = self.local_weight is None
            mixed = mixed + local if fused else torch.addcmul(mixed, local, self.local_weight.sigmoid())
        x = x + self.drop_path(mixed)
        return x + self.drop_path(self.mlp(self.norm2(x)))

    @torch.no_grad()
    def fuse(self) -> None:
        if self.local_weight is not None:
            conv2 = fold_scale(self.local.conv2, self.local_weight.sigmoid())
            self.local.conv1, self.local.conv2 = FlatConv(self.local.conv1), FlatConv(conv2)
            self.local_weight = None


class CoSwin(WindowPyramid):
    """CoSwin.

    Args:
        img_size: the (height, width) or side that windows are made for; other inputs run too.
        window_size: side of the windows, or (height, width).
        depths, num_heads: one number a level; channels double from level to level, starting at `embed_dim`.
        local_branch: the convolutions beside the attention; False makes it Swin.
    """

    key_table = (
        (r"\.(?:relative_position_index|attn_mask)$", None),
        (r"\.convInfluenceWeight$", ".local_weight"),
        (r"\.conv\.conv\.0\.", ".local.conv1."),
        (r"\.conv\.conv\.2\.", ".local.conv2."),
    )
    default_out_indices = (0, 1, 2)

    def __init__(
        self,
        img_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 96,
        depths: tuple[int, ...] = (2, 6, 4),
        num_heads: tuple[int, ...] = (3, 6, 12),
        window_size: int | tuple[int, int] = 4,
        mlp_ratio: float = 2.0,
        local_branch: bool = True,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        def block(dim: int, heads: int, window: Pair, rate: float) -> Block:
            return Block(dim, heads, window, mlp_ratio, local_branch, attn_drop_rate, rate)

        super().__init__(
            block,
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            embed_dim=embed_dim,
            depths=depths,
            num_heads=num_heads,
            window_size=window_size,
            global_pool=global_pool,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
        )


def _data(side: int, mean: tuple[float, float, float], std: tuple[float, float, float]) -> dict:
    return {"input_size": (3, side, side), "crop_pct": 1.0, "mean": mean, "std": std}


_CIFAR10 = _data(32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
_CIFAR100 = _data(32, (0.5070, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
_MNIST = _data(32, (0.1307,) * 3, (0.3081,) * 3)  # published as single values
_SVHN = _data(32, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970))
_TINY_IMAGENET = _data(64, (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821))
VARIANTS = {
    "coswin_nano": Variant(  # ours
        {"embed_dim": 24, "depths": (2, 2, 2), "num_heads": (1, 2, 4)},
        cfg={"input_size": (3, 32, 32), "crop_pct": 1.0},
    ),
    "coswin_cifar10": Variant({}, None, ("checkpoint_coswin_CIFAR10.pt",), _CIFAR10),
    "coswin_cifar100": Variant({}, None, ("checkpoint_coswin_CIFAR100.pt",), _CIFAR100),
    "coswin_mnist": Variant({}, None, ("checkpoint_coswin_MNIST.pt",), _MNIST),
    "coswin_svhn": Variant({}, None, ("checkpoint_coswin_SVHN.pt",), _SVHN),
    "coswin_tiny_imagenet": Variant({"patch_size": 4}, None, ("checkpoint_coswin_TINY-IMAGENET.pt",), _TINY_IMAGENET),
    "coswin_no_local": Variant({"local_branch": False}, cfg=_CIFAR10),
    "coswin_no_local_wide": Variant(  # ours
        {"local_branch": False, "embed_dim": 176, "num_heads": (4, 8, 16)}, cfg=_CIFAR10
    ),
}
register(CoSwin, VARIANTS)

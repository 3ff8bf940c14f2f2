"""UniFormer for clips: the image model with every kernel longer by time, started from the image model's weights.

"UniFormer: Unified Transformer for Efficient Spatiotemporal Representation Learning", Li et al., ICLR 2022,
arXiv 2201.04676. Loads the authors' files; `inflate` makes a start from those of `uniformer`.

Clips are (B, C, T, H, W) and maps (B, C, T', H', W'); the first stage halves the time, the others keep it. Tokens are
frame after frame. Any number of frames and any size of frames run.

Departure: weights in the centre frame (`inflate(..., centre=True)`), which the published code has but never uses, are
offered because a still clip then gets exactly the image model's answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from vitalloy.layers.attention import SelfAttention
from vitalloy.layers.backbone import drop_path_rates
from vitalloy.layers.tokens import to_map, to_tokens
from vitalloy.layers.uniformer import GlobalBlock, LocalBlock, PatchEmbed, UniFormerPyramid
from vitalloy.registry import Variant, register


class DividedBlock(GlobalBlock):
    """Each position attends along its own time, then each frame within itself. Neutral to the time at its start.

    Args:
        time_residual: the answer of the time attention stays in the sum. As published it does not: it only enters
            through the attention within frames.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        attn_drop: float,
        drop_path: float,
        time_residual: bool = False,
    ) -> None:
        super().__init__(dim, num_heads, 3, mlp_ratio, qkv_bias, attn_drop, drop_path)
        self.time_residual = time_residual
        self.t_norm = nn.LayerNorm(dim, eps=1e-6)
        self.t_attn = SelfAttention(dim, num_heads, qkv_bias, attn_drop)
        for name, value in self.t_attn.named_parameters():
            nn.init.constant_(value, float(name == "proj.weight"))

    def forward(self, x: Tensor) -> Tensor:
        x = self.pos_embed(x)
        grid = x.shape[2:]
        x = to_tokens(x).unflatten(1, (grid[0], -1))  # (B, T, H * W, C)
        count = x.shape[2]
        branch = self.t_attn(self.t_norm(x).transpose(1, 2).flatten(0, 1))  # of (B * H * W, T, C)
        seen = x + self.drop_path(branch.unflatten(0, (-1, count)).transpose(1, 2))
        branch = self.attn(self.norm1(seen).flatten(0, 1)).unflatten(0, (-1, grid[0]))
        x = (seen if self.time_residual else x) + self.drop_path(branch)
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return to_map(x.flatten(1, 2), grid)


class UniFormerVideo(UniFormerPyramid):
    """UniFormer for clips: four stages of strides 4, 8, 16 and 32, each of half the clip's frames.

    Args:
        depths, embed_dims: blocks and channels, one entry a stage.
        head_dim: channels of a head.
        patch_stride: stride of the first stage; 2 suits small frames.
        std: the patches of the later stages overlap in time, over three frames.
        split: attention divided into time and frames; no published file has it.
        time_residual: see `DividedBlock`.
        global_pool: "avg", "max" or "".
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        depths: Sequence[int] = (3, 4, 8, 3),
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        head_dim: int = 64,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        patch_stride: int = 4,
        std: bool = False,
        split: bool = False,
        time_residual: bool = False,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        for i, dim in enumerate(embed_dims):
            stride, width = (2, embed_dims[i - 1]) if i else (patch_stride, in_chans)
            frames = 3 if std or not i else 1
            embed = PatchEmbed(
                width, dim, (frames, stride, stride), (1 if i else 2, stride, stride), (frames // 2, 0, 0)
            )
            heads, blocks = dim // head_dim, []
            for _ in range(depths[i]):
                if i < 2:
                    block: nn.Module = LocalBlock(dim, 3, mlp_ratio, next(rates))
                elif split:
                    block = DividedBlock(dim, heads, mlp_ratio, qkv_bias, attn_drop_rate, next(rates), time_residual)
                else:
                    block = GlobalBlock(dim, heads, 3, mlp_ratio, qkv_bias, attn_drop_rate, next(rates))
                blocks.append(block)
            self.add_stage(embed, blocks, nn.Identity(), dim, patch_stride * 2**i)
        self.norm = nn.BatchNorm3d(self.num_features)
        self.build_head(num_classes, global_pool, drop_rate)


def inflate_kernel(weight: Tensor, frames: int, centre: bool = False) -> Tensor:
    """A kernel (..., H, W) of images as one (..., frames, H, W) of clips.

    Args:
        centre: put it into the middle frame, between zeros, instead of an equal share of it into each frame.
    """
    if not centre:
        return (weight / frames).unsqueeze(-3).expand(*weight.shape[:-2], frames, -1, -1).clone()
    inflated = weight.new_zeros(*weight.shape[:-2], frames, *weight.shape[-2:])
    inflated[..., frames // 2, :, :] = weight
    return inflated


def inflate(state_2d: Mapping[str, Tensor], model_3d: nn.Module, centre: bool = False) -> dict[str, Tensor]:
    """The weights of an image model for a video model of the same widths; `load_checkpoint` takes what returns.

    Args:
        state_2d: of a `UniFormer`, under our names or the authors'.
        model_3d: the `UniFormerVideo` that it is for.
        centre: kernels go into their middle frame. On a clip of equal frames the video model then answers just as the
            image model. Otherwise, as published, they are spread over time.

    A classifier for other classes, and anything else that cannot be made longer by time, is left out; load the rest
    with `reset_head=True`.
    """
    own, inflated = model_3d.state_dict(), {}
    for name, value in model_3d.convert_state(state_2d).items():
        wanted = own[name].shape if name in own else value.shape
        if value.ndim == 4 and len(wanted) == 5:
            value = inflate_kernel(value, wanted[2], centre)
        if value.shape == wanted:
            inflated[name] = value
    return inflated


_CLIP = {"input_size": (3, 16, 224, 224), "first_conv": "patch_embed1.proj"}
_B = {"depths": (5, 8, 20, 7)}
_FILES = ("uniformer_{}_k400_8x8.pth", "uniformer_{}_k400_16x4.pth", "uniformer_{}_k600_16x4.pth")


def _files(size: str, *more: str) -> tuple[str, ...]:
    return tuple(file.format(size) for file in (*_FILES, *more))


VARIANTS = {
    "uniformer_video_nano": Variant(  # ours, for clips of 8 frames of 32 pixels: strides 2, 4, 8, 16
        {"depths": (1, 1, 2, 1), "embed_dims": (16, 32, 64, 128), "head_dim": 32, "patch_stride": 2},
        cfg={"input_size": (3, 8, 32, 32), "crop_pct": 1.0},
    ),
    "uniformer_video_small": Variant(
        {}, checkpoints=_files("small", "uniformer_{}_k400_16x8.pth"), note="80.8 on Kinetics-400, 16 x 4 frames"
    ),
    "uniformer_video_base": Variant(
        _B, checkpoints=_files("base", "uniformer_{}_k400_32x4.pth"), note="82.0 on Kinetics-400, 16 x 4 frames"
    ),
}
register(UniFormerVideo, VARIANTS, **_CLIP)

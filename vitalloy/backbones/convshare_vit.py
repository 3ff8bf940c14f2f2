"""ConvShareViT: a vision transformer of convolutions that all tokens share, for optical 4f accelerators.

"ConvShareViT: Enhancing Vision Transformers with Convolutional Attention Mechanisms for Free-Space Optical
Accelerators", Ibadulla, Chen and Reyes-Aldasoro, IEEE TNNLS 2026, doi 10.1109/TNNLS.2026.3689450; arXiv 2504.11517.

A reconstruction: there is no public code and no weights, and only the abstract was read. Published is that the linear
layers of attention and perceptron become depthwise convolutions with weights shared by all channels, that valid padding
learns attention like a ViT's and same padding does not, and that the receptive field goes with the token. The simplest
network of that kind was built. Inferred, and ours, are:

- Tokens are the channels, each a map of d x d values: a patch is projected to d * d values and viewed as a map, with a
  learned position map; the class token is one map more.
- A layer takes and gives whole maps per token: as many kernels as fill its width, flattened kernel by kernel and viewed
  as d x d maps by the next. Hence (d - K + 1) squared must divide d squared. A kernel as large as the map makes it the
  linear layer of a ViT.
- The products of tokens with tokens, the softmax, norms and residuals stay electronic.
- The perceptron's second layer sums over the maps of its input; its width is a whole multiple of the token's.
- Pre-norm blocks, GELU, layer norms over a token's values, PyTorch's own start for the convolutions, all sizes.

`layers/optics.py` has the optics: `set_photons` runs the shared convolutions with signs split and photons counted.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn

from vitalloy.layers import optics
from vitalloy.layers.attention import Attend, fitting_heads, merge_heads
from vitalloy.layers.backbone import Backbone, Level, drop_path_rates, init_weights
from vitalloy.layers.patch_embed import PatchEmbed
from vitalloy.layers.positions import resample_positions
from vitalloy.layers.streaming import may_stream, stream_mlp
from vitalloy.layers.tokens import to_map
from vitalloy.registry import Variant, register

PADDINGS = ("valid", "same")


def kernels_for(out_maps: int, side: int, kernel_size: int, padding: str) -> int:
    """How many kernels give `out_maps` d x d maps' worth of values for each token.

    Raises:
        ValueError: no whole number does, or the kernel is larger than the map.
    """
    if padding not in PADDINGS:
        raise ValueError(f"padding={padding!r} is not one of {PADDINGS}")
    out = side if padding == "same" else side - kernel_size + 1
    if out < 1 or side * side % (out * out):
        usable = [k for k in range(1, side + 1) if side * side % (side - k + 1) ** 2 == 0]
        raise ValueError(f"kernel_size={kernel_size} does not fill maps of side {side}; with valid padding {usable} do")
    return out_maps * side * side // (out * out)


class SharedConv(nn.Module):
    """The same kernels over the maps of every token: (B, T, in_maps * d * d) -> (B, T, out_maps * d * d).

    Args:
        side: d.
        in_maps, out_maps: maps of d x d values in a token; the layer sums over those that come in.
        padding: "valid" or "same".
    """

    def __init__(self, side: int, in_maps: int, out_maps: int, kernel_size: int, padding: str = "valid") -> None:
        super().__init__()
        self.side, self.in_maps = side, in_maps
        kernels = kernels_for(out_maps, side, kernel_size, padding)
        self.conv = nn.Conv2d(in_maps, kernels, kernel_size, padding=padding)
        self.photons: float | None = None

    def forward(self, x: Tensor) -> Tensor:
        maps = x.reshape(-1, self.in_maps, self.side, self.side)  # all tokens are one batch
        if self.photons is None:
            out = self.conv(maps)
        else:
            out = optics.optical_conv(maps, self.conv.weight, self.photons, self.conv.padding)
            out = out + self.conv.bias[:, None, None]
        return out.reshape(-1, x.shape[1], out.shape[1:].numel())

    @torch.no_grad()
    def as_linear(self) -> nn.Linear:
        """The same map as one matrix: the columns are what the kernels make of unit vectors."""
        weight = self.conv.weight
        width = self.in_maps * self.side**2
        units = torch.eye(width, dtype=weight.dtype, device=weight.device).view(width, -1, self.side, self.side)
        made = F.conv2d(units, weight, padding=self.conv.padding)  # (width, M, d', d')
        linear = nn.utils.skip_init(nn.Linear, width, made[0].numel(), dtype=weight.dtype, device=weight.device)
        linear.weight.copy_(made.flatten(1).t())
        linear.bias.copy_(self.conv.bias.repeat_interleave(made[0, 0].numel()))
        return linear.train(self.training)

    def shots(self, maps: int, modulator: tuple[int, int]) -> int:
        """Shots of a 4f system for `maps` tokens, all signs apart."""
        kernels = self.conv.out_channels * self.in_maps
        return optics.count_shots(kernels, maps, self.side, self.conv.kernel_size[0], modulator)


class UnsharedConv(nn.Module):
    """Like `SharedConv`, but every token has kernels of its own: an ordinary depthwise convolution.

    Args:
        grid: the (H, W) of patches that kernels are made for; others get resized ones.
        prefix: tokens in front of the patches.
    """

    def __init__(
        self,
        side: int,
        in_maps: int,
        out_maps: int,
        kernel_size: int,
        padding: str,
        grid: tuple[int, int],
        prefix: int,
    ) -> None:
        super().__init__()
        self.side, self.in_maps, self.padding, self.grid, self.prefix = side, in_maps, padding, grid, prefix
        kernels = kernels_for(out_maps, side, kernel_size, padding)
        self.shape = (kernels, in_maps, kernel_size, kernel_size)
        bound = (in_maps * kernel_size**2) ** -0.5  # where PyTorch's convolutions start
        tokens = prefix + grid[0] * grid[1]
        width = kernels * in_maps * kernel_size**2
        self.weight = nn.Parameter(torch.empty(1, tokens, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(1, tokens, kernels).uniform_(-bound, bound))

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        tokens = x.shape[1]
        weight, bias = (
            resample_positions(table, grid, old_grid=self.grid, prefix=self.prefix)[0]
            for table in (self.weight, self.bias)
        )
        weight = weight.unflatten(1, self.shape).flatten(0, 1)  # (T * M, in_maps, K, K)
        maps = x.unflatten(2, (self.in_maps, self.side, self.side)).flatten(1, 2)  # (B, T * in_maps, d, d)
        out = F.conv2d(maps, weight, bias.flatten(), padding=self.padding, groups=tokens)
        return out.unflatten(1, (tokens, -1)).flatten(2)


def through(layer: nn.Module, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """What the layer makes of tokens (B, T, width); only `UnsharedConv` asks where they lie."""
    return layer(x, grid) if isinstance(layer, UnsharedConv) else layer(x)


def fused(layer: nn.Module) -> nn.Module:
    """One matrix instead of shared kernels: a product is faster than many small convolutions."""
    return layer.as_linear() if isinstance(layer, SharedConv) and layer.photons is None else layer


class ConvAttention(nn.Module):
    """Multi-head self-attention whose projections are convolutions: x (B, T, D) -> the same shape."""

    def __init__(self, qkv: nn.Module, proj: nn.Module, dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads = fitting_heads(dim, num_heads)
        self.qkv = qkv
        self.attend = Attend(dropout)
        self.proj = proj

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        qkv = through(self.qkv, x, grid).unflatten(-1, (3, self.num_heads, -1))  # (B, T, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return through(self.proj, merge_heads(self.attend(q, k, v)), grid)

    def fuse(self) -> None:
        self.qkv, self.proj = fused(self.qkv), fused(self.proj)


class ConvMlp(nn.Module):
    """Convolution, GELU, convolution: x (B, T, D) -> the same shape."""

    def __init__(self, fc1: nn.Module, fc2: nn.Module) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = fc1, nn.GELU(), fc2

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        if isinstance(self.fc1, nn.Linear) and may_stream(x, self.fc1, self.act, self.fc2):
            return stream_mlp(x, self.fc1, self.act, self.fc2)
        return through(self.fc2, self.act(through(self.fc1, x, grid)), grid)

    def fuse(self) -> None:
        self.fc1, self.fc2 = fused(self.fc1), fused(self.fc2)


class Block(nn.Module):
    """Pre-norm attention and perceptron, each with a residual."""

    def __init__(self, attn: nn.Module, mlp: nn.Module, dim: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), grid))
        return x + self.drop_path(self.mlp(self.norm2(x), grid))


class ConvShareViT(Backbone):
    """A reconstruction of ConvShareViT; the module's docstring says what is inferred.

    Args:
        img_size: the (height, width) or side that the position maps are made for; other inputs resize them.
        side: d of the d x d map that a token is.
        kernel_size: of all convolutions; `side` with valid padding makes a plain ViT.
        padding: "valid", or "same" for what the paper found to behave like a convolutional network.
        shared: one set of kernels for all tokens; False gives each token its own, an ordinary depthwise convolution.
        mlp_ratio: maps between the layers of the perceptron for one map of the token.
        class_token: put one in front; without it `global_pool` cannot be "token".
    """

    default_out_indices = 3

    def __init__(
        self,
        img_size: int | tuple[int, int] = 32,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        side: int = 8,
        kernel_size: int = 5,
        padding: str = "valid",
        shared: bool = True,
        depth: int = 6,
        num_heads: int = 4,
        mlp_ratio: int = 4,
        class_token: bool = True,
        global_pool: str = "token",
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.grid = (height // patch_size, width // patch_size)
        if not all(self.grid):
            raise ValueError(f"img_size={img_size} is smaller than one patch of {patch_size}")
        if mlp_ratio != int(mlp_ratio):
            raise ValueError(f"mlp_ratio={mlp_ratio} is no whole number of maps")
        self.num_features = self.embed_dim = dim = side * side
        self.num_prefix_tokens = int(class_token)
        self.patch_embed = PatchEmbed(patch_size, in_chans, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        rows = self.num_prefix_tokens + self.grid[0] * self.grid[1]
        self.pos_embed = nn.Parameter(torch.zeros(1, rows, dim))

        def layer(in_maps: int, out_maps: int) -> nn.Module:
            if shared:
                return SharedConv(side, in_maps, out_maps, kernel_size, padding)
            return UnsharedConv(side, in_maps, out_maps, kernel_size, padding, self.grid, self.num_prefix_tokens)

        ratio = int(mlp_ratio)
        self.blocks = nn.ModuleList(
            Block(
                ConvAttention(layer(1, 3), layer(1, 1), dim, num_heads, attn_drop_rate),
                ConvMlp(layer(1, ratio), layer(ratio, 1)),
                dim,
                rate,
            )
            for rate in drop_path_rates(drop_path_rate, depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.feature_info = [{"num_chs": dim, "reduction": patch_size, "module": f"blocks.{i}"} for i in range(depth)]
        for table in (self.cls_token, self.pos_embed):
            if table is not None:
                trunc_normal_(table, std=0.02)
        self.apply(init_weights)
        self.build_head(num_classes, global_pool, drop_rate)

    def forward_levels(self, x: Tensor, take: Collection[int], stop: int, norm: bool) -> tuple[Tensor, list[Level]]:
        x, grid = self.patch_embed(x)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = x + self.positions(grid)
        levels = []
        for i, block in enumerate(self.blocks[:stop]):
            x = self.run(block, x, grid)
            if i in take:
                tokens = self.norm(x) if norm else x
                prefix = tokens[:, : self.num_prefix_tokens]
                levels.append(Level(to_map(tokens[:, self.num_prefix_tokens :], grid), prefix))
        return x, levels

    def forward_final(self, state: Tensor) -> Tensor:
        return self.norm(state)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The position maps for a patch grid, (1, prefix + N, d * d)."""
        return resample_positions(self.pos_embed, grid, old_grid=self.grid, prefix=self.num_prefix_tokens)

    def set_photons(self, photons: float | None) -> None:
        """Run the shared convolutions as a 4f system does: signs apart, `photons` a pixel at intensity 1; None: exact.

        Raises:
            ValueError: there is nothing left to run optically, after `fuse()` or with `shared=False`.
        """
        convolutions = [m for m in self.modules() if isinstance(m, SharedConv)]
        if not convolutions and photons is not None:
            raise ValueError("no shared convolutions here: the model was fused, or built with shared=False")
        for convolution in convolutions:
            convolution.photons = photons

    def count_shots(
        self, batch: int = 1, img_size: tuple[int, int] | None = None, modulator: tuple[int, int] = (2160, 3840)
    ) -> int:
        """Shots of a forward pass over a batch; images share shots. See `vitalloy.layers.optics.Shots`."""
        patch = self.patch_embed.proj.stride
        grid = self.grid if img_size is None else [s // p for s, p in zip(img_size, patch, strict=True)]
        maps = batch * (self.num_prefix_tokens + grid[0] * grid[1])
        return sum(m.shots(maps, modulator) for m in self.modules() if isinstance(m, SharedConv))

    def prune_levels(self, keep: int, prune_norm: bool) -> None:
        self.blocks = self.blocks[:keep]
        if prune_norm:
            self.norm = nn.Identity()

    def no_weight_decay(self) -> set[str]:
        return {"cls_token", "pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict:
        """How layer-wise learning rates group the parameters."""
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def reshape_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tables of one row a token are resized to our grid."""
        rows = self.pos_embed.shape[1]
        tables = {"pos_embed"}
        for name, module in self.named_modules():
            if isinstance(module, UnsharedConv):
                tables |= {f"{name}.weight", f"{name}.bias"}
        for key in tables & state.keys():
            if state[key].shape[1] != rows:
                state[key] = resample_positions(state[key], self.grid, prefix=self.num_prefix_tokens)
        return state


def attention_entropy(attention: Tensor) -> Tensor:
    """Mean entropy of attention maps (..., N, M) over their rows, in nats: log M where attention is spread evenly."""
    return -torch.special.xlogy(attention, attention).sum(-1).mean()


def class_token_similarity(attention: Tensor, reference: Tensor) -> Tensor:
    """Mean cosine similarity of what the class token attends to in two models, by their maps (B, T, T) over all heads.

    How the paper's "attention learning" is measured here; its own measure is not known.
    """
    ours, theirs = (maps[:, 0, 1:] for maps in (attention, reference))
    return F.cosine_similarity(ours, theirs, dim=-1).mean()


_32 = {"input_size": (3, 32, 32), "crop_pct": 1.0}
VARIANTS = {  # ours: no size is published
    "convshare_vit_small": Variant({}, cfg=_32),
    "convshare_vit_small_same": Variant({"padding": "same"}, cfg=_32),
    "convshare_vit_small_unshared": Variant({"shared": False}, cfg=_32),
    "convshare_vit_small_linear": Variant({"kernel_size": 8}, cfg=_32),  # a plain ViT
    "convshare_vit_base": Variant({"side": 16, "kernel_size": 9, "depth": 8, "num_heads": 8}, cfg=_32),
    "convshare_vit_base_same": Variant(
        {"side": 16, "kernel_size": 9, "depth": 8, "num_heads": 8, "padding": "same"}, cfg=_32
    ),
}
register(ConvShareViT, VARIANTS)

"""DualToken-ViT as one would write it from the description: the peer of our own in benchmarks.

Names of the shared parts are LightViT's, those of the rest are ours, so the weights of one load into the other.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Stem(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        half = dim // 2
        layers = [nn.Conv2d(3, half, 3, 2, padding=1, bias=False), nn.BatchNorm2d(half), nn.GELU()]
        for stride in (1, 1, 2):
            conv = nn.Conv2d(half, half, 3, stride, padding=1, groups=half, bias=False)
            layers += [conv, nn.BatchNorm2d(half), nn.GELU()]
        self.stem = nn.Sequential(*layers)
        self.proj = nn.Conv2d(half, dim, 3, 2, padding=1)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> tuple[Tensor, int, int]:
        x = self.proj(self.stem(x))
        height, width = x.shape[2:]
        return self.norm(x.flatten(2).transpose(1, 2)), height, width


class MergePatch(nn.Module):
    def __init__(self, dim: int, out_dim: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False)
        self.norm2 = nn.LayerNorm(dim)
        self.proj = nn.Linear(dim, out_dim, bias=False)
        self.res_proj = nn.Linear(dim, out_dim, bias=False)

    def forward(self, z: Tensor, height: int, width: int) -> tuple[Tensor, int, int]:
        tokens, x = z[:, : self.count], z[:, self.count :]
        x = x.reshape(len(x), height, width, -1)
        if height % 2 or width % 2:
            x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        residual = F.max_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], dim=-1)
        height, width = x.shape[1:3]
        x = self.reduction(self.norm(x)) + self.res_proj(residual)
        return torch.cat([self.proj(self.norm2(tokens)), x.flatten(1, 2)], dim=1), height, width


class ConvEncoder(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.mlp(self.norm(self.dwconv(x).permute(0, 2, 3, 1)))
        return x + branch.permute(0, 3, 1, 2)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class MixMlp(nn.Module):
    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.token = nn.Linear(count, count)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.token(x.transpose(1, 2)).transpose(1, 2))


class SelfAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, count, dim = x.shape
        qkv = self.qkv(x).reshape(batch, count, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, count, dim))


class Tokens(nn.Module):
    def __init__(self, dim: int, num_heads: int, steps: int, mix: bool) -> None:
        super().__init__()
        self.down = nn.Sequential(*(nn.Linear(dim, dim) for _ in range(steps)))
        self.norm = nn.LayerNorm(dim)
        self.attn = SelfAttention(dim, num_heads)
        self.mlp = MixMlp(dim, 49) if mix else Mlp(dim, dim)

    def forward(self, tokens: Tensor, local: Tensor) -> Tensor:
        for linear in self.down:
            local = F.avg_pool2d(linear(local.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), 2)
        if local.shape[2:] != (7, 7):
            local = F.adaptive_avg_pool2d(local, 7)
        gathered = self.attn(self.norm(local.flatten(2).transpose(1, 2)))
        return 0.5 * self.mlp(tokens) + 0.5 * gathered


class Broadcast(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(dim)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        batch, count, dim = x.shape
        q = self.q(self.norm(x)).reshape(batch, count, self.num_heads, -1).transpose(1, 2)
        k, v = self.kv(tokens).reshape(batch, 49, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, count, dim))


class BidimAttention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        inner = dim // 4
        self.norm = nn.LayerNorm(dim)
        self.global_reduce = nn.Linear(dim, inner)
        self.local_reduce = nn.Linear(dim, inner)
        self.act = nn.GELU()
        self.channel_select = nn.Linear(inner, dim)
        self.spatial_select = nn.Linear(2 * inner, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        whole = self.act(self.global_reduce(y.mean(1, keepdim=True)))
        each = self.act(self.local_reduce(y))
        channels = self.channel_select(whole).sigmoid()
        both = torch.cat([each, whole.expand(-1, each.shape[1], -1)], dim=-1)
        return x * channels * self.spatial_select(both).sigmoid()


class BidimMlp(Mlp):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__(dim, hidden)
        self.attn = BidimAttention(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(super().forward(x))


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, steps: int, mix: bool) -> None:
        super().__init__()
        self.encoder = ConvEncoder(dim)
        self.tokens = Tokens(dim, num_heads, steps, mix)
        self.broadcast = Broadcast(dim, num_heads)
        self.norm = nn.LayerNorm(dim)
        self.mlp = BidimMlp(dim, 2 * dim)

    def forward(self, z: Tensor, height: int, width: int) -> Tensor:
        tokens, x = z[:, :49], z[:, 49:]
        local = self.encoder(x.transpose(1, 2).reshape(len(x), -1, height, width))
        tokens = self.tokens(tokens, local)
        x = x + local.flatten(2).transpose(1, 2) + self.broadcast(x, tokens)
        z = torch.cat([tokens, x], dim=1)
        return z + self.mlp(self.norm(z))


class Stage(nn.Module):
    def __init__(self, merge: MergePatch | None, blocks: list[Block]) -> None:
        super().__init__()
        self.merge = merge
        self.blocks = nn.ModuleList(blocks)

    def forward(self, z: Tensor, height: int, width: int) -> tuple[Tensor, int, int]:
        if self.merge is not None:
            z, height, width = self.merge(z, height, width)
        for block in self.blocks:
            z = block(z, height, width)
        return z, height, width


class DualTokenViT(nn.Module):
    def __init__(self, depths: tuple[int, ...], mix: bool, num_classes: int = 1000) -> None:
        super().__init__()
        dims, heads, steps = (64, 128, 256), (2, 4, 8), (2, 1, 0)
        self.patch_embed = Stem(dims[0])
        self.global_token = nn.Parameter(torch.zeros(1, 49, dims[0]))
        self.stages = nn.ModuleList(
            Stage(
                MergePatch(dims[i - 1], dims[i], 49) if i else None,
                [Block(dims[i], heads[i], steps[i], mix) for _ in range(depths[i])],
            )
            for i in range(3)
        )
        self.norm = nn.LayerNorm(dims[-1])
        self.head = nn.Linear(dims[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x, height, width = self.patch_embed(x)
        z = torch.cat([self.global_token.expand(len(x), -1, -1), x], dim=1)
        for stage in self.stages:
            z, height, width = stage(z, height, width)
        return self.head(self.norm(z[:, 49:]).mean(1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "dualtoken_vit_t_mix": lambda: DualTokenViT((2, 2, 3), mix=True),
    "dualtoken_vit_s": lambda: DualTokenViT((2, 6, 6), mix=False),
}

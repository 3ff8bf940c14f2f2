"""timm's attention with our socket in it, so that methods written for `Attend` work on timm's models too."""

from __future__ import annotations

from timm.layers.attention import Attention
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from vitalloy.layers.attention import Attend, merge_heads


class SocketedAttention(Attention):
    """timm's self-attention (ViT, DeiT, MobileViT, ...) through `Attend`; parameters and their names stay."""

    attend: Attend

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if is_causal:
            return super().forward(x, attn_mask, is_causal)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        out = self.norm(merge_heads(self.attend(self.q_norm(q), self.k_norm(k), v, bias=attn_mask)))
        gate = getattr(self, "gate", None)
        out = out if gate is None else out * gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


class SocketedWindowAttention(WindowAttention):
    """timm's Swin attention through `Attend`; the position bias and the shift mask become one bias."""

    attend: Attend

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self._get_rel_pos_bias()  # (1, heads, N, N)
        if mask is not None:  # (windows, N, N); x holds every image's windows in turn
            bias = (bias + mask.unsqueeze(1)).repeat(x.shape[0] // mask.shape[0], 1, 1, 1)
        return self.proj_drop(self.proj(merge_heads(self.attend(q, k, v, scale=self.scale, bias=bias))))


_SOCKETED = {Attention: SocketedAttention, WindowAttention: SocketedWindowAttention}


def adapt(model: nn.Module) -> nn.Module:
    """Give every attention of a timm model the socket, in place; other mechanisms are left alone."""
    for module in model.modules():
        kind = _SOCKETED.get(type(module))
        if kind is not None:
            module.__class__ = kind  # same parameters, buffers and hooks; only the forward pass differs
            module.attend = Attend(module.attn_drop.p)
    return model

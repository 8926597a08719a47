"""The Wan2.1 transformer in PyTorch, for machines that lack diffusers: the peer of `benchmarks/peer.py`.

Equal to diffusers' class of the same name in tensors and outputs; tests/benchmarks_test.py compares them.

B batch, T h w latent grid, N tokens, C width, H heads, D head width, L text length.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates adjacent channel pairs of x (B, N, H, D); cos and sin are (N, 1, D/2)."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).type_as(x)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)

    def forward(self, x, context=None, rope=None):
        context = x if context is None else context
        q, k, v = self.norm_q(self.to_q(x)), self.norm_k(self.to_k(context)), self.to_v(context)
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in (q, k, v))  # (B, N, H, D)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        out = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)))
        return self.to_out[0](out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        first = nn.Module()
        first.proj = nn.Linear(dim, hidden)
        self.net = nn.ModuleList([first, nn.Identity(), nn.Linear(hidden, dim)])

    def forward(self, x):
        return self.net[2](F.gelu(self.net[0].proj(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int):
        super().__init__()
        self.attn1, self.attn2 = Attention(dim, heads), Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.ffn = FeedForward(dim, hidden)
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 6, dim))

    def forward(self, x, text, modulation, rope):
        pieces = (self.scale_shift_table + modulation.float()).chunk(6, dim=1)
        shift_attn, scale_attn, gate_attn, shift_ffn, scale_ffn, gate_ffn = pieces
        y = self.attn1(norm(x, shift_attn, scale_attn), rope=rope)
        x = (x.float() + y * gate_attn).type_as(x)
        weight, bias = self.norm2.weight.float(), self.norm2.bias.float()
        y = F.layer_norm(x.float(), x.shape[-1:], weight, bias, 1e-6)
        x = x + self.attn2(y.type_as(x), text)
        y = self.ffn(norm(x, shift_ffn, scale_ffn))
        return (x.float() + y.float() * gate_ffn).type_as(x)


def norm(x, shift, scale):
    return (F.layer_norm(x.float(), x.shape[-1:], eps=1e-6) * (1 + scale) + shift).type_as(x)


class ConditionEmbedder(nn.Module):
    def __init__(self, dim: int, text_dim: int, freq_dim: int):
        super().__init__()

        def two(width: int) -> nn.Module:
            module = nn.Module()
            module.linear_1, module.linear_2 = nn.Linear(width, dim), nn.Linear(dim, dim)
            return module

        self.freq_dim = freq_dim
        self.time_embedder, self.text_embedder = two(freq_dim), two(text_dim)
        self.time_proj = nn.Linear(dim, 6 * dim)

    def forward(self, time, text, image=None):
        half = self.freq_dim // 2
        rates = torch.exp(-torch.log(torch.tensor(1e4)) * torch.arange(half) / half).to(time.device)
        angles = time.float()[:, None] * rates
        wave = torch.cat([angles.cos(), angles.sin()], -1).to(self.time_proj.weight.dtype)
        temb = self.time_embedder.linear_2(F.silu(self.time_embedder.linear_1(wave))).type_as(text)
        text = self.text_embedder.linear_1(text)
        text = self.text_embedder.linear_2(F.gelu(text, approximate="tanh"))
        return temb, self.time_proj(F.silu(temb)), text, image


class WanTransformer3DModel(nn.Module):
    """As diffusers' class, with what the physical branch beside it needs."""

    def __init__(
        self,
        num_attention_heads: int,
        attention_head_dim: int,
        num_layers: int,
        ffn_dim: int,
        text_dim: int,
        freq_dim: int = 256,
    ):
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        self.head_dim = attention_head_dim
        self.patch_embedding = nn.Conv3d(16, dim, kernel_size=(1, 2, 2), stride=(1, 2, 2))
        self.condition_embedder = ConditionEmbedder(dim, text_dim, freq_dim)
        self.blocks = nn.ModuleList(Block(dim, num_attention_heads, ffn_dim) for _ in range(num_layers))
        self.proj_out = nn.Linear(dim, 64)
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 2, dim))
        self.gradient_checkpointing = False

    def enable_gradient_checkpointing(self):
        self.gradient_checkpointing = True

    def rope(self, latents):
        """cos, sin (N, 1, D/2) for latents (B, 16, T, h, w)."""
        grid = (latents.shape[2], latents.shape[3] // 2, latents.shape[4] // 2)
        side = 2 * (self.head_dim // 6)
        angles = []
        for axis, width in enumerate((self.head_dim - 2 * side, side, side)):
            rates = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
            shape = [1, 1, 1, width // 2]
            shape[axis] = grid[axis]
            one = torch.outer(torch.arange(grid[axis], dtype=torch.float64), rates)
            angles.append(one.reshape(shape).expand(*grid, -1))
        angles = torch.cat(angles, -1).reshape(-1, 1, self.head_dim // 2)
        return angles.cos().float().to(latents.device), angles.sin().float().to(latents.device)

    def forward(self, hidden_states, timestep, encoder_hidden_states, return_dict=False):
        """Latents (B, 16, T, h, w), time (B,), text (B, L, text_dim) -> (velocity as the latents,)."""
        frames, rows, columns = hidden_states.shape[2:]
        rope = self.rope(hidden_states)
        x = self.patch_embedding(hidden_states).flatten(2).transpose(1, 2).contiguous()
        temb, modulation, text, _ = self.condition_embedder(timestep, encoder_hidden_states)
        modulation = modulation.unflatten(1, (6, -1))
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, text, modulation, rope, use_reentrant=False)
            else:
                x = block(x, text, modulation, rope)
        shift, scale = (self.scale_shift_table + temb[:, None]).chunk(2, dim=1)
        x = self.proj_out(norm(x, shift, scale))
        # (B, N, ph pw c) -> (B, c, T, h, w)
        x = x.reshape(-1, frames, rows // 2, columns // 2, 2, 2, 16).permute(0, 6, 1, 2, 4, 3, 5)
        return (x.flatten(5, 6).flatten(3, 4),)

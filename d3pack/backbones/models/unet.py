"""The UNet of latent diffusion with cross-attention, in the form of Stable Diffusion and of `mini`.

Other forms, such as SDXL's, are diffusers' own class: `can_build` tells which.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from d3pack.backbones.models.config import settings_of

if TYPE_CHECKING:
    from torch import Tensor

_DOWN = ("DownBlock2D", "CrossAttnDownBlock2D")
_UP = ("UpBlock2D", "CrossAttnUpBlock2D")
# settings that this class does not have, with the value at which they change nothing
_FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": 1,
    "upcast_attention": False,
}
_UNREAD = ("addition_time_embed_dim", "projection_class_embeddings_input_dim")


def can_build(config: Mapping[str, Any]) -> bool:
    """Return whether the class here is the one that a config describes."""
    own = inspect.signature(UNet2DConditionModel).parameters
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    full = {key: p.default for key, p in own.items()} | settings
    widths, down, up = (
        full[key] for key in ("block_out_channels", "down_block_types", "up_block_types")
    )
    return (
        all(
            key in own or key in _UNREAD or (key in _FIXED and value == _FIXED[key])
            for key, value in settings.items()
        )
        and all(isinstance(value, list | tuple) for value in (widths, down, up))
        and all(isinstance(width, int) for width in widths)
        and bool(widths)
        and widths[0] % 2 == 0
        and all(kind in _DOWN for kind in down)
        and all(kind in _UP for kind in up)
        and isinstance(full["layers_per_block"], int)
        and isinstance(full["cross_attention_dim"], int)
        and full["addition_embed_type"] in (None, "text")
        and full["resnet_time_scale_shift"] in ("default", "scale_shift")
    )


class UNet2DConditionModel(nn.Module):
    """A UNet whose settings have the names and defaults of diffusers' class."""

    def __init__(
        self,
        sample_size: int | None = None,
        in_channels: int = 4,
        out_channels: int = 4,
        flip_sin_to_cos: bool = True,
        freq_shift: int = 0,
        down_block_types: Sequence[str] = (*_DOWN[1:] * 3, _DOWN[0]),
        up_block_types: Sequence[str] = (_UP[0], *_UP[1:] * 3),
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        cross_attention_dim: int = 1280,
        attention_head_dim: int | Sequence[int] = 8,
        num_attention_heads: int | Sequence[int] | None = None,
        use_linear_projection: bool = False,
        addition_embed_type: str | None = None,
        addition_embed_type_num_heads: int = 64,
        resnet_time_scale_shift: str = "default",
        time_embedding_dim: int | None = None,
    ) -> None:
        config = settings_of(locals())
        super().__init__()
        self.config = config
        widths = list(block_out_channels)
        # heads are called dimensions in the configs of that class
        heads = num_attention_heads or attention_head_dim
        heads = [heads] * len(widths) if isinstance(heads, int) else list(heads)
        if not len(widths) == len(down_block_types) == len(up_block_types) == len(heads):
            raise ValueError("the lists of blocks, widths and heads differ in length")
        embedding = time_embedding_dim or 4 * widths[0]
        block = _Settings(
            embedding=embedding,
            groups=norm_num_groups,
            eps=norm_eps,
            scales=resnet_time_scale_shift == "scale_shift",
            condition=cross_attention_dim,
            linear=use_linear_projection,
        )
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.time_embedding = _TimeEmbedding(widths[0], embedding)
        self.add_embedding: _TextEmbedding | None = None
        if addition_embed_type == "text":
            self.add_embedding = _TextEmbedding(
                cross_attention_dim, embedding, addition_embed_type_num_heads
            )

        self.down_blocks = _down_blocks(block, down_block_types, widths, heads, layers_per_block)
        self.mid_block = _Block(block, [(widths[-1], widths[-1])] * 2, heads[-1], attentions=1)
        self.up_blocks = _up_blocks(block, up_block_types, widths, heads, layers_per_block)
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, widths[0], eps=norm_eps)
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """Return the prediction for latents at a time, under the states of a text, in a tuple."""
        hidden = encoder_hidden_states
        times = self._time_features(timestep.expand(sample.shape[0]))
        embedding = self.time_embedding(times.to(sample.dtype))
        if self.add_embedding is not None:
            embedding = embedding + self.add_embedding(hidden)
        x = self.conv_in(sample)
        skips = [x]
        for block in self.down_blocks:
            for layer in range(self.config.layers_per_block):
                x = block(layer, x, embedding, hidden)
                skips.append(x)
            for downsample in getattr(block, "downsamplers", ()):
                x = downsample(x)
                skips.append(x)
        for layer in range(2):
            x = self.mid_block(layer, x, embedding, hidden)
        for block in self.up_blocks:
            for layer in range(self.config.layers_per_block + 1):
                x = block(layer, torch.cat([x, skips.pop()], dim=1), embedding, hidden)
            for upsample in getattr(block, "upsamplers", ()):
                x = upsample(x)
        return (self.conv_out(F.silu(self.conv_norm_out(x))),)

    def _time_features(self, times: Tensor) -> Tensor:
        """Return sines and cosines (B, C) of times (B,)."""
        half = self.config.block_out_channels[0] // 2
        exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=times.device)
        angles = times[:, None].float() * torch.exp(exponent / (half - self.config.freq_shift))
        waves = [torch.sin(angles), torch.cos(angles)]
        return torch.cat(waves[::-1] if self.config.flip_sin_to_cos else waves, dim=-1)


@dataclass(frozen=True)
class _Settings:
    """What all blocks of a UNet share."""

    embedding: int
    groups: int
    eps: float
    scales: bool
    condition: int
    linear: bool


def _down_blocks(
    block: _Settings, kinds: Sequence[str], widths: list[int], heads: list[int], layers: int
) -> nn.ModuleList:
    """Return the blocks from the widest latent to the smallest."""
    blocks = nn.ModuleList()
    width = widths[0]
    for index, kind in enumerate(kinds):
        inputs, width = width, widths[index]
        sizes = [(inputs if layer == 0 else width, width) for layer in range(layers)]
        blocks.append(_Block(block, sizes, heads[index] if kind == _DOWN[1] else 0))
        if index < len(widths) - 1:
            blocks[-1].downsamplers = nn.ModuleList([_Downsample(width)])
    return blocks


def _up_blocks(
    block: _Settings, kinds: Sequence[str], widths: list[int], heads: list[int], layers: int
) -> nn.ModuleList:
    """Return the blocks back to the widest latent; each layer also takes one from the way down."""
    blocks = nn.ModuleList()
    width = widths[-1]
    for index, kind in enumerate(kinds):
        before, width = width, widths[-1 - index]
        skip = widths[max(-2 - index, -len(widths))]
        sizes = []
        for layer in range(layers + 1):
            inputs = before if layer == 0 else width
            sizes.append((inputs + (skip if layer == layers else width), width))
        blocks.append(_Block(block, sizes, heads[-1 - index] if kind == _UP[1] else 0))
        if index < len(widths) - 1:
            blocks[-1].upsamplers = nn.ModuleList([_Upsample(width)])
    return blocks


class _Block(nn.Module):
    """Residual layers, with attention after each, after the first few, or without."""

    def __init__(
        self,
        settings: _Settings,
        sizes: Sequence[tuple[int, int]],
        heads: int,
        attentions: int | None = None,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(_Resnet(settings, *size) for size in sizes)
        if heads:
            self.attentions = nn.ModuleList(
                _Transformer(settings, width, heads) for _, width in sizes[:attentions]
            )

    def forward(self, layer: int, x: Tensor, embedding: Tensor, hidden: Tensor) -> Tensor:
        x = self.resnets[layer](x, embedding)
        attentions = getattr(self, "attentions", ())
        return attentions[layer](x, hidden) if layer < len(attentions) else x


class _Resnet(nn.Module):
    def __init__(self, settings: _Settings, inputs: int, outputs: int) -> None:
        super().__init__()
        self._scales = settings.scales
        self.norm1 = nn.GroupNorm(settings.groups, inputs, eps=settings.eps)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time_emb_proj = nn.Linear(settings.embedding, outputs * (2 if settings.scales else 1))
        self.norm2 = nn.GroupNorm(settings.groups, outputs, eps=settings.eps)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.conv_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        out = self.conv1(F.silu(self.norm1(x)))
        shift = self.time_emb_proj(F.silu(embedding))[:, :, None, None]
        if self._scales:
            scale, shift = shift.chunk(2, dim=1)
            out = self.norm2(out) * (1 + scale) + shift
        else:
            out = self.norm2(out + shift)
        out = self.conv2(F.silu(out))
        shortcut = getattr(self, "conv_shortcut", None)
        added: Tensor = (x if shortcut is None else shortcut(x)) + out
        return added


class _Transformer(nn.Module):
    """Self-attention, cross-attention and a feed-forward layer over the pixels of a latent."""

    def __init__(self, settings: _Settings, width: int, heads: int) -> None:
        super().__init__()
        self._linear = settings.linear
        inner = heads * (width // heads)
        self.norm = nn.GroupNorm(settings.groups, width, eps=1e-6)
        self.proj_in: nn.Module = (
            nn.Linear(width, inner) if self._linear else nn.Conv2d(width, inner, 1)
        )
        self.transformer_blocks = nn.ModuleList([_TransformerBlock(inner, heads, settings)])
        self.proj_out: nn.Module = (
            nn.Linear(inner, width) if self._linear else nn.Conv2d(inner, width, 1)
        )

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        count, _, height, width = x.shape
        out = self.norm(x)
        if not self._linear:
            out = self.proj_in(out)
        out = out.permute(0, 2, 3, 1).reshape(count, height * width, -1)
        if self._linear:
            out = self.proj_in(out)
        out = self.transformer_blocks[0](out, hidden)
        if self._linear:
            out = self.proj_out(out)
        out = out.reshape(count, height, width, -1).permute(0, 3, 1, 2).contiguous()
        if not self._linear:
            out = self.proj_out(out)
        added: Tensor = out + x
        return added


class _TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int, settings: _Settings) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, settings.condition, heads)
        self.norm3 = nn.LayerNorm(width)
        self.ff = _FeedForward(width)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        x = self.attn1(self.norm1(x)) + x
        x = self.attn2(self.norm2(x), encoder_hidden_states=hidden) + x
        out: Tensor = self.ff(self.norm3(x)) + x
        return out


class Attention(nn.Module):
    """Attention over a sequence, or from it to another; a processor may compute it otherwise."""

    residual_connection = False
    rescale_output_factor = 1

    def __init__(self, width: int, condition: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.processor: Callable[..., Tensor] | None = None
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(condition, width, bias=False)
        self.to_v = nn.Linear(condition, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.to_qkv: nn.Linear | None = None

    def set_processor(self, processor: Callable[..., Tensor]) -> None:
        """Let a function of this layer and its inputs compute the attention."""
        self.processor = processor

    @torch.no_grad()
    def fuse_projections(self) -> None:
        """Compute queries, keys and values of self-attention with one product."""
        weight = torch.cat([self.to_q.weight, self.to_k.weight, self.to_v.weight])
        self.to_qkv = nn.Linear(
            weight.shape[1], len(weight), bias=False, device=weight.device, dtype=weight.dtype
        )
        self.to_qkv.weight.copy_(weight)

    def forward(self, x: Tensor, encoder_hidden_states: Tensor | None = None) -> Tensor:
        if self.processor is not None:
            return self.processor(self, x, encoder_hidden_states=encoder_hidden_states)
        if self.to_qkv is not None:
            parts = self.to_qkv(x).chunk(3, dim=-1)
        else:
            source = x if encoder_hidden_states is None else encoder_hidden_states
            parts = self.to_q(x), self.to_k(source), self.to_v(source)
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.to_out[0](mixed.transpose(1, 2).flatten(2))
        return out


class _FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        # in between, diffusers has its dropout
        self.net = nn.ModuleList([_Gate(width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net[2](self.net[0](x))
        return out


class _Gate(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class _TimeEmbedding(nn.Module):
    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(features, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.linear_2(F.silu(self.linear_1(features)))
        return out


class _TextEmbedding(nn.Module):
    """One vector of a condition, which is added to the embedding of the time."""

    def __init__(self, condition: int, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(condition)
        self.pool = _Pooling(condition, heads)
        self.proj = nn.Linear(condition, width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.norm2(self.proj(self.pool(self.norm1(hidden))))
        return out


class _Pooling(nn.Module):
    """Attention from the mean of a sequence to it and its mean."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self._heads = heads
        self.positional_embedding = nn.Parameter(torch.zeros(1, width))
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=1, keepdim=True) + self.positional_embedding.to(x.dtype)
        x = torch.cat([mean, x], dim=1)
        q, k, v = (
            self._split(part) for part in (self.q_proj(mean), self.k_proj(x), self.v_proj(x))
        )
        scale = 1 / math.sqrt(math.sqrt(q.shape[1]))
        weight = torch.einsum("bct,bcs->bts", q * scale, k * scale)
        weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
        mixed = torch.einsum("bts,bcs->bct", weight, v)
        return mixed.reshape(x.shape[0], -1)

    def _split(self, x: Tensor) -> Tensor:
        """Return (B * heads, C, T) of (B, T, heads * C)."""
        split: Tensor = x.unflatten(2, (self._heads, -1)).transpose(1, 2).flatten(0, 1)
        return split.transpose(1, 2)


class _Downsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


class _Upsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        # torch's kernel for channels last fails on large batches
        if len(x) >= 64 or x.numel() * 2 > 1 << 31:
            x = x.contiguous()
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out

"""The layers of CLIP's text model, from embeddings of tokens to states."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from torch import Tensor


class CLIPTextModel(nn.Module):
    """CLIP's text model, layer by layer; the caller goes through them, and makes the mask."""

    has_projection = False

    def __init__(
        self,
        vocab_size: int = 49408,
        hidden_size: int = 512,
        intermediate_size: int = 2048,
        projection_dim: int = 512,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 8,
        max_position_embeddings: int = 77,
        hidden_act: str = "quick_gelu",
        layer_norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if hidden_act not in _ACTIVATIONS:
            raise ValueError(f"hidden_act {hidden_act!r} is not {' or '.join(_ACTIVATIONS)}")
        if hidden_size % num_attention_heads:
            raise ValueError(f"{num_attention_heads} heads do not divide {hidden_size} channels")
        self.embeddings = _Embeddings(vocab_size, max_position_embeddings, hidden_size)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(
            _Layer(hidden_size, num_attention_heads, intermediate_size, hidden_act, layer_norm_eps)
            for _ in range(num_hidden_layers)
        )
        self.final_layer_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        if self.has_projection:
            self.text_projection = nn.Linear(hidden_size, projection_dim, bias=False)


class CLIPTextModelWithProjection(CLIPTextModel):
    """The text model with a projection for the pooled vector."""

    has_projection = True


class _Embeddings(nn.Module):
    def __init__(self, words: int, positions: int, width: int) -> None:
        super().__init__()
        # with random values in a tensor on the meta device, torch imports its compiler: a second
        self.token_embedding = nn.Embedding(words, width, _weight=torch.empty(words, width))
        self.position_embedding = nn.Embedding(
            positions, width, _weight=torch.empty(positions, width)
        )

    def forward(self, embeddings: Tensor) -> Tensor:
        """Add the positions to embeddings (B, T, D)."""
        return embeddings + self.position_embedding.weight[: embeddings.shape[1]]


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, inner: int, activation: str, eps: float) -> None:
        super().__init__()
        self.self_attn = _Attention(width, heads)
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.mlp = _Mlp(width, inner, activation)
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        out: Tensor = x + self.mlp(self.layer_norm2(x))
        return out


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self._shape = (heads, width // heads)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (
            project(x).view(*x.shape[:2], *self._shape).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=self._shape[1] ** -0.5
        )
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return out


class _Mlp(nn.Module):
    def __init__(self, width: int, inner: int, activation: str) -> None:
        super().__init__()
        self._activate = _ACTIVATIONS[activation]
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self._activate(self.fc1(x)))
        return out


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": _quick_gelu, "gelu": F.gelu}

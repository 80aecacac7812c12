"""The UNet of a latent diffusion model, which several families have."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from d3pack.backbones.kernels import match_memory_format
from d3pack.backbones.loading import Files, build, config_error, number
from d3pack.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from d3pack.backbones.autoencoder import Autoencoder

STEM = "diffusion_pytorch_model"


class Unet:
    """A UNet that computes what depends on the condition alone once for all steps."""

    def __init__(self, files: Files, *, device: torch.device, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self.model = build(
            files, "unet", STEM, ("UNet2DConditionModel",), device=device, dtype=dtype
        )
        self.config = config = self.model.config
        self.width = int(config.cross_attention_dim)
        self._step = 2 ** (len(config.block_out_channels) - 1)
        self._attention = CachedAttention()
        for name, module in self.model.named_modules():
            if name.endswith(".attn2") and _is_plain(module):
                module.set_processor(self._attention)
            elif name == "add_embedding" and config.addition_embed_type == "text":
                module.forward = self._attention.cached(module.forward)

    def join(self, autoencoder: Autoencoder) -> None:
        """Take the latents of an autoencoder, which decide about the sizes of images."""
        config = self.config
        self._channels, self._factor = autoencoder.channels, autoencoder.factor
        if not config.in_channels == config.out_channels == self._channels:
            raise config_error("UNet and autoencoder have different latent channels")
        side = int(number("unet/config.json", config, "sample_size", 64)) * self._factor
        self.image_size = (side, side)

    def latent_shape_for(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """Return (C, H, W) of a latent, for sizes that the UNet can halve often enough."""
        unit = self._factor * self._step
        if any(side < unit or side % unit for side in size):
            raise UsageError(
                f"invalid image size {size[0]}x{size[1]}: this backbone takes multiples of {unit}"
            )
        return (self._channels, size[0] // self._factor, size[1] // self._factor)

    def __call__(self, x_t: Tensor, t: Tensor, hidden: Tensor, **more: Any) -> Tensor:
        """Return the prediction at x_t, under hidden states (B, T, D)."""
        out: Tensor = self.model(
            match_memory_format(x_t.to(self._dtype)),
            t,
            encoder_hidden_states=hidden,
            return_dict=False,
            **more,
        )[0]
        return out.float()

    def changed(self) -> None:
        """Drop what was computed with other weights."""
        self._attention.clear()


class CachedAttention:
    """Cross-attention that computes keys and values of a condition once for all steps.

    A condition is the same tensor at every step of a sampler, and its keys, values and pooled
    embedding depend on nothing else. With gradients everything is computed again, and in compiled
    code too, which would otherwise be compiled for each state of the cache.
    """

    def __init__(self) -> None:
        self._local = threading.local()  # groups run in parallel threads
        self._version = 0

    def clear(self) -> None:
        self._version += 1

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        assert encoder_hidden_states is not None
        assert attention_mask is None
        query = self._heads(attn, attn.to_q(hidden_states))
        if _is_caching():
            results = self._results(encoder_hidden_states)
            if id(attn) not in results:
                results[id(attn)] = self._project(attn, encoder_hidden_states)
            key, value = results[id(attn)]
        else:
            key, value = self._project(attn, encoder_hidden_states)
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        mixed = mixed.transpose(1, 2).flatten(2)
        out: Tensor = attn.to_out[0](mixed)
        return out

    def cached(self, embed: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Return a function of the condition alone, whose result is kept like keys and values."""

        def call(hidden: Tensor) -> Tensor:
            if not _is_caching():
                return embed(hidden)
            results = self._results(hidden)
            if 0 not in results:
                results[0] = embed(hidden)
            pooled: Tensor = results[0]
            return pooled

        return call

    def _results(self, hidden: Tensor) -> dict[int, Any]:
        """Return what was computed from this condition, by the id of the layer."""
        local = self._local
        if getattr(local, "hidden", None) is not hidden or local.version != self._version:
            local.hidden, local.version, local.results = hidden, self._version, {}
        results: dict[int, Any] = local.results
        return results

    def _project(self, attn: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return self._heads(attn, attn.to_k(hidden)), self._heads(attn, attn.to_v(hidden))

    @staticmethod
    def _heads(attn: Any, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], attn.heads, -1).transpose(1, 2)


def _is_caching() -> bool:
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _is_plain(attn: Any) -> bool:
    """Return whether this attention is projections and a product, with nothing in between.

    Others keep diffusers' own processor, which computes keys and values at every step.
    """
    extras = ("norm_cross", "group_norm", "spatial_norm", "norm_q", "norm_k", "add_k_proj")
    return (
        all(getattr(attn, extra, None) is None for extra in extras)
        and not attn.residual_connection
        and attn.rescale_output_factor == 1
    )

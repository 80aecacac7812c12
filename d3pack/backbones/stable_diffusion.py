"""Stable Diffusion 1.x and 2.x, and everything in their layout: text, UNet, autoencoder.

Another text-to-image family is one more module like this, see `d3pack.backbones.protocol`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from d3pack.backbones.autoencoder import Autoencoder, to_uint8
from d3pack.backbones.kernels import match_memory_format
from d3pack.backbones.levels import Levels, Timesteps
from d3pack.backbones.loading import Files, build, config_error, number
from d3pack.backbones.lock import Layout, Part
from d3pack.backbones.protocol import TEMPLATE, Condition
from d3pack.backbones.text import (
    POSITIONS,
    TextEncoder,
    check_outputs,
    missing_encoder,
    open_text,
)
from d3pack.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from d3pack.format import BackboneRef

LAYOUT = Layout(
    (
        Part("scheduler", "scheduler_config.json"),
        Part("text_encoder", weights="model", text=True),
        Part(
            "tokenizer",
            config="",
            others=(("tokenizer.json",), ("vocab.json", "merges.txt")),
            optional=("special_tokens_map.json", "tokenizer_config.json"),
            text=True,
        ),
        Part("unet", weights="diffusion_pytorch_model"),
        Part("vae", weights="diffusion_pytorch_model"),
    )
)
# settings of other families, which ask for more inputs
_UNSUPPORTED = (
    "addition_embed_type",
    "class_embed_type",
    "encoder_hid_dim_type",
    "num_class_embeds",
    "time_cond_proj_dim",
)


class StableDiffusion:
    """Learned vectors in a prompt, a UNet, an autoencoder."""

    def __init__(
        self, ref: BackboneRef, files: Files, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.ref, self.device, self.dtype = ref, device, dtype
        self.levels = Levels.from_config(files.json("scheduler/scheduler_config.json"))
        self._timesteps = Timesteps(device)
        stem = "diffusion_pytorch_model"
        self.denoiser = build(
            files, "unet", stem, ("UNet2DConditionModel",), device=device, dtype=dtype
        )
        self._text = open_text(files, device=device, dtype=dtype)
        self.autoencoder = Autoencoder(files, device=device, dtype=dtype)
        config = self.denoiser.config
        self._check(config)
        side = int(number("unet/config.json", config, "sample_size", 64)) * self.autoencoder.factor
        self.image_size = (side, side)
        width = int(config.cross_attention_dim)
        positions = self._text.positions if self._text else POSITIONS
        self.prompt_shape = (positions - 2 if self._text else 0, width)
        self.output_shape = (1, positions, width)
        self._step = 2 ** (len(config.block_out_channels) - 1)
        self._attention = _CachedAttention()
        self._install(self._attention)

    def _check(self, config: Any) -> None:
        for key in _UNSUPPORTED:
            # "text" pools the hidden states, and so asks for no other input
            if config.get(key) not in ((None, "text") if key == "addition_embed_type" else (None,)):
                raise config_error(
                    f"unet/config.json sets {key}, which Stable Diffusion 1.x and 2.x do not"
                )
        if self._text and config.cross_attention_dim != self._text.width:
            raise config_error(
                f"the UNet takes states of width {config.cross_attention_dim}, the text encoder"
                f" returns width {self._text.width}"
            )
        if not config.in_channels == config.out_channels == self.autoencoder.channels:
            raise config_error("UNet and autoencoder have different latent channels")

    def _install(self, processor: _CachedAttention) -> None:
        for name, module in self.denoiser.named_modules():
            if name.endswith(".attn2") and _is_plain(module):
                module.set_processor(processor)
            elif name == "add_embedding":
                module.forward = processor.cached(module.forward)

    @property
    def text(self) -> TextEncoder:
        """The text encoder, where it is open."""
        if self._text is None:
            raise missing_encoder()
        return self._text

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a latent at the native image size."""
        return self.latent_shape_for(self.image_size)

    def latent_shape_for(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """Return (C, H, W) of a latent, for sizes that the UNet can halve often enough."""
        unit = self.autoencoder.factor * self._step
        if any(side < unit or side % unit for side in size):
            raise UsageError(
                f"invalid image size {size[0]}x{size[1]}: this backbone takes multiples of {unit}"
            )
        factor = self.autoencoder.factor
        return (self.autoencoder.channels, size[0] // factor, size[1] // factor)

    def condition(self, prompts: Tensor, template: str | None = TEMPLATE) -> Condition:
        """Return the encoded template with vectors (B, k, D) in it; without one, the vectors."""
        if template is None:
            check_outputs(prompts, self.output_shape)
            return Condition({"hidden": prompts.to(self.device, self.dtype)})
        spliced = self.text.splice(prompts.to(self.device), template)
        return Condition({"hidden": self.text.encode(spliced)})

    def unconditional(self) -> Condition:
        """Return the condition of the empty prompt, one row."""
        return self.sentence("")

    def sentence(self, text: str) -> Condition:
        """Return the condition of an ordinary prompt, one row."""
        return Condition({"hidden": self.text.encode(self.text.embed(self.text.ids(text))[None])})

    def denoise(self, x: Tensor, sigma: float, c: Condition) -> Tensor:
        """Return x0 from x = x0 + sigma * eps."""
        t = self._timesteps(self.levels.timestep(sigma))
        out = self._forward(self.levels.scaled(x, sigma), t, c)
        return self.levels.denoised(x, sigma, out)

    def predict(self, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        """Return the UNet's output at timesteps t (B,)."""
        return self._forward(x_t, t.to(self.device), c)

    def _forward(self, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        hidden = c.tensors["hidden"]
        out: Tensor = self.denoiser(
            match_memory_format(x_t.to(self.dtype)),
            t,
            encoder_hidden_states=hidden,
            return_dict=False,
        )[0]
        return out.float()

    def encode(self, images: Tensor) -> Tensor:
        """Return the latents of images."""
        return self.autoencoder.encode(images.to(self.device))

    def decode(self, latents: Tensor) -> Tensor:
        """Return uint8 images of latents."""
        return to_uint8(self.decode_float(latents))

    def decode_float(self, latents: Tensor) -> Tensor:
        """Return float images around [-1, 1] of latents."""
        return self.autoencoder.decode_float(latents)

    def name_vectors(self, name: str, k: int | None = None) -> Tensor:
        """Return the token embeddings of a name, repeated in turn or averaged to be k."""
        words = name.replace("_", " ").strip()
        tokens = self.text.embed(self.text.words.ids(words) or [self.text.words.end]).float()
        if k is None:
            return tokens
        if len(tokens) <= k:
            return tokens[torch.arange(k, device=tokens.device) % len(tokens)]
        return torch.stack([part.mean(0) for part in torch.tensor_split(tokens, k)])

    def outputs(self, text: str, k: int) -> Tensor:
        """Return the last k outputs up to that of the end token, or the first k of all."""
        ids = self.text.ids(text)
        stop = max(k, ids.index(self.text.words.end, 1) + 1)
        return self.sentence(text).tensors["hidden"][0, stop - k : stop].float()

    def named_tensors(self) -> Mapping[str, nn.Parameter]:
        """Return the UNet's parameters."""
        return dict(self.denoiser.named_parameters())

    def changed(self) -> None:
        """Drop what was computed with other weights."""
        self._attention.clear()


class _CachedAttention:
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

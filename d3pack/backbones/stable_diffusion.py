"""Stable Diffusion 1.x and 2.x, and everything in their layout: text, UNet, autoencoder.

Another text-to-image family is one more file like this. SDXL: a second `TextEncoder` and its pooled
output, `added_cond_kwargs` built from a `Condition` with the tensors "hidden", "pooled" and
"time_ids"; vectors as wide as both encoders together, split at the look-up. A flow-matching
transformer: `Levels` for x_t = (1 - s) x0 + s eps (in our scale sigma = s / (1 - s), and x_t is
x * (1 - s)), its own text encoders, and the same four calls. Either registers its loader under the
entry point group "d3pack.backbones"; nothing else in d3pack changes.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from d3pack.backbones.autoencoder import Autoencoder, to_uint8
from d3pack.backbones.cpu import like_weights
from d3pack.backbones.layout import Layout, Part
from d3pack.backbones.levels import Levels, Timesteps
from d3pack.backbones.loading import Files, build, number
from d3pack.backbones.protocol import TEMPLATE, Condition
from d3pack.backbones.text import TextEncoder
from d3pack.errors import BackboneError, UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from d3pack.format.recipe import BackboneRef

KIND = "stable-diffusion"
LAYOUT = Layout(
    (
        Part("scheduler", "scheduler_config.json"),
        Part("text_encoder", weights="model"),
        Part(
            "tokenizer",
            config="",
            others=(("tokenizer.json",), ("vocab.json", "merges.txt")),
            optional=("special_tokens_map.json", "tokenizer_config.json"),
        ),
        Part("unet", weights="diffusion_pytorch_model"),
        Part("vae", weights="diffusion_pytorch_model"),
    )
)
# inputs that this family does not have
_FOREIGN = (
    "addition_embed_type",
    "class_embed_type",
    "encoder_hid_dim_type",
    "num_class_embeds",
    "time_cond_proj_dim",
)


class StableDiffusion:
    """Learned vectors in a sentence, a UNet, an autoencoder."""

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
        self.text = TextEncoder(files, device=device, dtype=dtype)
        self.autoencoder = Autoencoder(files, device=device, dtype=dtype)
        config = self.denoiser.config
        self._check(config)
        side = int(number("unet/config.json", config, "sample_size", 64)) * self.autoencoder.factor
        self.image_size = (side, side)
        self.prompt_shape = (self.text.positions - 2, self.text.width)
        self._step = 2 ** (len(config.block_out_channels) - 1)
        self._attention = _RememberedCondition()
        self._hook(self._attention)

    def _check(self, config: Any) -> None:
        for key in _FOREIGN:
            # "text" pools the hidden states that are there anyway; other kinds ask for more inputs
            if config.get(key) not in ((None, "text") if key == "addition_embed_type" else (None,)):
                raise BackboneError(
                    f"unet/config.json sets {key}, which Stable Diffusion 1.x and 2.x do not",
                    code="E_BACKBONE_CONFIG",
                )
        if config.cross_attention_dim != self.text.width:
            raise BackboneError(
                f"the UNet attends to {config.cross_attention_dim} wide states, the text encoder"
                f" makes {self.text.width} wide ones",
                code="E_BACKBONE_CONFIG",
            )
        if not config.in_channels == config.out_channels == self.autoencoder.channels:
            raise BackboneError(
                "UNet and autoencoder disagree about the latent channels", code="E_BACKBONE_CONFIG"
            )

    def _hook(self, processor: _RememberedCondition) -> None:
        for name, module in self.denoiser.named_modules():
            if name.endswith(".attn2") and _plain(module):
                module.set_processor(processor)
            elif name == "add_embedding":
                module.forward = processor.once(module.forward)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a latent at the native image size."""
        return self.latent_shape_for(self.image_size)

    def latent_shape_for(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(C, H, W) of a latent; any size that the UNet can halve often enough."""
        unit = self.autoencoder.factor * self._step
        if any(side < unit or side % unit for side in size):
            raise UsageError(
                f"images of {size[0]}x{size[1]} do not fit this backbone",
                hint=f"use multiples of {unit}",
            )
        factor = self.autoencoder.factor
        return (self.autoencoder.channels, size[0] // factor, size[1] // factor)

    def condition(self, prompts: Tensor, template: str = TEMPLATE) -> Condition:
        """Vectors (B, k, D) spliced into the template, through the text encoder."""
        spliced = self.text.splice(prompts.to(self.device), template)
        return Condition({"hidden": self.text.encode(spliced)})

    def unconditional(self) -> Condition:
        """The empty prompt."""
        return self.sentence("")

    def sentence(self, text: str) -> Condition:
        """An ordinary prompt, one row."""
        return Condition({"hidden": self.text.encode(self.text.embed(self.text.ids(text))[None])})

    def denoise(self, x: Tensor, sigma: float, c: Condition) -> Tensor:
        """x0 from x = x0 + sigma * eps."""
        t = self._timesteps(self.levels.timestep(sigma))
        out = self._forward(x / math.sqrt(sigma**2 + 1), t, c)
        return self.levels.denoised(x, sigma, out)

    def predict(self, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        """What the UNet says at timesteps t (B,)."""
        return self._forward(x_t, t.to(self.device), c)

    def _forward(self, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        hidden = c.tensors["hidden"]
        out: Tensor = self.denoiser(
            like_weights(x_t.to(self.dtype)), t, encoder_hidden_states=hidden, return_dict=False
        )[0]
        return out.float()

    def encode(self, images: Tensor) -> Tensor:
        """Images -> latents."""
        return self.autoencoder.encode(images.to(self.device))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> uint8 images."""
        return to_uint8(self.decode_float(latents))

    def decode_float(self, latents: Tensor) -> Tensor:
        """Latents -> float images around [-1, 1]."""
        return self.autoencoder.decode_float(latents)

    def name_vectors(self, name: str, k: int | None = None) -> Tensor:
        """The name's own token embeddings: repeated in turn up to k, or averaged down to k."""
        words = name.replace("_", " ").strip()
        tokens = self.text.embed(self.text.words.ids(words) or [self.text.words.end]).float()
        if k is None:
            return tokens
        if len(tokens) <= k:
            return tokens[torch.arange(k, device=tokens.device) % len(tokens)]
        return torch.stack([part.mean(0) for part in torch.tensor_split(tokens, k)])

    def named_tensors(self) -> Mapping[str, nn.Parameter]:
        """The UNet's parameters."""
        return dict(self.denoiser.named_parameters())

    def changed(self) -> None:
        """Forget what was projected with other weights."""
        self._attention.forget()


class _RememberedCondition:
    """Cross-attention that projects a condition once for all steps that share it.

    A condition is the same tensor at every step of a sampler, and its keys and values depend on
    nothing else; nor does its pooled embedding. With gradients on, everything is computed anew;
    in compiled code too, which would be compiled again for each state of the memory.
    """

    def __init__(self) -> None:
        self._now = threading.local()  # groups run side by side
        self._age = 0

    def forget(self) -> None:
        self._age += 1

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
        if _anew():
            key, value = self._project(attn, encoder_hidden_states)
        else:
            known = self._known(encoder_hidden_states)
            if id(attn) not in known:
                known[id(attn)] = self._project(attn, encoder_hidden_states)
            key, value = known[id(attn)]
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        mixed = mixed.transpose(1, 2).flatten(2)
        out: Tensor = attn.to_out[0](mixed)
        return out

    def once(self, plain: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """A function of the condition alone, remembered like keys and values."""

        def remembered(hidden: Tensor) -> Tensor:
            if _anew():
                return plain(hidden)
            known = self._known(hidden)
            if 0 not in known:
                known[0] = plain(hidden)
            pooled: Tensor = known[0]
            return pooled

        return remembered

    def _known(self, hidden: Tensor) -> dict[int, Any]:
        now = self._now
        if getattr(now, "hidden", None) is not hidden or now.age != self._age:
            now.hidden, now.age, now.known = hidden, self._age, {}
        known: dict[int, Any] = now.known
        return known

    def _project(self, attn: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return self._heads(attn, attn.to_k(hidden)), self._heads(attn, attn.to_v(hidden))

    @staticmethod
    def _heads(attn: Any, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], attn.heads, -1).transpose(1, 2)


def _anew() -> bool:
    return torch.is_grad_enabled() or torch.compiler.is_compiling()


def _plain(attn: Any) -> bool:
    """Whether this attention is projections and a product, and nothing in between.

    Others keep diffusers' own processor, which projects a condition at every step.
    """
    extras = ("norm_cross", "group_norm", "spatial_norm", "norm_q", "norm_k", "add_k_proj")
    return (
        all(getattr(attn, extra, None) is None for extra in extras)
        and not attn.residual_connection
        and attn.rescale_output_factor == 1
    )

"""Stable Diffusion 1.x and 2.x, and everything in their layout: text, UNet, autoencoder.

Another text-to-image family is one more module like this, see `d3pack.backbones.protocol`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from d3pack.backbones.autoencoder import Autoencoder, to_uint8
from d3pack.backbones.levels import Levels, Timesteps
from d3pack.backbones.loading import Files, config_error
from d3pack.backbones.lock import Layout, Part
from d3pack.backbones.protocol import TEMPLATE, Condition
from d3pack.backbones.text import (
    POSITIONS,
    TextEncoder,
    check_outputs,
    missing_encoder,
    open_text,
    spread,
    tokenizer,
)
from d3pack.backbones.unet import Unet

if TYPE_CHECKING:
    from torch import Tensor, nn

    from d3pack.format import BackboneRef

LAYOUT = Layout(
    (
        Part("scheduler", "scheduler_config.json"),
        Part("text_encoder", weights="model", text=True),
        tokenizer("tokenizer"),
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
        self._unet = Unet(files, device=device, dtype=dtype)
        self.denoiser = self._unet.model
        self._text = open_text(files, device=device, dtype=dtype)
        self.autoencoder = Autoencoder(files, device=device, dtype=dtype)
        self._check(self._unet.config)
        self._unet.join(self.autoencoder)
        self.image_size, width = self._unet.image_size, self._unet.width
        positions = self._text.positions if self._text else POSITIONS
        self.prompt_shape = (positions - 2 if self._text else 0, width)
        self.output_shape = (1, positions, width)

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
        return self._unet.latent_shape_for(size)

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
        return self._unet(x_t, t, c.tensors["hidden"])

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
        return spread(self.text.name_tokens(name), k)

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
        self._unet.changed()

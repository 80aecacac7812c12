"""Stable Diffusion XL, and everything in its layout: two text encoders, UNet, autoencoder.

A token is as wide as the embeddings of both encoders together. The denoiser attends to the states
before their last layers, side by side; it also takes the pooled vector of the second encoder, and
the size of the image. Turbo, Lightning and LCM are known by their schedulers, and sampled as these
would: few steps, without guidance.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from d3pack.backbones.autoencoder import Autoencoder, to_uint8
from d3pack.backbones.levels import Levels, Timesteps
from d3pack.backbones.loading import Files, config_error, number
from d3pack.backbones.lock import Layout, Part
from d3pack.backbones.protocol import TEMPLATE, Condition, Sampling
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
from d3pack.errors import BackboneError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from d3pack.format import BackboneRef

LAYOUT = Layout(
    (
        Part("scheduler", "scheduler_config.json"),
        Part("text_encoder", weights="model", text=True),
        Part("text_encoder_2", weights="model", text=True),
        tokenizer("tokenizer"),
        tokenizer("tokenizer_2"),
        Part("unet", weights="diffusion_pytorch_model"),
        Part("vae", weights="diffusion_pytorch_model"),
    ),
    optional=("model_index.json",),
)
_SIZES = 6  # height and width of the original, corner of the crop, height and width of the image
_UNSUPPORTED = (
    "class_embed_type",
    "encoder_hid_dim_type",
    "num_class_embeds",
    "time_cond_proj_dim",
)


class StableDiffusionXL:
    """Learned vectors in a prompt for two text encoders, a UNet, an autoencoder."""

    def __init__(
        self, ref: BackboneRef, files: Files, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.ref, self.device, self.dtype = ref, device, dtype
        scheduler = files.json("scheduler/scheduler_config.json")
        self.levels = Levels.from_config(scheduler)
        self.sampling = _sampling(scheduler)
        self._timesteps = Timesteps(device)
        self._known_sizes: dict[tuple[int, int], Tensor] = {}
        self._pooled = _pooled_width(files.json("unet/config.json"))
        self._unet = Unet(files, device=device, dtype=dtype)
        self.autoencoder = Autoencoder(files, device=device, dtype=dtype)
        self._unet.join(self.autoencoder)
        self.denoiser = self._unet.model
        first = open_text(files, device=device, dtype=dtype)
        second = open_text(files, device=device, dtype=dtype, second=True)
        self._texts = (first, second) if first and second else None
        self._check()
        self._zeros = _forces_zeros(files)
        self.image_size, width = self._unet.image_size, self._unet.width
        positions = first.positions if first else POSITIONS
        self.prompt_shape = (positions - 2 if self._texts else 0, width)
        self.output_shape = (2, positions + 1, width)

    def _check(self) -> None:
        width = self._unet.width
        if self._pooled > width:
            raise config_error(f"the pooled vector of {self._pooled} is wider than states, {width}")
        if self._texts is None:
            return
        first, second = self._texts
        if first.width + second.width != width or first.positions != second.positions:
            raise config_error(
                f"the UNet takes states of width {width}, the text encoders return"
                f" {first.width} and {second.width} for {first.positions} and {second.positions}"
                " positions"
            )
        assert second.projection is not None
        if len(second.projection) != self._pooled:
            raise config_error(
                f"the UNet takes a pooled vector of {self._pooled}, the text encoder returns one of"
                f" {len(second.projection)}"
            )

    @property
    def texts(self) -> tuple[TextEncoder, TextEncoder]:
        """Both text encoders, where they are open."""
        if self._texts is None:
            raise missing_encoder()
        return self._texts

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a latent at the native image size."""
        return self.latent_shape_for(self.image_size)

    def latent_shape_for(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """Return (C, H, W) of a latent, for sizes that the UNet can halve often enough."""
        return self._unet.latent_shape_for(size)

    def condition(self, prompts: Tensor, template: str | None = TEMPLATE) -> Condition:
        """Return the encoded template with vectors (B, k, D) in it; without one, the vectors."""
        prompts = prompts.to(self.device)
        if template is None:
            return self._of_outputs(prompts)
        first, second = self.texts
        if prompts.ndim != 3 or prompts.shape[2] != self.prompt_shape[1]:
            raise BackboneError(
                f"prompts of shape {tuple(prompts.shape)} do not fit: vectors here are"
                f" {first.width} + {second.width} wide",
                code="E_BACKBONE_PROMPT",
                hint="the pack was made for another backbone",
            )
        parts = prompts.split([first.width, second.width], dim=2)
        spliced = [text.splice(p, template) for text, p in zip(self.texts, parts, strict=True)]
        around = sum(len(second.words.ids(part)) for part in template.split("{}"))
        return self._encode(spliced, 1 + around + prompts.shape[1])

    def _of_outputs(self, outputs: Tensor) -> Condition:
        """Return the condition of states, of which the last vector is the pooled one."""
        check_outputs(outputs, self.output_shape)
        if outputs[:, -1, self._pooled :].any():
            raise BackboneError(
                f"the pooled vector, the last one, has more than {self._pooled} values",
                code="E_BACKBONE_PROMPT",
                hint="the pack was made for another backbone",
            )
        outputs = outputs.to(self.dtype)
        pooled = outputs[:, -1, : self._pooled]
        return Condition({"hidden": outputs[:, :-1], "pooled": pooled})

    def _encode(self, embeddings: list[Tensor], end: int) -> Condition:
        """Return the condition of embeddings for each encoder, whose end token is at `end`."""
        first, second = self.texts
        left, _ = first.encode_deep(embeddings[0], end)
        right, last = second.encode_deep(embeddings[1], end)
        assert second.projection is not None
        pooled = torch.nn.functional.linear(last, second.projection)
        return Condition({"hidden": torch.cat([left, right], dim=2), "pooled": pooled})

    def unconditional(self) -> Condition:
        """Return the condition of no class, one row: zeros, or that of the empty prompt."""
        if not self._zeros:
            return self.sentence("")
        hidden = torch.zeros(1, self.texts[0].positions, self._unet.width)
        pooled = torch.zeros(1, self._pooled)
        parts = {"hidden": hidden, "pooled": pooled}
        return Condition({k: v.to(self.device, self.dtype) for k, v in parts.items()})

    def sentence(self, text: str) -> Condition:
        """Return the condition of an ordinary prompt, one row."""
        ids = [encoder.ids(text) for encoder in self.texts]
        pairs = zip(self.texts, ids, strict=True)
        return self._encode([encoder.embed(own)[None] for encoder, own in pairs], self._end(text))

    def _end(self, text: str) -> int:
        """Return the position of the end token."""
        encoder = self.texts[1]
        return encoder.ids(text).index(encoder.words.end, 1)

    def denoise(self, x: Tensor, sigma: float, c: Condition) -> Tensor:
        """Return x0 from x = x0 + sigma * eps."""
        t = self._timesteps(self.levels.timestep(sigma))
        out = self._forward(self.levels.scaled(x, sigma), t, c)
        return self.levels.denoised(x, sigma, out)

    def predict(self, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        """Return the UNet's output at timesteps t (B,)."""
        return self._forward(x_t, t.to(self.device), c)

    def _forward(self, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        sizes = self._sizes(x_t.shape[2], x_t.shape[3]).expand(len(x_t), _SIZES)
        added = {"text_embeds": c.tensors["pooled"], "time_ids": sizes}
        return self._unet(x_t, t, c.tensors["hidden"], added_cond_kwargs=added)

    def _sizes(self, rows: int, columns: int) -> Tensor:
        """Return the sizes of an image that is nobody's crop, copied to the device once."""
        if (rows, columns) not in self._known_sizes:
            size = [rows * self.autoencoder.factor, columns * self.autoencoder.factor]
            with torch.inference_mode(False):
                sizes = torch.tensor([*size, 0, 0, *size], device=self.device)
            self._known_sizes[rows, columns] = sizes
        return self._known_sizes[rows, columns]

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
        """Return the token embeddings of a name in both encoders, repeated or averaged to be k."""
        tokens = [encoder.name_tokens(name) for encoder in self.texts]
        count = k or max(map(len, tokens))
        return torch.cat([spread(part, count) for part in tokens], dim=1)

    def outputs(self, text: str, k: int) -> Tensor:
        """Return the last k - 1 states up to the end token, or the first of all, and the pooled."""
        out = torch.zeros(k, self._unet.width, device=self.device)
        if text == "" and self._zeros:
            return out
        c = self.sentence(text)
        stop = max(k - 1, self._end(text) + 1)
        out[:-1] = c.tensors["hidden"][0, stop - k + 1 : stop]
        out[-1, : self._pooled] = c.tensors["pooled"][0]
        return out

    def named_tensors(self) -> Mapping[str, nn.Parameter]:
        """Return the UNet's parameters."""
        return dict(self.denoiser.named_parameters())

    def changed(self) -> None:
        """Drop what was computed with other weights."""
        self._unet.changed()


def _pooled_width(config: Mapping[str, Any]) -> int:
    """Return the width of the pooled vector that a UNet takes."""
    for key in _UNSUPPORTED:
        if config.get(key) is not None:
            raise config_error(f"unet/config.json sets {key}, which Stable Diffusion XL does not")
    if config.get("addition_embed_type") != "text_time":
        raise config_error("unet/config.json: this is not the UNet of a Stable Diffusion XL")
    path = "unet/config.json"
    taken = int(number(path, config, "projection_class_embeddings_input_dim", 0))
    pooled = taken - _SIZES * int(number(path, config, "addition_time_embed_dim", 0))
    if pooled <= 0:
        raise config_error(f"unet/config.json: sizes and pooled vector do not fit into {taken}")
    return pooled


def _forces_zeros(files: Files) -> bool:
    """Return whether the condition of no class is zeros, as it is where nothing else is said."""
    index = files.json("model_index.json") if "model_index.json" in files else {}
    return bool(index.get("force_zeros_for_empty_prompt", True))


def _sampling(config: Mapping[str, Any]) -> Sampling | None:
    """Return what a distilled model is sampled with: its scheduler tells that it is one."""
    name, spacing = config.get("_class_name"), config.get("timestep_spacing")
    if name == "LCMScheduler":
        return Sampling("lcm", 4, 1.0)
    if spacing != "trailing" or config.get("rescale_betas_zero_snr"):
        return None
    if name == "EulerAncestralDiscreteScheduler":  # Turbo
        return Sampling("ancestral", 4, 1.0)
    return Sampling("euler", 4, 1.0) if name == "EulerDiscreteScheduler" else None  # Lightning

"""What the families of flow-matching transformers have in common.

A family is a `Family` and the layout of its files: PRX, Z-Image, FLUX.2 and Sana-Sprint have a
module each. A learned vector is an output of the text encoder, so packs decode without the encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from d3pack.backbones.autoencoder import Autoencoder, to_uint8
from d3pack.backbones.kernels import use_native_attention
from d3pack.backbones.language import LanguageModel, Prompting
from d3pack.backbones.levels import Levels
from d3pack.backbones.loading import Files, build, config_error, number
from d3pack.backbones.lock import Layout, Part
from d3pack.backbones.protocol import TEMPLATE, Condition, Sampling, words_of
from d3pack.backbones.text import check_outputs, missing_encoder
from d3pack.errors import BackboneError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from d3pack.format import BackboneRef

_SCHEDULER = "scheduler/scheduler_config.json"
_INDEX = "model_index.json"
_MAX_SIDE = 8192


def layout(transformer: str) -> Layout:
    """Return the files of a family with this class of transformer."""
    return Layout(
        (
            Part("scheduler", "scheduler_config.json"),
            Part("text_encoder", weights="model", text=True),
            Part(
                "tokenizer",
                config="",
                others=(("tokenizer.json",),),
                optional=("tokenizer_config.json",),
                text=True,
            ),
            Part("transformer", weights="diffusion_pytorch_model"),
            Part("vae", weights="diffusion_pytorch_model"),
        ),
        optional=(_INDEX,),
        denoiser=transformer,
    )


def shift_of(config: Mapping[str, Any], tokens: int, steps: int) -> float:
    """Return the shift of a scheduler's config."""
    return number(_SCHEDULER, config, "shift", 1.0)


def _side(index: Mapping[str, Any], default: int) -> int:
    """Return the native side in pixels."""
    side = number(_INDEX, index, "default_sample_size", default)
    if not side.is_integer() or not 1 <= side <= _MAX_SIDE:
        raise config_error(f"{_INDEX}: default_sample_size is {side:g}, not 1 to {_MAX_SIDE}")
    return int(side)


@dataclass(frozen=True, slots=True)
class Family:
    """What one family adds.

    `velocity` is called with the model, x_t, times (B,) in (0, 1] and vectors (B, k, D), and
    returns eps - x0. `shift` is called with the scheduler's config, the number of image tokens, and
    that of steps.
    """

    transformer: str  # diffusers' class
    velocity: Callable[[Any, Tensor, Tensor, Tensor], Tensor]
    width: str  # the field of the transformer's config that is the width of a vector
    vectors: int  # most vectors
    prompting: Prompting
    size: int  # native side in pixels, unless model_index.json says another one
    sampling: Sampling  # that the model was made for
    patch: int = 1  # side of a token in latents
    shift: Callable[[Mapping[str, Any], int, int], float] = shift_of
    base: Sampling | None = None  # of models that model_index.json does not call distilled
    check: Callable[[Mapping[str, Any]], None] | None = None  # of the transformer's config
    padded: bool = False  # vectors of zeros are no tokens


class FlowTransformer:
    """A transformer that predicts velocities, an autoencoder, and a text encoder to encode with."""

    def __init__(
        self,
        family: Family,
        ref: BackboneRef,
        files: Files,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.ref, self.device, self.dtype = ref, device, dtype
        self._family = family
        index = files.json(_INDEX) if _INDEX in files else {}
        base = None if index.get("is_distilled") is True else family.base
        self.sampling = base or family.sampling
        side = _side(index, family.size)
        stem = "diffusion_pytorch_model"
        self.denoiser = build(
            files, "transformer", stem, (family.transformer,), device=device, dtype=dtype
        )
        if family.check:
            family.check(self.denoiser.config)
        use_native_attention(self.denoiser)
        self.autoencoder = Autoencoder(files, device=device, dtype=dtype)
        if int(self.denoiser.config.in_channels) != self.autoencoder.channels:
            raise config_error("transformer and autoencoder have different latent channels")
        self._files = files
        self._language: LanguageModel | None = None
        self.image_size = (side, side)
        self.prompt_shape = (0, int(self.denoiser.config[family.width]))
        self.output_shape = (1, family.vectors, self.prompt_shape[1])
        self._scheduler = files.json(_SCHEDULER)
        self.levels = self.levels_for(self.image_size, self.sampling.steps)
        self._times = torch.from_numpy(self.levels.times).float().to(device)

    def levels_for(self, size: tuple[int, int], steps: int) -> Levels:
        """Return the levels that the pipeline passes through for this size and number of steps."""
        unit = self.autoencoder.factor * self._family.patch
        tokens = (size[0] // unit) * (size[1] // unit)
        return Levels.flow(self._family.shift(self._scheduler, tokens, steps))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a latent at the native image size."""
        return self.latent_shape_for(self.image_size)

    def latent_shape_for(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """Return (C, H, W) of a latent, for sizes that are whole tokens."""
        factor = self.autoencoder.factor
        unit = factor * self._family.patch
        if any(side < unit or side % unit for side in size):
            raise UsageError(
                f"invalid image size {size[0]}x{size[1]}: this backbone takes multiples of {unit}"
            )
        return (self.autoencoder.channels, size[0] // factor, size[1] // factor)

    def condition(self, prompts: Tensor, template: str | None = TEMPLATE) -> Condition:
        """Return the condition of outputs of the text encoder (B, k, D)."""
        if template is not None:
            raise BackboneError(
                "this backbone takes outputs of its text encoder, not vectors in a sentence",
                code="E_BACKBONE_PROMPT",
            )
        check_outputs(prompts, self.output_shape)
        return Condition({"hidden": prompts.to(self.device, self.dtype)})

    def unconditional(self) -> Condition:
        """Return the condition of no class: one vector of zeros."""
        zeros = torch.zeros(1, 1, self.output_shape[2], dtype=self.dtype, device=self.device)
        return Condition({"hidden": zeros})

    def outputs(self, text: str, k: int) -> Tensor:
        """Return the text encoder's last k outputs for a text, float32 (k, D).

        For the empty text, where the pipeline pads it, vectors of zeros come last.
        """
        language = self._text_encoder()
        if text or not self._family.padded:
            return language.last(text, k)
        rows = language.outputs(text)[-k:]
        return torch.cat([rows, rows.new_zeros(k - len(rows), rows.shape[1])])

    def name_vectors(self, name: str, k: int | None = None) -> Tensor:
        """Return the text encoder's last k outputs for the name of a class."""
        language, words = self._text_encoder(), words_of(name)
        return language.last(words, k) if k else language.outputs(words)

    def _text_encoder(self) -> LanguageModel:
        """Return the text encoder, which is opened when it is first needed: it may be the larger
        part of the files."""
        if "text_encoder/config.json" not in self._files:
            raise missing_encoder()
        if self._language is None:
            self._language = LanguageModel(
                self._files,
                self._family.prompting,
                self._family.vectors,
                device=self.device,
                dtype=self.dtype,
            )
        return self._language

    def denoise(self, x: Tensor, sigma: float, c: Condition) -> Tensor:
        """Return x0 from x = x0 + sigma * eps."""
        times = torch.full((len(x),), self.levels.time(sigma), device=self.device)
        velocity = self._velocity(self.levels.scaled(x, sigma), times, c)
        return self.levels.denoised(x, sigma, velocity)

    def predict(self, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        """Return the velocity at timesteps t (B,)."""
        return self._velocity(x_t, self._times[t.to(self.device)], c)

    def _velocity(self, x_t: Tensor, times: Tensor, c: Condition) -> Tensor:
        hidden = c.tensors["hidden"]
        return self._family.velocity(self.denoiser, x_t.to(self.dtype), times, hidden).float()

    def encode(self, images: Tensor) -> Tensor:
        """Return the latents of images."""
        return self.autoencoder.encode(images.to(self.device))

    def decode(self, latents: Tensor) -> Tensor:
        """Return uint8 images of latents."""
        return to_uint8(self.decode_float(latents))

    def decode_float(self, latents: Tensor) -> Tensor:
        """Return float images around [-1, 1] of latents."""
        return self.autoencoder.decode_float(latents)

    def named_tensors(self) -> Mapping[str, torch.nn.Parameter]:
        """Return the transformer's parameters."""
        return dict(self.denoiser.named_parameters())

    def changed(self) -> None:
        """Do nothing: no results are kept."""

"""DiT: class vectors in place of a class table, a transformer, an autoencoder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from d3pack.backbones.autoencoder import Autoencoder, to_uint8
from d3pack.backbones.layout import Layout, Part
from d3pack.backbones.levels import Levels, Timesteps
from d3pack.backbones.loading import Files, build
from d3pack.backbones.protocol import TEMPLATE, Condition
from d3pack.errors import BackboneError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from d3pack.format.recipe import BackboneRef

KIND = "dit"
LAYOUT = Layout(
    (
        Part("scheduler", "scheduler_config.json"),
        Part("transformer", weights="diffusion_pytorch_model"),
        Part("vae", weights="diffusion_pytorch_model"),
    ),
    optional=("model_index.json",),
)


class DiT:
    """One vector for a class, the same for every block; the last table row stands for no class."""

    def __init__(
        self, ref: BackboneRef, files: Files, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.ref, self.device, self.dtype = ref, device, dtype
        self.levels = Levels.from_config(files.json("scheduler/scheduler_config.json"))
        self._timesteps = Timesteps(device)
        model = build(
            files,
            "transformer",
            "diffusion_pytorch_model",
            ("DiTTransformer2DModel",),
            device=device,
            dtype=dtype,
        )
        self.denoiser = model
        self.autoencoder = Autoencoder(files, device=device, dtype=dtype)
        config = model.config
        self._channels = int(config.in_channels)
        if config.norm_type != "ada_norm_zero" or not config.num_embeds_ada_norm:
            raise BackboneError(
                "transformer/config.json: this is no class-conditional DiT",
                code="E_BACKBONE_CONFIG",
            )
        if self._channels != self.autoencoder.channels or model.out_channels < self._channels:
            raise BackboneError(
                "transformer and autoencoder disagree about latent channels",
                code="E_BACKBONE_CONFIG",
            )
        side = int(config.sample_size) * self.autoencoder.factor
        self.image_size = (side, side)
        self.prompt_shape = (1, int(model.inner_dim))
        for index, block in enumerate(model.transformer_blocks):
            block.norm1.emb = _GivenVector(block.norm1.emb, index)
        self._names = _label_names(files)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a latent."""
        return self.latent_shape_for(self.image_size)

    def latent_shape_for(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(C, H, W) of a latent: positions are learned for one size."""
        if tuple(size) != self.image_size:
            raise UsageError(
                f"this backbone makes {self.image_size[0]}x{self.image_size[1]} images only",
                hint=f"{size[0]}x{size[1]} wants another backbone, or a resize after decoding",
            )
        side = int(self.denoiser.config.sample_size)
        return (self._channels, side, side)

    def condition(self, prompts: Tensor, template: str = TEMPLATE) -> Condition:
        """Vectors (B, 1, D), tied across the blocks; there is no text for a template to be in."""
        if tuple(prompts.shape[1:]) != self.prompt_shape:
            raise BackboneError(
                f"prompts of shape {tuple(prompts.shape)} do not fit: this backbone takes"
                f" one vector of {self.prompt_shape[1]}",
                code="E_BACKBONE_PROMPT",
                hint="the pack was made for another backbone",
            )
        blocks = len(self.denoiser.transformer_blocks)
        vector = prompts.to(self.device, self.dtype)
        return Condition({"vector": vector.expand(-1, blocks, -1)})

    def unconditional(self) -> Condition:
        """The row that training put in place of dropped labels."""
        return self.label(int(self.denoiser.config.num_embeds_ada_norm))

    def label(self, index: int) -> Condition:
        """A class of the model's own tables, one row."""
        rows = [b.norm1.emb.table[index] for b in self.denoiser.transformer_blocks]
        return Condition({"vector": torch.stack(rows)[None]})

    def denoise(self, x: Tensor, sigma: float, c: Condition) -> Tensor:
        """x0 from x = x0 + sigma * eps."""
        t = self._timesteps(self.levels.timestep(sigma))[None]
        out = self._forward(x / math.sqrt(sigma**2 + 1), t, c)
        return self.levels.denoised(x, sigma, out)

    def predict(self, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        """What the transformer says at timesteps t (B,), without its learned sigma."""
        return self._forward(x_t, t.to(self.device), c)

    def _forward(self, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        out: Tensor = self.denoiser(
            x_t.to(self.dtype),
            timestep=t,
            class_labels=c.tensors["vector"],
            return_dict=False,
        )[0]
        return out[:, : self._channels].float()

    def encode(self, images: Tensor) -> Tensor:
        """Images -> latents."""
        return self.autoencoder.encode(images.to(self.device))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> uint8 images."""
        return to_uint8(self.decode_float(latents))

    def decode_float(self, latents: Tensor) -> Tensor:
        """Latents -> float images around [-1, 1]."""
        return self.autoencoder.decode_float(latents)

    def name_vectors(self, name: str, k: int | None = 1) -> Tensor:
        """The row of a class that the model knows by this name, else the mean of all."""
        if k not in (None, 1):
            raise BackboneError(
                f"this backbone takes one vector a class, not {k}", code="E_BACKBONE_PROMPT"
            )
        table: Tensor = self.denoiser.transformer_blocks[0].norm1.emb.table[:-1].float()
        found = self._names.get(_plain(name))
        if found is not None and found < len(table):
            return table[found : found + 1].clone()
        return table.mean(0, keepdim=True)

    def named_tensors(self) -> Mapping[str, torch.nn.Parameter]:
        """The transformer's parameters."""
        return dict(self.denoiser.named_parameters())

    def changed(self) -> None:
        """Nothing is remembered from the weights."""


class _GivenVector(torch.nn.Module):
    """Stands where a block looks its class up; takes the block's own row of given vectors.

    `timestep` may be one for the whole batch: then its embedding is computed once.
    """

    def __init__(self, original: Any, index: int) -> None:
        super().__init__()
        self.time_proj = original.time_proj
        self.timestep_embedder = original.timestep_embedder
        self.class_embedder = original.class_embedder
        self._index = index

    @property
    def table(self) -> Tensor:
        """The rows of the model's own classes, the null class last."""
        weight: Tensor = self.class_embedder.embedding_table.weight
        return weight

    def forward(
        self, timestep: Tensor, class_labels: Tensor, hidden_dtype: torch.dtype | None = None
    ) -> Tensor:
        time = self.time_proj(timestep).to(hidden_dtype or class_labels.dtype)
        embedded: Tensor = self.timestep_embedder(time)
        return embedded + class_labels[:, self._index]


def _label_names(files: Files) -> dict[str, int]:
    """Class names of a repository that lists them; several names of one class are split."""
    if "model_index.json" not in files:
        return {}
    labels = files.json("model_index.json").get("id2label")
    names = {}
    for key, value in labels.items() if isinstance(labels, dict) else ():
        if str(key).isdigit() and isinstance(value, str):
            names[str(key)] = int(key)
            for part in value.split(","):
                names.setdefault(_plain(part), int(key))
    return names


def _plain(name: str) -> str:
    return name.replace("_", " ").strip().lower()

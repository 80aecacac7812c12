"""DiT: a transformer that takes learned vectors in place of its class table, an autoencoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from d3pack.backbones.autoencoder import Autoencoder, to_uint8
from d3pack.backbones.levels import Levels, Timesteps
from d3pack.backbones.loading import Files, build, config_error
from d3pack.backbones.lock import Layout, Part
from d3pack.backbones.protocol import TEMPLATE, Condition, words_of
from d3pack.backbones.text import no_outputs
from d3pack.errors import BackboneError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from d3pack.format import BackboneRef

LAYOUT = Layout(
    (
        Part("scheduler", "scheduler_config.json"),
        Part("transformer", weights="diffusion_pytorch_model"),
        Part("vae", weights="diffusion_pytorch_model"),
    ),
    optional=("model_index.json",),
)


class DiT:
    """One vector a class, the same in every block. The last row of the table is the null class."""

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
            raise config_error("transformer/config.json: this is not a class-conditional DiT")
        if self._channels != self.autoencoder.channels or model.out_channels < self._channels:
            raise config_error("transformer and autoencoder have different latent channels")
        side = int(config.sample_size) * self.autoencoder.factor
        self.image_size = (side, side)
        self.prompt_shape = (1, int(model.inner_dim))
        self.output_shape = (0, 0, 0)
        for index, block in enumerate(model.transformer_blocks):
            block.norm1.emb = _VectorEmbedding(block.norm1.emb, index)
        self._names = _label_names(files)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a latent at the native image size."""
        return self.latent_shape_for(self.image_size)

    def latent_shape_for(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """Return (C, H, W) of a latent; there are positions for the native size only."""
        if tuple(size) != self.image_size:
            raise UsageError(
                f"this backbone makes {self.image_size[0]}x{self.image_size[1]} images only",
                hint=f"for {size[0]}x{size[1]} take another backbone, or resize decoded images",
            )
        side = int(self.denoiser.config.sample_size)
        return (self._channels, side, side)

    def condition(self, prompts: Tensor, template: str | None = TEMPLATE) -> Condition:
        """Return the condition of vectors (B, 1, D), the same in all blocks.

        This family reads no text, so the template is not used.
        """
        if template is None:
            raise no_outputs()
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
        """Return the condition of the null class, one row."""
        return self.label(int(self.denoiser.config.num_embeds_ada_norm))

    def label(self, index: int) -> Condition:
        """Return the condition of a class of the model's own tables, one row."""
        rows = [b.norm1.emb.table[index] for b in self.denoiser.transformer_blocks]
        return Condition({"vector": torch.stack(rows)[None]})

    def denoise(self, x: Tensor, sigma: float, c: Condition) -> Tensor:
        """Return x0 from x = x0 + sigma * eps."""
        t = self._timesteps(self.levels.timestep(sigma))[None]
        out = self._forward(self.levels.scaled(x, sigma), t, c)
        return self.levels.denoised(x, sigma, out)

    def predict(self, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        """Return the transformer's output at timesteps t (B,), without its learned sigma."""
        return self._forward(x_t, t.to(self.device), c)

    def _forward(self, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        out: Tensor = self.denoiser(
            x_t.to(self.dtype), timestep=t, class_labels=c.tensors["vector"], return_dict=False
        )[0]
        return out[:, : self._channels].float()

    def encode(self, images: Tensor) -> Tensor:
        """Return the latents of images."""
        return self.autoencoder.encode(images.to(self.device))

    def decode(self, latents: Tensor) -> Tensor:
        """Return uint8 images of latents."""
        return to_uint8(self.decode_float(latents))

    def decode_float(self, latents: Tensor) -> Tensor:
        """Return float images around [-1, 1] of latents."""
        return self.autoencoder.decode_float(latents)

    def name_vectors(self, name: str, k: int | None = 1) -> Tensor:
        """Return the row of a class that the model knows by this name, else the mean of all.

        Raises:
            BackboneError: if the model has several classes of this name.
        """
        if k not in (None, 1):
            raise BackboneError(
                f"this backbone takes one vector a class, not {k}", code="E_BACKBONE_PROMPT"
            )
        table: Tensor = self.denoiser.transformer_blocks[0].norm1.emb.table[:-1].float()
        row = self._row(name)
        return table.mean(0, keepdim=True) if row is None else table[row : row + 1].clone()

    def outputs(self, text: str, k: int) -> Tensor:
        """Raise: this family has no text encoder."""
        raise no_outputs()

    def unknown_names(self, names: Sequence[str]) -> list[str]:
        """Return the names that no class of the model bears: they start at the mean of its rows.

        Raises:
            BackboneError: if the model has several classes of one of the names.
        """
        return [name for name in names if self._row(name) is None]

    def _row(self, name: str) -> int | None:
        count = len(self.denoiser.transformer_blocks[0].norm1.emb.table) - 1
        rows = [row for row in self._names.get(_normalized(name), ()) if row < count]
        if len(rows) > 1:
            raise BackboneError(
                f"this backbone has {len(rows)} classes called {name!r}: rows"
                f" {', '.join(map(str, rows))}",
                hint="call the class by the number of its row, with class_names",
            )
        return rows[0] if rows else None

    def named_tensors(self) -> Mapping[str, torch.nn.Parameter]:
        """Return the transformer's parameters."""
        return dict(self.denoiser.named_parameters())

    def changed(self) -> None:
        """Do nothing: no results are kept."""


class _VectorEmbedding(torch.nn.Module):
    """Replaces the class embedding of a block: takes vectors instead of labels.

    A `timestep` for the whole batch is embedded once.
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


def _label_names(files: Files) -> dict[str, tuple[int, ...]]:
    """Return rows by class name, where the repository lists names; synonyms are split at commas.

    Some names are of two classes: ImageNet has a crane that flies and one that lifts.
    """
    if "model_index.json" not in files:
        return {}
    labels = files.json("model_index.json").get("id2label")
    rows = {
        int(key): value
        for key, value in (labels.items() if isinstance(labels, dict) else ())
        if str(key).isdigit() and isinstance(value, str)
    }
    names: dict[str, tuple[int, ...]] = {}
    for row, label in rows.items():
        for name in dict.fromkeys(map(_normalized, label.split(","))):
            names[name] = (*names.get(name, ()), row)
    return {str(row): (row,) for row in rows} | names  # a name comes before a number


def _normalized(name: str) -> str:
    return words_of(name).lower()

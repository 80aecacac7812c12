"""What the rest of d3pack expects of a backbone.

To add a family, write one module with

    LAYOUT = Layout(...)       which files the family needs (`d3pack.backbones.Layout`)
    class Family:              meets `Backbone`; called with (ref, files, device=, dtype=)

and name it once: a line in `_BUILT_IN` of `resolve.py` ("kind": "module:Family"), or, in a package
of its own, an entry point of the group "d3pack.backbones". Nothing else changes: a pack's recipe
names the kind. `files` (`d3pack.backbones.Files`) are the verified files, `build` makes a model of
them, `Autoencoder` and `Levels` are the usual parts. `examples/custom_backbone.py` is a small one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from d3pack.backbones.levels import Levels
    from d3pack.format import BackboneRef, Sampler

TEMPLATE = "a photo of a {}"


def words_of(name: str) -> str:
    """Return the name of a class as a text encoder should read it."""
    return name.replace("_", " ").strip()


@dataclass(frozen=True, slots=True, eq=False)
class Condition:
    """What a denoiser takes besides x and sigma: named tensors, the first axis is the batch."""

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, rows: Tensor | slice) -> Condition:
        return Condition({name: value[rows] for name, value in self.tensors.items()})

    def expand(self, count: int) -> Condition:
        """Return the only row, `count` times."""
        return Condition({n: v.expand(count, *v.shape[1:]) for n, v in self.tensors.items()})

    @staticmethod
    def cat(parts: Iterable[Condition]) -> Condition:
        """Return the rows of several conditions, one after the other."""
        import torch

        rows = list(parts)
        return Condition({n: torch.cat([r.tensors[n] for r in rows]) for n in rows[0].tensors})


@dataclass(frozen=True, slots=True)
class Sampling:
    """One way to sample. The attribute `sampling` of a backbone is what it was made for, if it was
    made for one."""

    sampler: Sampler
    steps: int
    guidance: float

    @property
    def forwards(self) -> int:
        """Forward passes of the denoiser for one image."""
        return self.steps * (1 if self.guidance == 1.0 else 2)

    def __str__(self) -> str:
        return f"{self.sampler} {self.steps} steps, guidance {self.guidance:g}"


class Backbone(Protocol):
    """A diffusion model that makes images from learned vectors.

    There are two scales of x: x = x0 + sigma * eps for sampling (`denoise`), and
    x_t = sqrt(alpha_t) x0 + sqrt(1 - alpha_t) eps, or (1 - t) x0 + t eps of flow matching, for
    training (`predict`, and `levels` for noise and targets).

    It may also have `sampling`, a `Sampling` that it was made for; `levels_for(size, steps)`, the
    levels of recipes where they depend on these; and `texts`, where it has two text encoders.
    """

    ref: BackboneRef
    levels: Levels  # alphas_cumprod, prediction, noised(), targets, x0()
    image_size: tuple[int, int]  # the native one: height, width
    prompt_shape: tuple[int, int]  # most vectors k, their width D; (0, D): takes outputs only
    output_shape: tuple[int, int, int]  # fewest and most outputs k, their width; (0, 0, 0): none
    device: torch.device
    dtype: torch.dtype  # of the models; x, x0 and gradients are float32

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a latent at the native image size."""
        ...

    def latent_shape_for(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """Return (C, H, W) of a latent for images of this height and width, or raise UsageError."""
        ...

    def condition(self, prompts: Tensor, template: str | None = TEMPLATE) -> Condition:
        """Return the condition of learned vectors (B, k, D); gradients pass.

        Without a template they are outputs of the text encoder, which then need not be open.
        """
        ...

    def unconditional(self) -> Condition:
        """Return the condition of no class, one row, for guidance."""
        ...

    def denoise(self, x: Tensor, sigma: float, c: Condition) -> Tensor:
        """Return x0 (B, C, H, W) from x = x0 + sigma * eps, one sigma for the batch."""
        ...

    def predict(self, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        """Return the model's output at timesteps t (B,), without learned sigma; gradients pass."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """Return the latents of uint8 or [-1, 1] float images (B, 3, H, W), without randomness."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Return uint8 images (B, 3, H, W) of latents: `decode_float`, clamped and rounded."""
        ...

    def decode_float(self, latents: Tensor) -> Tensor:
        """Return float images around [-1, 1] of latents; gradients pass."""
        ...

    def name_vectors(self, name: str, k: int | None = None) -> Tensor:
        """Return k vectors (k, D) for the name of a class: a start for learning prompts.

        With k None as many as the name has tokens.
        """
        ...

    def outputs(self, text: str, k: int) -> Tensor:
        """Return k outputs (k, D) of the text encoder for a text: a start for learning outputs.

        A pooled vector comes last, filled with zeros. Of "" they are the unconditional ones.
        """
        ...

    def named_tensors(self) -> Mapping[str, torch.nn.Parameter]:
        """Return the denoiser's parameters by name: what an adapter may tune."""
        ...

    def changed(self) -> None:
        """Drop everything that was computed from the weights, because they were edited."""
        ...

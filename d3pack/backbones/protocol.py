"""What a backbone is to the rest of d3pack."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from d3pack.backbones.levels import Levels
    from d3pack.format.recipe import BackboneRef

TEMPLATE = "a photo of a {}"


@dataclass(frozen=True, slots=True, eq=False)
class Condition:
    """What a denoiser takes beside x and sigma: named tensors, the first axis is the batch."""

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, rows: Tensor | slice) -> Condition:
        return Condition({name: value[rows] for name, value in self.tensors.items()})

    def expand(self, count: int) -> Condition:
        """The only row, `count` times."""
        return Condition({n: v.expand(count, *v.shape[1:]) for n, v in self.tensors.items()})

    @staticmethod
    def cat(parts: Iterable[Condition]) -> Condition:
        """Rows of several conditions, one after the other."""
        import torch

        rows = list(parts)
        return Condition({n: torch.cat([r.tensors[n] for r in rows]) for n in rows[0].tensors})


class Backbone(Protocol):
    """A diffusion model that makes images from learned vectors.

    Two scales of x meet here. Sampling lives in x = x0 + sigma * eps (`denoise`); training in
    x_t = sqrt(alpha_t) x0 + sqrt(1 - alpha_t) eps (`predict`, and `levels` for noise and targets).
    """

    ref: BackboneRef
    levels: Levels  # alphas_cumprod, prediction, noised(), targets, x0()
    image_size: tuple[int, int]  # the native one: height, width
    prompt_shape: tuple[int, int]  # most vectors k, their width D
    device: torch.device
    dtype: torch.dtype  # of the models; x, x0 and gradients are float32

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a latent at the native image size."""
        ...

    def latent_shape_for(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(C, H, W) of a latent for images of this height and width; refuses what does not fit."""
        ...

    def condition(self, prompts: Tensor, template: str = TEMPLATE) -> Condition:
        """Learned vectors (B, k, D) -> what the denoiser takes; gradients pass."""
        ...

    def unconditional(self) -> Condition:
        """The condition of no class, one row: the other half of guidance."""
        ...

    def denoise(self, x: Tensor, sigma: float, c: Condition) -> Tensor:
        """x0 (B, C, H, W) from x = x0 + sigma * eps, one sigma for the batch."""
        ...

    def predict(self, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        """The model's own output at timesteps t (B,), learned sigma dropped; gradients pass."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """uint8 or [-1, 1] float images (B, 3, H, W) -> latents, without randomness."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> uint8 images (B, 3, H, W): `decode_float`, clamped and rounded."""
        ...

    def decode_float(self, latents: Tensor) -> Tensor:
        """Latents -> float images around [-1, 1]; gradients pass."""
        ...

    def name_vectors(self, name: str, k: int | None) -> Tensor:
        """k vectors (k, D) that say the class's name: the start of inversion, the 0-byte prompt.

        With k None as many as the name has tokens.
        """
        ...

    def named_tensors(self) -> Mapping[str, torch.nn.Parameter]:
        """The denoiser's parameters by name: what an adapter may tune."""
        ...

    def changed(self) -> None:
        """Forget everything remembered from the weights: they were edited."""
        ...

"""A backbone family of one's own: Stable Diffusion that makes grey images, for X-rays or print.

    python examples/custom_backbone.py DIRECTORY     # in Stable Diffusion's layout

A family is a module with a LAYOUT and a class that meets `d3pack.backbones.Backbone`. Installed
under the entry point group "d3pack.backbones" it opens packs whose recipe names its kind:

    [project.entry-points."d3pack.backbones"]
    grey-stable-diffusion = "custom_backbone:Grey"
"""

from __future__ import annotations

import sys

from torch import Tensor

from d3pack.backbones import lock_directory
from d3pack.backbones.stable_diffusion import LAYOUT, StableDiffusion

__all__ = ["LAYOUT", "Grey"]

KIND = "grey-stable-diffusion"


class Grey(StableDiffusion):
    """The same models; what they decode to loses its colour before it is rounded to bytes."""

    def decode_float(self, latents: Tensor) -> Tensor:
        return super().decode_float(latents).mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)


if __name__ == "__main__":
    ref = lock_directory(sys.argv[1], kind=KIND)
    print(f"{ref.kind} {ref.lock}: {len(ref.files)} files, {ref.nbytes:,} bytes")

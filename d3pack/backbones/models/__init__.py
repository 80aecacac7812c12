"""Models in plain PyTorch: with them a pack on `mini` imports neither diffusers nor transformers.

Their imports take more than half of the time to a first image. Each class has the name, settings
and tensors of the one that it stands for, and computes the same bits; tests compare them.
"""

from __future__ import annotations

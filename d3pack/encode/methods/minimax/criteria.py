"""The minimax criteria (arXiv 2311.15529) and the memories that they look into.

For each class of a batch that has been seen before, with x the clean latents predicted for it:

    representative * (1 - min cos(x, real))  +  diverse * max cos(x, earlier predictions)

averaged over the classes of the batch. A real latent and a prediction join the memories after the
loss has looked at them; the oldest leave first.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

Array = npt.NDArray[np.float32]


class Memories:
    """Real latents and past predictions of each class, oldest first."""

    def __init__(self, classes: int, size: int) -> None:
        self.size = size
        self.real: list[list[Tensor]] = [[] for _ in range(classes)]
        self.made: list[list[Tensor]] = [[] for _ in range(classes)]

    def add(self, c: int, real: Tensor, made: Tensor) -> None:
        """Latents of one class, in the order of the batch."""
        for memory, latents in ((self.real[c], real), (self.made[c], made)):
            memory.extend(latents.detach().flatten(1).unbind())
            del memory[: max(0, len(memory) - self.size)]

    def state(self) -> dict[str, Array]:
        """As arrays, for the journal."""
        return {
            f"{kind}.{c}": torch.stack(memory).cpu().numpy()
            for kind, memories in (("real", self.real), ("made", self.made))
            for c, memory in enumerate(memories)
            if memory
        }

    def restore(self, state: Mapping[str, npt.NDArray[np.generic]], device: torch.device) -> None:
        """The reverse of `state`."""
        for kind, memories in (("real", self.real), ("made", self.made)):
            for c in range(len(memories)):
                found = state.get(f"{kind}.{c}")
                rows = [] if found is None else torch.from_numpy(found).to(device).unbind()
                memories[c] = list(rows)


def criteria(
    predicted: Tensor, labels: Tensor, memories: Memories, representative: float, diverse: float
) -> tuple[Tensor, Tensor]:
    """Both terms, weighted; a class whose memory is empty adds nothing."""
    near = far = predicted.new_zeros(())
    present = sorted(set(labels.tolist()))
    for c in present:
        if not memories.made[c]:
            continue
        mine = functional.normalize(predicted[labels == c].flatten(1), dim=1)
        real = functional.normalize(torch.stack(memories.real[c]), dim=1)
        made = functional.normalize(torch.stack(memories.made[c]), dim=1)
        near = near + representative * (1 - (mine @ real.T).min()) / len(present)
        far = far + diverse * (mine @ made.T).max() / len(present)
    return near, far

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
        self.predicted: list[list[Tensor]] = [[] for _ in range(classes)]

    def add(self, c: int, real: Tensor, predicted: Tensor) -> None:
        """Add latents of one class, in the order of the batch."""
        for memory, latents in ((self.real[c], real), (self.predicted[c], predicted)):
            memory.extend(latents.detach().flatten(1).unbind())
            del memory[: max(0, len(memory) - self.size)]

    def state(self) -> dict[str, Array]:
        """Return the memories as arrays, for the journal."""
        return {
            f"{kind}.{c}": torch.stack(memory).cpu().numpy()
            for kind, memories in (("real", self.real), ("predicted", self.predicted))
            for c, memory in enumerate(memories)
            if memory
        }

    def restore(self, state: Mapping[str, npt.NDArray[np.generic]], device: torch.device) -> None:
        """Take over what `state` has returned."""
        for kind, memories in (("real", self.real), ("predicted", self.predicted)):
            for c in range(len(memories)):
                stored = state.get(f"{kind}.{c}")
                rows = [] if stored is None else torch.from_numpy(stored).to(device).unbind()
                memories[c] = list(rows)


def criteria(
    predicted: Tensor, labels: Tensor, memories: Memories, representative: float, diverse: float
) -> tuple[Tensor, Tensor]:
    """Return both terms, weighted; a class whose memory is empty adds nothing."""
    near = far = predicted.new_zeros(())
    present = sorted(set(labels.tolist()))
    for c in present:
        if not memories.predicted[c]:
            continue
        x = functional.normalize(predicted[labels == c].flatten(1), dim=1)
        real = functional.normalize(torch.stack(memories.real[c]), dim=1)
        earlier = functional.normalize(torch.stack(memories.predicted[c]), dim=1)
        near = near + representative * (1 - (x @ real.T).min()) / len(present)
        far = far + diverse * (x @ earlier.T).max() / len(present)
    return near, far

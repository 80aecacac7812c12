"""D3MLoader: batches on the device, decoded ahead, with a state that fits in a line of JSON."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from d3pack.dataset.order import BatchOrder, Ints
from d3pack.dataset.prefetch import Background, decoded
from d3pack.errors import UsageError

if TYPE_CHECKING:
    from d3pack.dataset.dataset import D3MDataset


class D3MLoader(IterableDataset[Any]):
    """Batches `(images, labels)` of a dataset, every image exactly once an epoch over all ranks.

    Each `iter()` is an epoch. `state_dict()` counts the batches handed out, so saved beside the
    model it resumes right after them; see `BatchOrder` for what a state may be loaded on.
    """

    def __init__(self, dataset: D3MDataset, order: BatchOrder, background: bool) -> None:
        self.dataset = dataset
        self.order = order
        self.background = background

    @property
    def batch_size(self) -> int:
        """Images a rank takes in a step."""
        return self.order.batch_size

    @property
    def epoch(self) -> int:
        """The epoch under way, or the one that the next iteration begins."""
        return self.order.epoch

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[Any]:
        if get_worker_info() is not None:
            raise UsageError(
                "a D3MLoader inside DataLoader workers would hand out every batch once a worker",
                hint="iterate over the loader itself, or write DataLoader(ds, num_workers=..., "
                "batch_sampler=ds.batch_order(...))",
            )
        epoch, consumed = self.order.begin()
        steps = self._steps(epoch, consumed)
        try:
            for indices, images, after in steps:
                result = self.dataset.finish(indices, images)
                self.order.consumed = after
                yield result
        finally:
            steps.close()
        self.order.finish()

    def _steps(self, epoch: int, consumed: int) -> Generator[tuple[Ints, Tensor, int], None, None]:
        """Each step: indices, images, end; from the store, or from the first miss on decoded."""
        source = self.dataset.images
        for indices, after in self.order.walk(epoch, consumed):
            numbers = self.dataset.numbers(indices)
            if source.missing(numbers, epoch).size:
                break
            yield indices, source.read(numbers, epoch), after
            consumed = after
        else:
            return
        rest = (self.dataset.numbers(ids) for ids, _ in self.order.walk(epoch, consumed))
        ahead: Any = decoded(source, rest, epoch)
        if self.background:
            ahead = Background(ahead, source.device)
        try:
            steps = self.order.walk(epoch, consumed)
            for (indices, after), images in zip(steps, ahead, strict=True):
                yield indices, images, after
        finally:
            ahead.close()

    def set_epoch(self, epoch: int) -> None:
        """Begin the next iteration at an epoch; where it stands in that epoch already, it stays."""
        self.order.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Where the epoch stands after the batches handed out, as JSON values."""
        return self.order.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state stands; refuses the state of another pack."""
        self.order.load_state_dict(state)

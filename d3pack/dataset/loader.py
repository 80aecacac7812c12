"""D3MLoader: batches on the device, decoded ahead, with a state that fits in a line of JSON."""

from __future__ import annotations

import atexit
import queue
import threading
import weakref
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from d3pack.dataset.images import Images
from d3pack.dataset.order import BatchOrder, Ints
from d3pack.errors import UsageError

if TYPE_CHECKING:
    from d3pack.dataset.dataset import D3MDataset

_AHEAD = 2  # finished batches that wait for the training loop
_WAIT = 0.1  # seconds between checks whether the loop still runs


class D3MLoader(IterableDataset[Any]):
    """Batches `(images, labels)` of a dataset, every image exactly once an epoch over all ranks.

    Each `iter()` is an epoch. `state_dict()` counts the batches that were handed out: saved with
    the model, it continues with the next one. See `BatchOrder` for where a state can be loaded.
    """

    def __init__(self, dataset: D3MDataset, order: BatchOrder, background: bool) -> None:
        self.dataset = dataset
        self.order = order
        self.background = background

    @property
    def batch_size(self) -> int:
        """Images that a rank takes in a step."""
        return self.order.batch_size

    @property
    def epoch(self) -> int:
        """The current epoch, or the one that the next iteration begins."""
        return self.order.epoch

    def __len__(self) -> int:
        """Return the batches of a complete epoch."""
        return len(self.order)

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches of one epoch."""
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
                batch = self.dataset.collate(indices, images)
                self.order.consumed = after
                yield batch
        finally:
            steps.close()
        self.order.finish()

    def _steps(self, epoch: int, consumed: int) -> Generator[tuple[Ints, Tensor, int], None, None]:
        """Yield indices, images and end of each step: read from the store up to the first missing
        image, and decoded ahead from there."""
        source = self.dataset.images
        for indices, after in self.order.walk(epoch, consumed):
            numbers = self.dataset.numbers(indices)
            if source.missing(numbers, epoch).size:
                break
            yield indices, source.read(numbers, epoch), after
            consumed = after
        else:
            return
        batches = (self.dataset.numbers(ids) for ids, _ in self.order.walk(epoch, consumed))
        ahead: Any = decode_batches(source, batches, epoch)
        if self.background:
            ahead = Background(ahead, source.device)
        try:
            steps = self.order.walk(epoch, consumed)
            for (indices, after), images in zip(steps, ahead, strict=True):
                yield indices, images, after
        finally:
            ahead.close()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration; the position within the current epoch is kept."""
        self.order.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the batches that were handed out, as JSON values."""
        return self.order.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state.

        Raises:
            UsageError: the state is not valid, or belongs to another pack or selection.
        """
        self.order.load_state_dict(state)


def decode_batches(images: Images, batches: Iterator[Ints], epoch: int) -> Iterator[Tensor]:
    """Yield the images of each batch; groups are filled from the batches to come, not padded."""
    chunk = images.chunk
    window: deque[Ints] = deque()
    decoded: dict[int, Tensor] = {}  # images of the batches in the window
    while True:
        if not window:
            following = next(batches, None)
            if following is None:
                return
            window.append(following)
        batch = window[0]
        absent = _absent(images, batch, decoded, epoch)
        if not absent.size and not decoded:
            yield images.read(batch, epoch)
        else:
            while absent.size:
                # look ahead only as far as it takes to fill every place of the decoder
                later = 1
                while absent.size % chunk:
                    if later == len(window):
                        following = next(batches, None)
                        if following is None:
                            break
                        window.append(following)
                    more = _absent(images, window[later], decoded, epoch)
                    absent = np.concatenate([absent, more[: -absent.size % chunk]])
                    later += 1
                decoded |= images.fetch(np.sort(absent[:chunk]), epoch)
                absent = absent[chunk:]
            decoded |= images.fetch(np.setdiff1d(batch, list(decoded)), epoch)
            yield torch.stack([decoded[number] for number in batch.tolist()])
            for number in batch.tolist():
                decoded.pop(number, None)
        window.popleft()


def _absent(images: Images, numbers: Ints, decoded: dict[int, Tensor], epoch: int) -> Ints:
    missing = images.missing(numbers, epoch)
    return np.array([n for n in missing.tolist() if n not in decoded], dtype=np.int64)


class Background:
    """Runs an iterator of tensors in a thread, a few items ahead of its consumer."""

    def __init__(self, source: Iterator[Tensor], device: torch.device) -> None:
        self._source = source
        self._device = device
        self._ready: queue.Queue[tuple[Tensor | None, Any]] = queue.Queue(maxsize=_AHEAD)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="d3pack-prefetch", daemon=True)
        _running.add(self)
        self._thread.start()

    def _run(self) -> None:
        cuda = self._device.type == "cuda"
        # a stream of its own, so that decoding and training overlap on the device
        stream: Any = torch.cuda.Stream(self._device) if cuda else None
        try:
            with torch.cuda.stream(stream):  # does nothing without a stream
                for item in self._source:
                    event = stream.record_event() if cuda else None
                    if not self._put((item, event)):
                        return
            self._put((None, None))
        except BaseException as error:
            self._put((None, error))

    def _put(self, item: tuple[Tensor | None, Any]) -> bool:
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=_WAIT)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the items; an exception of the thread is raised here."""
        while True:
            item, event = self._ready.get()
            if item is None:
                if event is not None:
                    raise event
                return
            if event is not None:
                stream = torch.cuda.current_stream(self._device)
                stream.wait_event(event)
                item.record_stream(stream)
            yield item

    def close(self) -> None:
        """Stop the thread; a group that is being decoded is finished first."""
        self._stop.set()
        self._thread.join()


_running: weakref.WeakSet[Background] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    # a thread inside torch would crash the process while the interpreter shuts down
    for background in list(_running):
        background.close()

"""Decoding ahead of the loader, in its order, in whole groups, in the background."""

from __future__ import annotations

import atexit
import queue
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d3pack.dataset.images import Images
from d3pack.dataset.order import Ints

_AHEAD = 2  # finished batches that wait for the training loop
_WAIT = 0.1  # seconds between looks at whether anybody still listens


def decoded(images: Images, batches: Iterator[Ints], epoch: int) -> Iterator[Tensor]:
    """The images of each batch; groups are filled from the batches to come, none is padded."""
    chunk = images.chunk
    window: deque[Ints] = deque()
    hand: dict[int, Tensor] = {}
    while True:
        if not window:
            following = next(batches, None)
            if following is None:
                return
            window.append(following)
        wanted = window[0]
        absent = _absent(images, wanted, hand, epoch)
        if not absent.size and not hand:
            yield images.read(wanted, epoch)
        else:
            while absent.size:
                # Look ahead just as far as it takes to fill every slot of the decoder.
                later = 1
                while absent.size % chunk:
                    if later == len(window):
                        following = next(batches, None)
                        if following is None:
                            break
                        window.append(following)
                    more = _absent(images, window[later], hand, epoch)
                    absent = np.concatenate([absent, more[: -absent.size % chunk]])
                    later += 1
                images.fetch(np.sort(absent[:chunk]), hand, epoch)
                absent = absent[chunk:]
            images.fetch(np.setdiff1d(wanted, list(hand)), hand, epoch)
            yield torch.stack([hand[number] for number in wanted.tolist()])
            for number in wanted.tolist():
                hand.pop(number, None)
        window.popleft()


def _absent(images: Images, numbers: Ints, hand: dict[int, Tensor], epoch: int) -> Ints:
    missing = images.missing(numbers, epoch)
    return np.array([n for n in missing.tolist() if n not in hand], dtype=np.int64)


class Background:
    """An iterator of tensors run in a thread, a few items ahead of who takes them."""

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
        # A stream of its own, so that decoding and training overlap on the device.
        stream: Any = torch.cuda.Stream(self._device) if cuda else None  # type: ignore[no-untyped-call]
        try:
            with torch.cuda.stream(stream):  # nothing, when there is none
                for item in self._source:
                    done = stream.record_event() if cuda else None
                    if not self._put((item, done)):
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
        while True:
            item, note = self._ready.get()
            if item is None:
                if note is not None:
                    raise note
                return
            if note is not None:
                stream = torch.cuda.current_stream(self._device)
                stream.wait_event(note)
                item.record_stream(stream)
            yield item

    def close(self) -> None:
        """Stop; a group that is being decoded is waited for."""
        self._stop.set()
        self._thread.join()


_running: weakref.WeakSet[Background] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    # A thread inside torch while the interpreter goes away would crash the process.
    for background in list(_running):
        background.close()

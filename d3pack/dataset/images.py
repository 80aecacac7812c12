"""Images by number: the store first, then the decoder; both opened when a process needs them."""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from d3pack import __version__
from d3pack.dataset import shelf
from d3pack.dataset.choice import Wish, choose, kept
from d3pack.dataset.order import Ints
from d3pack.dataset.progress import Progress, say
from d3pack.dataset.store import RecentStore, Store
from d3pack.decode import Decoder, modes
from d3pack.errors import UsageError
from d3pack.format.pack import Pack

if TYPE_CHECKING:
    from d3pack.backbones import Backbone

_MAKERS = ("torch", "diffusers", "transformers")  # a release may change a last bit


class Images:
    """Every image of a pack, each decoded once as long as the store holds it."""

    def __init__(
        self,
        pack: Pack,
        *,
        device: torch.device,
        mode: str,
        backbone: str | Path | Backbone | None,
        wish: Wish,
        fresh: bool,
        quiet: bool,
    ) -> None:
        self.pack = pack
        self.device = device
        self.group = pack.recipe.group
        self._mode = mode
        self._backbone = backbone
        self._wish = wish
        self._fresh = fresh
        self._quiet = quiet
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs to open its own."""
        names = ("pack", "device", "group", "_mode", "_backbone", "_wish", "_fresh", "_quiet")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def _forget(self) -> None:
        self._process = os.getpid()
        self._lock = threading.RLock()
        self._store: Store | None = None
        self._decoder: Decoder | None = None
        self._epoch = 0
        self._progress = Progress(self.total, quiet=self._quiet or self._fresh)

    @property
    def total(self) -> int:
        return len(self.pack.classes) * self.pack.images_per_class

    @property
    def chunk(self) -> int:
        """Images that keep the decoder busy: on a CPU it runs a group on every core at once."""
        return self.group * (torch.get_num_threads() if self.device.type == "cpu" else 1)

    @property
    def holds_cuda(self) -> bool:
        """Whether decoding holds settings of CUDA that others in the process would run under."""
        return self.device.type == "cuda" and self._mode == "exact"

    @property
    def identity(self) -> shelf.Identity:
        """What decides about the bytes: see `shelf.Identity`."""
        if self.device.type == "cuda":
            kind = f"cuda {torch.cuda.get_device_name(self.device)}"
        else:
            capability = torch.backends.cpu.get_cpu_capability()
            kind = f"{self.device.type} {platform.machine()} {capability}"
        height, width = self.pack.recipe.size
        return shelf.Identity(
            root=self.pack.root,
            mode=self._mode_in_full(),
            device=kind,
            software=f"d3pack {__version__}, "
            + ", ".join(f"{name} {version(name)}" for name in _MAKERS),
            images=self.total,
            shape=(3, height, width),
        )

    def _mode_in_full(self) -> str:
        """The mode with its switches: a decoder on a backbone that is shared turns none on."""
        if self._mode != "fast":
            return self._mode
        given, switches = self._backbone, None
        if given is not None and not isinstance(given, str | PathLike):
            switches = ["bf16"] if given.dtype == torch.bfloat16 else []
        mode = modes.choose_numerics("fast", switches, self.pack.recipe.dtype)
        return f"fast:{','.join(mode.switches)}"

    @contextmanager
    def _here(self, epoch: int) -> Iterator[Store]:
        """The store for an epoch, opened in this process, for this thread alone."""
        if os.getpid() != self._process:
            self._forget()  # a fork inherits handles and locks that belong to its parent
        worker = get_worker_info()
        if worker is not None and self.device.type == "cuda":
            raise UsageError(
                "images are decoded on CUDA, which DataLoader workers cannot do: each would open "
                "its own copy of the backbone, and a forked one cannot use CUDA at all",
                hint="write ds.loader(batch_size=...) or num_workers=0; or D3MDataset(..., "
                "device='cpu') to decode in the workers",
            )
        with self._lock:
            if self._store is None or (self._fresh and epoch != self._epoch):
                # A store is made for images that can be: what is wrong comes out before.
                if self._decoder is None and not kept(self._wish, self.identity):
                    self._decoder = self._open_decoder()
                self._store, words = choose(self._wish, self.identity, self.device, self.group)
                self._announce(words)
                self._epoch = epoch
            yield self._store

    def _announce(self, words: str) -> None:
        """Say what was chosen: one process of a loader does. That nothing is kept, it says always:
        a training would decode everything in every epoch."""
        if self._wish.cache != "auto" or not _speaks():
            return
        if isinstance(self._store, RecentStore) or not self._quiet:
            say(f"cache=auto: {words}")

    def missing(self, numbers: Ints, epoch: int) -> Ints:
        """Those that have to be decoded."""
        with self._here(epoch) as store:
            return store.missing(numbers)

    def read(self, numbers: Ints, epoch: int) -> Tensor:
        """Images that are not missing, on the device."""
        with self._here(epoch) as store:
            return self._on_device(store.read(numbers))

    def decode(self, numbers: Ints, epoch: int) -> Tensor:
        """Decode images and leave them in the store; slots left in the last group are used."""
        with self._here(epoch) as store:
            if self._decoder is None:
                self._decoder = self._open_decoder()
            spare = -len(numbers) % self.group
            all_numbers = np.concatenate([numbers, store.wanted(spare, numbers)])
            started = time.perf_counter()
            # Autocast belongs to the training loop around; it would change the bits.
            with torch.autocast(self.device.type, enabled=False):
                images = self._decoder.images(all_numbers, epoch=epoch if self._fresh else 0)
            store.write(all_numbers, images)
            if self.device.type == "cuda":
                # Whoever reads the images next may do so on another stream.
                torch.cuda.current_stream(self.device).synchronize()
            if _speaks():
                worker = get_worker_info()
                made = len(all_numbers) * (1 if worker is None else worker.num_workers)
                # What forgets is never full: it has a rate, and no end.
                ready = None if isinstance(store, RecentStore) else store.ready()
                self._progress.add(made, time.perf_counter() - started, ready)
            return images[: len(numbers)]

    def _open_decoder(self) -> Decoder:
        """The decoder on the pack's backbone, on a copy of it in a directory, or on an open one."""
        given = self._backbone
        place = given if isinstance(given, str | PathLike) else None
        return Decoder(
            self.pack,
            device=self.device,
            numerics=self._mode,
            path=place,
            backbone=None if isinstance(given, str | PathLike) else given,
        )

    def get(self, numbers: Ints, epoch: int) -> Tensor:
        """Images in the order asked for, on the device; repeated numbers are decoded once."""
        with self._here(epoch):
            if not self.missing(numbers, epoch).size:
                return self.read(numbers, epoch)
            hand: dict[int, Tensor] = {}
            self.fetch(np.unique(numbers), hand, epoch)
            return torch.stack([hand[number] for number in numbers.tolist()])

    def fetch(self, numbers: Ints, hand: dict[int, Tensor], epoch: int) -> None:
        """Put images in hand. Decoded ones are not read back: the store may be full, or forget."""
        with self._here(epoch):
            missing = self.missing(numbers, epoch)
            stored = np.setdiff1d(numbers, missing)
            if stored.size:
                hand.update(zip(stored.tolist(), self.read(stored, epoch), strict=True))
            if missing.size:
                hand.update(zip(missing.tolist(), self.decode(missing, epoch), strict=True))

    def _on_device(self, images: Tensor) -> Tensor:
        if self.device.type == "cuda" and images.device.type == "cpu":
            return images.pin_memory().to(self.device, non_blocking=True)
        return images

    def close(self) -> None:
        """Let go of the decoder and the store; both come back when needed."""
        if os.getpid() == self._process:
            with self._lock:
                if self._store is not None:
                    self._store.close()
                if self._decoder is not None:
                    self._decoder.close()
        self._forget()


def _speaks() -> bool:
    """The training's own process, or the first worker of a DataLoader for all of them."""
    worker = get_worker_info()
    return worker is None or worker.id == 0

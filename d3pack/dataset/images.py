"""Images by number: from the store, or decoded; both are opened when a process needs them."""

from __future__ import annotations

import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from d3pack import __version__
from d3pack.dataset.disk import StoreIdentity
from d3pack.dataset.order import Ints
from d3pack.dataset.store import CacheSettings, RecentStore, Store, adds_folder, open_store
from d3pack.decode import Decoder, choose_numerics
from d3pack.errors import UsageError
from d3pack.format import Pack
from d3pack.system import StatusLine

if TYPE_CHECKING:
    from d3pack.backbones import Backbone

_POLL = 0.01  # seconds between looks at what another process is decoding
_PATIENCE = 600  # seconds until it is thought dead: servers of NFS may keep the locks of a machine
_MAKERS = ("torch", "diffusers", "transformers")  # a release may change a last bit
_SAID = set[tuple[str, str]]()  # packs, and what this process has printed of their stores


class Images:
    """Every image of a pack, each decoded once as long as the store keeps it."""

    def __init__(
        self,
        pack: Pack,
        *,
        device: torch.device,
        numerics: str,
        backbone: str | Path | Backbone | None,
        cache: CacheSettings,
        fresh: bool,
        quiet: bool,
    ) -> None:
        self.pack = pack
        self.device = device
        self.group = pack.recipe.group
        self._numerics = numerics
        self._backbone = backbone
        self._cache = cache
        self._fresh = fresh
        self._quiet = quiet
        self._reset()

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process needs to open its own decoder and store."""
        names = ("pack", "device", "group", "_numerics", "_backbone", "_cache", "_fresh", "_quiet")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def _reset(self) -> None:
        """Start as in a new process, with nothing open."""
        self._process = os.getpid()
        self._lock = threading.RLock()
        self._store: Store | None = None
        self._words = ""  # what the store is, until that was printed
        self._decoder: Decoder | None = None
        self._epoch = 0
        # the numbers of the images in the dataset that is read; None: all
        self.among: Callable[[], Ints] | None = None
        quiet = self._quiet or self._fresh
        self._progress = StatusLine("d3pack: decoded", self.total, quiet=quiet)

    @property
    def total(self) -> int:
        """Images of the pack."""
        return len(self.pack.classes) * self.pack.images_per_class

    @property
    def chunk(self) -> int:
        """Images that keep the decoder busy: on a CPU it runs a group on every core at once."""
        return self.group * (torch.get_num_threads() if self.device.type == "cpu" else 1)

    @property
    def changes_cuda_settings(self) -> bool:
        """Whether decoding sets options of CUDA that hold for all threads of the process."""
        return self.device.type == "cuda" and self._numerics == "exact"

    @property
    def identity(self) -> StoreIdentity:
        """What decides about the bytes of the images."""
        if self.device.type == "cuda":
            device = f"cuda {torch.cuda.get_device_name(self.device)}"
        else:
            capability = torch.backends.cpu.get_cpu_capability()
            device = f"{self.device.type} {platform.machine()} {capability}"
        makers = ", ".join(f"{name} {version(name)}" for name in _MAKERS)
        height, width = self.pack.recipe.size
        return StoreIdentity(
            root=self.pack.root,
            numerics=self._numerics_with_switches(),
            device=device,
            software=f"d3pack {__version__}, {makers}",
            images=self.total,
            shape=(3, height, width),
        )

    def _numerics_with_switches(self) -> str:
        """Return "exact", or "fast:" and the switches, which a shared backbone does not turn on."""
        if self._numerics != "fast":
            return self._numerics
        backbone, switches = self._backbone, None
        if backbone is not None and not isinstance(backbone, str | PathLike):
            switches = ["bf16"] if backbone.dtype == torch.bfloat16 else []
        mode = choose_numerics("fast", switches, self.pack.recipe.dtype)
        return f"fast:{','.join(mode.switches)}"

    @contextmanager
    def _opened(self, epoch: int) -> Iterator[Store]:
        """Yield the store for an epoch, opened in this process, to one thread at a time."""
        if os.getpid() != self._process:
            self._reset()  # a fork inherits descriptors and locks that belong to its parent
        if get_worker_info() is not None and self.device.type == "cuda":
            raise UsageError(
                "images are decoded on CUDA, which DataLoader workers cannot do: each would open "
                "its own copy of the backbone, and a forked one cannot use CUDA at all",
                hint="write ds.loader(batch_size=...) or num_workers=0; or D3MDataset(..., "
                "device='cpu') to decode in the workers",
            )
        with self._lock:
            if self._store is None or (self._fresh and epoch != self._epoch):
                if self._decoder is None and adds_folder(self._cache, self.identity):
                    self._decoder = self._open_decoder()  # errors come before the folder
                self._store, words = open_store(self._cache, self.identity, self.device, self.group)
                self._words = words
                self._epoch = epoch
            yield self._store

    def _announce(self) -> None:
        """Print which store was chosen, once for all workers of a loader, when images are missing.

        A dataset without a store says so even if it is quiet: a training would decode every image
        in every epoch.
        """
        words, self._words = self._words, ""
        if (
            not words
            or (self.pack.root, words) in _SAID
            or self._cache.cache != "auto"
            or not _reports()
        ):
            return
        if isinstance(self._store, RecentStore) or not self._quiet:
            _SAID.add((self.pack.root, words))
            print(f"d3pack: cache=auto: {words}", file=sys.stderr, flush=True)

    def missing(self, numbers: Ints, epoch: int) -> Ints:
        """Return those of the numbers that have to be decoded."""
        with self._opened(epoch) as store:
            return store.missing(numbers)

    def read(self, numbers: Ints, epoch: int) -> Tensor:
        """Return images that are not missing, on the device."""
        with self._opened(epoch) as store:
            return self._on_device(store.read(numbers))

    def _decode(self, store: Store, numbers: Ints, epoch: int) -> Tensor:
        """Decode images and store them."""
        self._announce()
        if self._decoder is None:
            self._decoder = self._open_decoder()
        started = time.perf_counter()

        def part(done: int, total: int) -> None:
            self._progress.part(done, total, time.perf_counter() - started)

        counted = self._decoder.counted(part if _reports() else None, len(numbers))
        # the autocast of a training loop would change the bits
        with torch.autocast(self.device.type, enabled=False), counted:
            images = self._decoder.images(numbers, epoch=epoch if self._fresh else 0)
        store.write(numbers, images)
        if self.device.type == "cuda":
            # who reads the images next may do so on another stream
            torch.cuda.current_stream(self.device).synchronize()
        self._report(store, len(numbers), time.perf_counter() - started)
        return images

    def _report(self, store: Store, decoded: int, seconds: float) -> None:
        if _reports():
            worker = get_worker_info()
            workers = 1 if worker is None else worker.num_workers
            if isinstance(store, RecentStore):  # never complete: it has a speed, but no time left
                done, total = None, self.total
            else:
                done, total = self._done(store)
            self._progress.add(decoded * workers, seconds, done, total)

    def _done(self, store: Store) -> tuple[int, int]:
        """Return how many of how many images are stored: of the dataset that is read."""
        if self.among is None:
            return store.count(), self.total
        numbers = self.among()
        return numbers.size - store.missing(numbers).size, numbers.size

    def _open_decoder(self) -> Decoder:
        """Open a decoder on the pack's backbone, a copy of it in a directory, or an open one."""
        backbone = self._backbone
        if isinstance(backbone, str | PathLike):
            return Decoder(self.pack, device=self.device, numerics=self._numerics, path=backbone)
        return Decoder(self.pack, device=self.device, numerics=self._numerics, backbone=backbone)

    def get(self, numbers: Ints, epoch: int) -> Tensor:
        """Return images in the order of the numbers, on the device; each is decoded once."""
        with self._opened(epoch):
            if not self.missing(numbers, epoch).size:
                return self.read(numbers, epoch)
            images = self.fetch(np.unique(numbers), epoch)
            return torch.stack([images[number] for number in numbers.tolist()])

    def fetch(self, numbers: Ints, epoch: int) -> dict[int, Tensor]:
        """Return images by number, those decoded now not from the store: it may be full."""
        images: dict[int, Tensor] = {}
        with self._opened(epoch) as store:
            while numbers.size:
                missing = store.missing(numbers)
                stored = np.setdiff1d(numbers, missing)
                if stored.size:
                    images.update(zip(stored.tolist(), self.read(stored, epoch), strict=True))
                decoded = self._decode_free(store, missing, epoch) if missing.size else {}
                images.update((n, decoded[n]) for n in missing.tolist() if n in decoded)
                numbers = np.setdiff1d(missing, list(decoded))
        return images

    def _decode_free(self, store: Store, wanted: Ints, epoch: int) -> dict[int, Tensor]:
        """Decode those of the wanted images that no other process is decoding, or others.

        Returns without any when another process has finished some of them.
        """
        until = time.monotonic() + _PATIENCE
        while True:
            patient = time.monotonic() < until
            with store.claimed(wanted, self.group) if patient else nullcontext(wanted) as mine:
                if mine.size:
                    return dict(zip(mine.tolist(), self._decode(store, mine, epoch), strict=True))
            time.sleep(_POLL)
            if store.missing(wanted).size < wanted.size:
                return {}

    def _on_device(self, images: Tensor) -> Tensor:
        if self.device.type == "cuda" and images.device.type == "cpu":
            return images.pin_memory().to(self.device, non_blocking=True)
        return images

    def close(self) -> None:
        """Close the decoder and the store; both are opened again when needed."""
        if os.getpid() == self._process:
            with self._lock:
                if self._store is not None:
                    self._store.close()
                if self._decoder is not None:
                    self._decoder.close()
        self._reset()


def _reports() -> bool:
    """Return whether this is the training's own process, or the first worker of its loader."""
    worker = get_worker_info()
    return worker is None or worker.id == 0

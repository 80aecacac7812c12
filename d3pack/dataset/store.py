"""Where decoded images are kept: in memory, on disk, both, or only the latest few."""

from __future__ import annotations

import os
import shutil
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from d3pack.backbones import cache_home
from d3pack.dataset.disk import StoreIdentity, next_absent, open_disk_store, stored_bytes
from d3pack.dataset.order import Ints
from d3pack.errors import NoSpaceError, UsageError
from d3pack.system import size

Cache = Literal["auto", "gpu", "cpu", "disk"] | None
CACHES: tuple[Cache, ...] = ("auto", "gpu", "cpu", "disk", None)
CACHE_SIZE = 32 << 30  # bytes that all stores on disk may take together

_GPU_SHARE = 0.3  # of the free memory of the device; the rest is for the training
_HOST_SHARE = 0.4
_DISK_SHARE = 0.8  # of the free disk
_RECENT_GROUPS = 4  # kept with cache=None, so that consecutive single images share a group
_UNKNOWN_MEMORY = 4 << 30  # bytes assumed where the system does not tell


class Store(Protocol):
    """Images by number. An image that was written may be dropped; one that is not missing is there.

    `DiskStore` is the fourth kind beside those of this module.
    """

    def missing(self, numbers: Ints) -> Ints:
        """Return those of the numbers whose images are absent or damaged."""
        ...

    def write(self, numbers: Ints, images: Tensor) -> None:
        """Store images."""
        ...

    def read(self, numbers: Ints) -> Tensor:
        """Return a copy of images that are not missing."""
        ...

    def claimed(self, wanted: Ints, group: int) -> AbstractContextManager[Ints]:
        """Give this process images to decode, which no other process is given until the end.

        They are those of the wanted ones, all missing, that are free, and others that fill a group:
        a whole group of others where none of the wanted ones is free.
        """
        ...

    def count(self) -> int:
        """Return how many images are stored."""
        ...

    def close(self) -> None:
        """Free memory and locks."""
        ...


class MemoryStore:
    """All images as one uint8 tensor on a device."""

    def __init__(self, identity: StoreIdentity, device: torch.device) -> None:
        try:
            self._images = torch.empty(
                (identity.images, *identity.shape), dtype=torch.uint8, device=device
            )
        except RuntimeError as error:
            raise UsageError(
                f"a store of {size(identity.size)} does not fit on {device}",
                hint="use cache='disk'",
            ) from error
        self._present = np.zeros(identity.images, dtype=np.bool_)

    def missing(self, numbers: Ints) -> Ints:
        return numbers[~self._present[numbers]]

    def write(self, numbers: Ints, images: Tensor) -> None:
        positions = torch.from_numpy(numbers).to(self._images.device)
        self._images.index_copy_(0, positions, images.to(self._images.device))
        self._present[numbers] = True

    def read(self, numbers: Ints) -> Tensor:
        if self._images.device.type == "cpu":
            # a plain copy of rows in one thread: here torch's indexing is several times slower
            return torch.from_numpy(self._images.numpy().take(numbers, axis=0))
        positions = torch.from_numpy(numbers).to(self._images.device, non_blocking=True)
        return self._images.index_select(0, positions)

    @contextmanager
    def claimed(self, wanted: Ints, group: int) -> Iterator[Ints]:
        others = next_absent(~self._present, -len(wanted) % group, wanted)
        yield np.concatenate([wanted, others])

    def count(self) -> int:
        return int(np.count_nonzero(self._present))

    def close(self) -> None:
        self._images = torch.empty(0, dtype=torch.uint8)


class RecentStore:
    """Only the latest images: for `cache=None`, and where nothing larger fits."""

    def __init__(self, images: int, capacity: int) -> None:
        self._total = images
        self._capacity = capacity
        self._images: OrderedDict[int, Tensor] = OrderedDict()

    def missing(self, numbers: Ints) -> Ints:
        return np.array([n for n in numbers.tolist() if n not in self._images], dtype=np.int64)

    def write(self, numbers: Ints, images: Tensor) -> None:
        for number, image in zip(numbers.tolist(), images, strict=True):
            self._images[number] = image.clone()  # a view would keep its whole batch alive
            self._images.move_to_end(number)
        while len(self._images) > self._capacity:
            self._images.popitem(last=False)

    def read(self, numbers: Ints) -> Tensor:
        return torch.stack([self._images[number] for number in numbers.tolist()])

    @contextmanager
    def claimed(self, wanted: Ints, group: int) -> Iterator[Ints]:
        """Add those that follow: single images in order share the decoding of a group."""
        start = int(wanted.max()) + 1
        end = min(start + -len(wanted) % group, self._total)
        yield np.concatenate([wanted, self.missing(np.arange(start, end, dtype=np.int64))])

    def count(self) -> int:
        return len(self._images)

    def close(self) -> None:
        self._images.clear()


class TieredStore:
    """A fast store in front of a shared one: written to both, read from the first."""

    def __init__(self, front: Store, back: Store) -> None:
        self._front = front
        self._back = back

    def missing(self, numbers: Ints) -> Ints:
        """Return the numbers that neither store has; copy the others to the fast one."""
        absent = self._front.missing(numbers)
        if not absent.size:
            return absent
        missing = self._back.missing(absent)
        behind = np.setdiff1d(absent, missing)
        if behind.size:
            self._front.write(behind, self._back.read(behind))
        return missing

    def write(self, numbers: Ints, images: Tensor) -> None:
        self._front.write(numbers, images)
        self._back.write(numbers, images)

    def read(self, numbers: Ints) -> Tensor:
        return self._front.read(numbers)

    @contextmanager
    def claimed(self, wanted: Ints, group: int) -> Iterator[Ints]:
        with self._back.claimed(wanted, group) as numbers:
            is_wanted = np.isin(numbers, wanted)
            others = self._front.missing(numbers[~is_wanted])
            yield np.concatenate([numbers[is_wanted], others])

    def count(self) -> int:
        return max(self._front.count(), self._back.count())

    def close(self) -> None:
        self._front.close()
        self._back.close()


@dataclass(frozen=True, slots=True)
class CacheSettings:
    """How a dataset was asked to keep its images."""

    cache: Cache
    directory: Path | None  # None: d3pack's own
    limit: int  # bytes that all stores of the directory may take

    @property
    def home(self) -> Path:
        """The directory of the stores."""
        return cache_home() if self.directory is None else self.directory


def adds_folder(settings: CacheSettings, identity: StoreIdentity) -> bool:
    """Return whether `open_store` may create a folder on disk for these images."""
    on_disk = settings.cache in ("auto", "disk")
    return on_disk and stored_bytes(settings.home, identity) == 0


def open_store(
    settings: CacheSettings, identity: StoreIdentity, device: torch.device, group: int
) -> tuple[Store, str]:
    """Open the store that was asked for, or with `cache="auto"` the fastest one that fits.

    Returns:
        The store, and in words what it is.

    Raises:
        UsageError: the images do not fit into the store that was asked for.
    """
    recent = RecentStore(identity.images, _RECENT_GROUPS * group)
    cache, in_worker = settings.cache, get_worker_info() is not None
    if cache is None:
        return recent, "no store, images are decoded each time"
    if cache == "gpu" or (cache == "cpu" and not in_worker):
        place = device if cache == "gpu" else torch.device("cpu")
        return MemoryStore(identity, place), _in_memory(place, identity)
    if cache in ("disk", "cpu"):
        # workers have no memory in common: each would decode, and hold, everything
        store = _requested_on_disk(settings, identity)
        return store or (recent, "no store, images are decoded each time")
    return _fitting(settings, identity, device, in_worker=in_worker) or (
        recent,
        f"no store: {size(identity.size)} fit nowhere, images are decoded each time",
    )


def _fitting(
    settings: CacheSettings, identity: StoreIdentity, device: torch.device, *, in_worker: bool
) -> tuple[Store, str] | None:
    try:
        on_disk = _on_disk(settings, identity) if _disk_has_room(settings, identity) else None
    except (OSError, NoSpaceError):
        on_disk = None
    if device.type == "cuda" and identity.size < _GPU_SHARE * torch.cuda.mem_get_info(device)[0]:
        front, words = MemoryStore(identity, device), _in_memory(device, identity)
        if on_disk is None:
            return front, words
        # the disk spares the next run, and other ranks, the decoding
        return TieredStore(front, on_disk[0]), f"{words}, and {on_disk[1]}"
    if on_disk is not None or in_worker or identity.size > _HOST_SHARE * free_memory():
        return on_disk
    host = torch.device("cpu")
    return MemoryStore(identity, host), _in_memory(host, identity)


def _in_memory(device: torch.device, identity: StoreIdentity) -> str:
    place = "host memory" if device.type == "cpu" else f"memory of {device}"
    return f"{place} ({size(identity.size)} when full)"


def _disk_has_room(settings: CacheSettings, identity: StoreIdentity) -> bool:
    settings.home.mkdir(parents=True, exist_ok=True)
    growth = identity.size - stored_bytes(settings.home, identity)
    return growth <= _DISK_SHARE * shutil.disk_usage(settings.home).free


def _on_disk(settings: CacheSettings, identity: StoreIdentity) -> tuple[Store, str] | None:
    settings.home.mkdir(parents=True, exist_ok=True)
    store = open_disk_store(settings.home, identity, settings.limit)
    if store is None:
        return None
    return store, f"disk, {store.path} ({size(identity.size)} when full)"


def _requested_on_disk(
    settings: CacheSettings, identity: StoreIdentity
) -> tuple[Store, str] | None:
    try:
        store = _on_disk(settings, identity)
    except (OSError, NoSpaceError) as error:
        reason = getattr(error, "strerror", None) or error.args[0]
        warnings.warn(
            f"no store on disk in {settings.home} ({reason}): continuing without",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    if store is None:
        raise UsageError(
            f"the images need {size(identity.size)} on disk, but all stores together may "
            f"take {size(settings.limit)}",
            hint="raise cache_size, or free stores in use (d3pack cache ls)",
        )
    return store


def free_memory() -> float:
    """Return the bytes that this process may still take, by the machine and by its container."""
    free = float(_UNKNOWN_MEMORY)
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        free = float(text.split("MemAvailable:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:  # not on Windows
            free = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / 2
    try:
        group = Path("/sys/fs/cgroup")
        limit = float((group / "memory.max").read_text(encoding="ascii"))
        free = min(free, limit - float((group / "memory.current").read_text(encoding="ascii")))
    except (OSError, ValueError):  # no container, or "max"
        pass
    return free

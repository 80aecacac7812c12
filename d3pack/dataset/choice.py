"""Which store a dataset gets: what was asked for, or what fits."""

from __future__ import annotations

import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch.utils.data import get_worker_info

from d3pack.backbones import cache_home
from d3pack.dataset import shelf
from d3pack.dataset.store import MemoryStore, RecentStore, Store, TieredStore
from d3pack.errors import UsageError
from d3pack.system.text import size

Cache = Literal["auto", "gpu", "cpu", "disk"] | None
CACHES: tuple[Cache, ...] = ("auto", "gpu", "cpu", "disk", None)
CACHE_SIZE = 32 << 30  # bytes all stores on disk may take together

_GPU_SHARE = 0.3  # of free device memory; the rest is the training's
_HOST_SHARE = 0.4
_DISK_SHARE = 0.8  # of the free disk
_GROUPS_KEPT = 4  # what `cache=None` remembers, so that single indexing pays once a group


@dataclass(frozen=True, slots=True)
class Wish:
    """What the user said about caching."""

    cache: Cache
    folder: Path | None  # None: d3pack's own
    limit: int


def kept(wish: Wish, identity: shelf.Identity) -> bool:
    """Whether a store of these images is on disk already, or none is wanted there."""
    if wish.cache not in ("auto", "disk"):
        return True
    home = cache_home() if wish.folder is None else wish.folder
    return shelf.held(home, identity) > 0


def choose(
    wish: Wish, identity: shelf.Identity, device: torch.device, group: int
) -> tuple[Store, str]:
    """The store, and in words what it is."""
    recent = RecentStore(identity.images, _GROUPS_KEPT * group)
    if wish.cache is None:
        return recent, "no store, images are decoded each time"
    in_worker = get_worker_info() is not None
    if wish.cache == "gpu" or (wish.cache == "cpu" and not in_worker):
        place = device if wish.cache == "gpu" else torch.device("cpu")
        return _memory(identity, place), _words(place, identity)
    if wish.cache == "disk" or wish.cache == "cpu":
        # Memory of a worker is its own: side by side they would each hold, and decode, everything.
        disk = _disk(wish, identity, asked=True)
        return disk or (recent, "no store, images are decoded each time")
    return _automatic(wish, identity, device, in_worker) or (
        recent,
        f"no store: {size(identity.size)} fit nowhere, images are decoded each time",
    )


def _automatic(
    wish: Wish, identity: shelf.Identity, device: torch.device, in_worker: bool
) -> tuple[Store, str] | None:
    disk = _disk(wish, identity, asked=False)
    if device.type == "cuda" and identity.size < _GPU_SHARE * torch.cuda.mem_get_info(device)[0]:
        # The disk behind it spares the next run, and other ranks, the decoding.
        front, words = _memory(identity, device), _words(device, identity)
        return (TieredStore(front, disk[0]), f"{words}, and {disk[1]}") if disk else (front, words)
    if disk is not None or in_worker or identity.size > _HOST_SHARE * host_memory():
        return disk
    host = torch.device("cpu")
    return _memory(identity, host), _words(host, identity)


def _memory(identity: shelf.Identity, device: torch.device) -> MemoryStore:
    try:
        return MemoryStore(identity.images, identity.shape, device)
    except RuntimeError as error:
        raise UsageError(
            f"a store of {size(identity.size)} does not fit on {device}",
            hint="use cache='disk'",
        ) from error


def _words(device: torch.device, identity: shelf.Identity) -> str:
    where = "host memory" if device.type == "cpu" else f"memory of {device}"
    return f"{where} ({size(identity.size)} when full)"


def _disk(wish: Wish, identity: shelf.Identity, *, asked: bool) -> tuple[Store, str] | None:
    from d3pack.dataset.disk import DiskStore

    home = cache_home() if wish.folder is None else wish.folder
    try:
        home.mkdir(parents=True, exist_ok=True)
        growth = identity.size - shelf.held(home, identity)
        if not asked and growth > _DISK_SHARE * shutil.disk_usage(home).free:
            return None
        claimed = shelf.claim(home, identity, wish.limit)
        if claimed is not None:
            store = DiskStore(*claimed, identity)
            return store, f"disk, {store.path} ({size(identity.size)} when full)"
    except OSError as error:
        if asked:
            warnings.warn(
                f"no store on disk in {home} ({error.strerror or error}): going on without",
                RuntimeWarning,
                stacklevel=2,
            )
        return None
    if asked:
        raise UsageError(
            f"the images need {size(identity.size)} on disk, but all stores together may "
            f"take {size(wish.limit)}",
            hint="raise cache_size, or free stores in use (d3pack cache ls)",
        )
    return None


def host_memory() -> float:
    """Bytes this process may still take, by the machine and by its container."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        free = float(text.split("MemAvailable:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        free = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / 2
    try:
        group = Path("/sys/fs/cgroup")
        limit = float((group / "memory.max").read_text(encoding="ascii"))
        free = min(free, limit - float((group / "memory.current").read_text(encoding="ascii")))
    except (OSError, ValueError):  # no container, or "max"
        pass
    return free

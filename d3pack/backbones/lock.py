"""The lock of a backbone: which files it consists of, and that they are unchanged.

A pack names the lock, a hash of the list of files. The list comes with the backbone, as
`lock.json`, or is made from the files; it counts only if it has that hash. No file is parsed before
its size and SHA-256 are compared with the list, and none is used that was written to between the
check and the end of its reading. Because hashing gigabytes takes long, a check is remembered by
(path, device, inode, size, mtime, ctime), unless the file was written to just now. A remembered
hash that disagrees is not trusted: the file is hashed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

from d3pack.errors import (
    BackboneChangedError,
    BackboneError,
    D3MError,
    InvalidPackError,
    NotFoundError,
)
from d3pack.format import BackboneRef, FileLock, files_json, parse_files
from d3pack.system import expand_user, write_text

FileProgress = Callable[[str, int, int], None]  # file, bytes done, bytes in all

LIST = "lock.json"
MAX_LIST = 1 << 20  # bytes of a list
SUFFIXES = (".safetensors", ".json", ".txt")
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle", ".msgpack", ".h5")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_SHARD = r"-\d{5}-of-\d{5}"
_VARIANT = re.compile(r"\.([a-z0-9]+)(?:-\d{5}-of-\d{5})?\.safetensors$")
_MAX_VARIANTS = 8  # that are looked for, besides the plain one
_CHUNK = 1 << 22
_TICK = 2_000_000_000  # nanoseconds; the coarsest clock of a file system in use


def cache_home() -> Path:
    """Return the folder of all caches: $D3PACK_HOME, $XDG_CACHE_HOME/d3pack or ~/.cache/d3pack."""
    if home := os.environ.get("D3PACK_HOME"):
        return expand_user(home)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return expand_user(base) / "d3pack"
    return expand_user("~/.cache/d3pack")


@dataclass(frozen=True, slots=True)
class Part:
    """One folder of a backbone: its config, and its weights or other files."""

    folder: str
    config: str = "config.json"
    weights: str = ""  # the name of the weights file, without variant and suffix
    others: tuple[tuple[str, ...], ...] = ()  # the first of these sets that is complete
    optional: tuple[str, ...] = ()
    text: bool = False  # of the text encoder: a pack of its outputs is decoded without it


@dataclass(frozen=True, slots=True)
class Layout:
    """The parts of a family in diffusers' layout, and optional files at the top."""

    parts: tuple[Part, ...]
    optional: tuple[str, ...] = ()
    denoiser: str = ""  # class of the transformer, where other families have the same folders

    def matches(self, paths: Iterable[str], *, models: bool = False) -> bool:
        """Return whether a listing has the configs of this family, or those of its models only."""
        present = set(paths)
        asked = [part for part in self.parts if part.config and (part.weights or not models)]
        return all(f"{part.folder}/{part.config}" in present for part in asked)

    def needed(self, paths: Iterable[str], variant: str | None = None) -> tuple[str, ...]:
        """Return the files to lock.

        Without a variant these are the weights of full size, or "fp16" where only those exist.
        """
        present = set(paths)
        chosen = self._optional(present)
        for part in self.parts:
            if part.config:
                chosen.append(_require(present, f"{part.folder}/{part.config}"))
            if part.weights:
                chosen += _weights(present, f"{part.folder}/{part.weights}", variant)
            if part.others:
                sets = [[f"{part.folder}/{name}" for name in names] for names in part.others]
                complete = [paths for paths in sets if present.issuperset(paths)]
                chosen += complete[0] if complete else [_require(present, sets[0][0])]
        return tuple(sorted(chosen))

    def without_text(self, paths: Iterable[str]) -> tuple[str, ...]:
        """Return the files that a pack of outputs is decoded with."""
        text = tuple(f"{part.folder}/" for part in self.parts if part.text)
        return tuple(path for path in paths if not path.startswith(text))

    def choices(self, paths: Iterable[str]) -> Iterator[tuple[str, ...]]:
        """Yield what may have been locked: of each variant, with more and fewer optional files.

        Raises:
            BackboneError: there is none, because a file is missing.
        """
        present = set(paths)
        variants = {match[1] for path in present if (match := _VARIANT.search(path))}
        optional = self._optional(present)
        missing: BackboneError | None = None
        seen: set[tuple[str, ...]] = set()
        for variant in (None, *sorted(variants)[:_MAX_VARIANTS]):
            try:
                files = self.needed(present, variant)
            except BackboneError as error:
                missing = missing or error
                continue
            for count in range(len(optional) + 1):
                for left_out in combinations(optional, count):
                    seen.add(chosen := tuple(path for path in files if path not in left_out))
                    yield chosen
        if missing and not seen:
            raise missing

    def _optional(self, present: set[str]) -> list[str]:
        """Return the optional files that are there."""
        inner = [f"{part.folder}/{name}" for part in self.parts for name in part.optional]
        return [path for path in (*self.optional, *inner) if path in present]


def weight_files(paths: Iterable[str], stem: str) -> tuple[str, ...]:
    """Return the safetensors files of one part among locked paths; shards in order."""
    pattern = re.compile(re.escape(stem) + rf"(\.[a-z0-9]+)?({_SHARD})?(\.[a-z0-9]+)?\.safetensors")
    return tuple(sorted(path for path in paths if pattern.fullmatch(path)))


def _weights(present: set[str], stem: str, variant: str | None) -> list[str]:
    variants = [variant] if variant else [None, "fp16"]
    for name in variants:
        dot = f".{name}" if name else ""
        if (single := f"{stem}{dot}.safetensors") in present:
            return [single]
        end = rf"({re.escape(dot)}{_SHARD}|{_SHARD}{re.escape(dot)})\.safetensors"
        shards = [path for path in present if re.fullmatch(re.escape(stem) + end, path)]
        if shards:
            return shards
    if any(p.startswith(stem) and not p.endswith((".safetensors", ".json")) for p in present):
        raise BackboneError(
            f"{stem} exists only as a pickle, which can run code",
            code="E_BACKBONE_REFUSED",
            hint="convert it with diffusers' save_pretrained(safe_serialization=True)",
        )
    return [
        _require(present, f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors")
    ]


def _require(present: set[str], path: str) -> str:
    if path not in present:
        raise BackboneError(
            f"{path} is missing",
            code="E_BACKBONE_MISSING",
            hint="name a directory in diffusers' own layout",
        )
    return path


def check_path(path: str) -> None:
    """Refuse a file name that no backbone needs: of another type, hidden, or leading elsewhere."""
    parts = path.split("/")
    if len(parts) > 4 or not all(_PART.fullmatch(part) for part in parts):
        raise BackboneError(
            f"{path!r} is not a plain relative file name", code="E_BACKBONE_REFUSED"
        )
    if path.endswith(_PICKLES):
        raise BackboneError(
            f"{path} is a pickle, which can run code",
            code="E_BACKBONE_REFUSED",
            hint="use a copy in safetensors",
        )
    if not path.endswith(SUFFIXES):
        raise BackboneError(
            f"{path} does not end in {', '.join(SUFFIXES)}", code="E_BACKBONE_REFUSED"
        )


def read_list(path: Path) -> dict[str, FileLock]:
    """Return the files that a `lock.json` lists; none where it is not one."""
    try:
        if path.is_file():  # a pipe would not end
            with path.open("rb") as file:
                data = file.read(MAX_LIST + 1)
            return parse_files(json.loads(data)["files"]) if len(data) <= MAX_LIST else {}
    except (OSError, ValueError, RecursionError, LookupError, TypeError, InvalidPackError):
        pass  # its hash would not be that of the lock, which the caller compares
    return {}


def write_list(folder: Path, ref: BackboneRef) -> None:
    """Write `lock.json`: kind, licence, revision and files of a backbone."""
    value = {
        "kind": ref.kind,
        "licence": ref.licence,
        "revision": ref.revision,
        "files": files_json(ref.files),
    }
    write_text(folder / LIST, json.dumps(value, indent=1, sort_keys=True) + "\n")


def remember_list(ref: BackboneRef) -> None:
    """Keep the list of a backbone, so that a changed file can be named."""
    path = list_path(ref)
    with suppress(OSError, D3MError):  # a read-only or full home costs no more than the name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps({"files": files_json(ref.files)}) + "\n")


def list_path(ref: BackboneRef) -> Path:
    """Return where the list of a backbone is kept."""
    return cache_home() / "locks" / f"{ref.lock}.json"


def with_list(ref: BackboneRef, files: Mapping[str, FileLock]) -> BackboneRef | None:
    """Return a reference with this list of files if it has the lock and the total size."""
    listed = replace(ref, files=files) if files else None
    # a pack whose maker gave another size would have a wrong ledger
    return listed if listed == ref else None


def list_files(root: Path) -> tuple[str, ...]:
    """Return relative POSIX paths of the files in a directory and its folders."""
    if not root.is_dir():
        raise NotFoundError(f"there is no backbone directory {root}")
    files = [p for pattern in ("*", "*/*") for p in root.glob(pattern) if p.is_file()]
    return tuple(sorted(p.relative_to(root).as_posix() for p in files))


def lock_files(
    root: Path, paths: Iterable[str], progress: FileProgress | None = None
) -> dict[str, FileLock]:
    """Return sizes and hashes of files of a directory, as they are now."""
    locks = {}
    with _Memory() as memory:
        for path in sorted(paths):
            check_path(path)
            target = _resolve_inside(root, path)
            known = memory.get(_identity(target, target.stat()))
            digest = known or memory.hash(path, target, progress)[0]
            locks[path] = FileLock(target.stat().st_size, digest)
    return locks


@dataclass(frozen=True, slots=True)
class VerifiedFile:
    """A file whose bytes were the locked ones when it was checked."""

    path: Path
    sha256: str
    identity: str

    def is_unchanged(self) -> bool:
        """Return whether nobody wrote to it since."""
        return _identity(self.path, self.path.stat()) == self.identity


def verify_files(
    root: Path, ref: BackboneRef, progress: FileProgress | None = None
) -> dict[str, VerifiedFile]:
    """Check every file of a reference against its size and hash; the list must be known.

    Raises:
        BackboneChangedError: a file is another one.
        BackboneError: a file is missing (E_BACKBONE_MISSING) or refused (E_BACKBONE_REFUSED).
        NotFoundError: the directory does not exist.
    """
    if not root.is_dir():
        raise NotFoundError(f"there is no backbone directory {root}")
    files = {}
    with _Memory() as memory:
        for path, lock in sorted(ref.files.items()):
            check_path(path)
            target = _resolve_inside(root, path)
            status = target.stat()
            if status.st_size != lock.size:
                raise changed(path, f"{status.st_size} bytes instead of {lock.size}")
            identity = _identity(target, status)
            if memory.get(identity) != lock.sha256:
                digest, identity = memory.hash(path, target, progress)
                if digest != lock.sha256:
                    raise changed(path, f"sha256 {digest[:12]}, not {lock.sha256[:12]}")
            files[path] = VerifiedFile(target, lock.sha256, identity)
    return files


def changed(path: str, difference: str) -> BackboneChangedError:
    """Return the error for a file that differs from its lock."""
    return BackboneChangedError(
        f"{path} is not the locked file: {difference}",
        hint="fetch the locked revision again, or encode anew with this backbone",
    )


def _resolve_inside(root: Path, path: str) -> Path:
    """Return the regular file behind a name. Links may lead within a Hub cache, not out of it."""
    try:
        target = (root / path).resolve(strict=True)
    except (OSError, RuntimeError):
        raise BackboneError(
            f"{path} is missing in {root}",
            code="E_BACKBONE_MISSING",
            hint="fetch the whole repository again",
        ) from None
    home = root.resolve()
    homes = [home]
    if home.parent.name == "snapshots":  # a Hub cache: blobs of the repository, and shared ones
        home = home.parent.parent
        homes = [home, home.parent / "blobs"]
    if not any(map(target.is_relative_to, homes)):
        raise BackboneError(f"{path} is a link that leads out of {home}", code="E_BACKBONE_REFUSED")
    if not stat.S_ISREG(target.stat().st_mode):
        raise BackboneError(f"{path} is not a regular file", code="E_BACKBONE_REFUSED")
    return target


class _Memory:
    """Hashes computed before, in one small JSON file; unusable contents are ignored."""

    def __init__(self) -> None:
        self._path = cache_home() / "verified.json"
        self._known: dict[str, str] = {}
        self._is_new = False

    def __enter__(self) -> _Memory:
        try:
            known = json.loads(self._path.read_bytes())
        except (OSError, ValueError):
            known = {}
        if isinstance(known, dict):
            self._known = {str(k): v for k, v in known.items() if isinstance(v, str)}
        return self

    def __exit__(self, *_: object) -> None:
        if not self._is_new:
            return
        with suppress(OSError, D3MError):  # a read-only or full home only costs time
            known = dict(sorted(self._known.items())[-10_000:])
            write_text(self._path, json.dumps(known, indent=0))

    def get(self, identity: str) -> str | None:
        return self._known.get(identity)

    def hash(self, path: str, target: Path, progress: FileProgress | None) -> tuple[str, str]:
        """Return the SHA-256 of a file, and the identity that it had while it was read."""
        digest, done, began = hashlib.sha256(), 0, time.time_ns()
        try:
            with target.open("rb", buffering=0) as file:
                before = os.fstat(file.fileno())
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
                    done += len(chunk)
                    if progress:
                        progress(path, done, before.st_size)
        except OSError as error:
            raise BackboneError(
                f"{path} cannot be read: {error.strerror}", code="E_BACKBONE_MISSING"
            ) from None
        identity = _identity(target, before)
        if identity != _identity(target, target.stat()):
            raise changed(path, "it was written to while it was read")
        if _is_settled(before, began):
            self._known[identity] = digest.hexdigest()
            self._is_new = True
        return digest.hexdigest(), identity


def _identity(target: Path, status: os.stat_result) -> str:
    # a program can set the time of modification back, but not that of the change
    times = (status.st_mtime_ns, status.st_ctime_ns)
    numbers = (status.st_dev, status.st_ino, status.st_size, *times)
    return "|".join((str(target), *map(str, numbers)))


def _is_settled(status: os.stat_result, now: int) -> bool:
    """Return whether a write from now on would change the file's times: clocks tick coarsely."""
    return all(abs(now - t) >= _TICK for t in (status.st_mtime_ns, status.st_ctime_ns))

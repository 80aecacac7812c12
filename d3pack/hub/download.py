"""From an address to a verified pack: whole in the cache, or a part of it by range requests."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from d3pack.errors import HubError, NotFoundError, UsageError
from d3pack.format import (
    ByteRange,
    Header,
    Pack,
    class_ranges,
    header_length,
    names_range,
    outline,
    pack_bytes,
    read,
    read_class_ranges,
    read_header,
    read_names,
)
from d3pack.hub.address import Address, is_address, parse_address
from d3pack.hub.cache import cached, fetch, with_file
from d3pack.hub.remote import RemoteFile
from d3pack.hub.settings import Trust
from d3pack.hub.signatures import check_remote
from d3pack.system import replace_file

PathOrAddress = str | os.PathLike[str]
FIRST = 1 << 16  # the first request: header, class names and leaves of most packs
JOIN = 1 << 14  # parts that are so close are read by one request

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pulled:
    """A pack from the Hub, read and verified."""

    address: Address  # with file, commit and root: it always means these bytes
    path: Path  # where the file is: as it was asked for, else in the cache of the Hub
    data: bytes  # the bytes that were verified, read once
    pack: Pack
    signature: str = ""  # in words, what is known about the signature
    backbone: Path | None = None  # where the backbone is, if it was asked for


def pull(
    address: Address | str,
    *,
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    trust: Trust | None = None,
    with_backbone: bool = False,
) -> Pulled:
    """Download a pack from the Hub and verify every hash and, if there is one, its signature.

    Args:
        address: `hf://datasets/org/name[@revision]/file.d3m[#sha256=ROOT]`, `org/name` for a
            repository with one pack, or the web address of either.
        output: file to write, or a directory for a file of the same name. None: the pack stays
            in the cache of the Hub.
        overwrite: replace another file at `output`.
        trust: who must have signed the pack. None: a signature is checked, but not required.
        with_backbone: also download the backbone of the pack, by its lock: all that decoding needs.

    Returns:
        The pack, its exact address, and where it is.

    Raises:
        UsageError: the address is invalid, or another file is at `output`.
        NotFoundError: there is no such repository, revision or file.
        InvalidPackError: the file is not a valid pack.
        HubError: the Hub cannot be reached or refuses, or the pack is not the one that the address
            pins or that the signer has signed.
        BackboneError: the backbone cannot be downloaded.

    Example:
        >>> from d3pack import pull
        >>> pulled = pull("hf://datasets/org/name/photos.d3m", output=".")  # doctest: +SKIP
        >>> pulled.pack.classes  # doctest: +SKIP
        ('cat', 'dog')
    """
    pulled = download(parse_address(address) if isinstance(address, str) else address)
    trust = Trust() if trust is None else trust
    signature = check_remote(pulled.address, pulled.data, trust)
    path = pulled.path if output is None else _write(pulled, Path(output), overwrite=overwrite)
    backbone = None
    if with_backbone:
        from d3pack.backbones import fetch_backbone  # imports torch

        recipe = pulled.pack.recipe
        backbone = fetch_backbone(recipe.backbone, encoder=recipe.template is not None)
    return replace(pulled, path=path, signature=signature, backbone=backbone)


def _write(pulled: Pulled, path: Path, *, overwrite: bool) -> Path:
    if path.is_dir():
        path = path / str(pulled.address.file).rpartition("/")[2]
    if path.exists() and not overwrite and path.read_bytes() != pulled.data:
        raise UsageError(
            f"{path} exists and is another file", hint="overwrite it, or choose another output"
        )
    replace_file(path, pulled.data)
    return path


def download(address: Address) -> Pulled:
    """Download a pack into the cache and verify it."""
    path, pinned = fetch(address)
    data = path.read_bytes()
    pack = read(data)
    _check_root(pack.root, pinned)
    exact = pinned.at(str(pinned.revision), root=pack.root)
    _log.info("%s", exact)
    return Pulled(exact, path, data, pack)


def _check_root(root: str, address: Address) -> None:
    """Raise `HubError` unless the root is the one that the address pins."""
    if address.root not in (None, root):
        raise HubError(
            f"{address} is a valid pack, but its root is {root}",
            code="E_HUB_PIN",
            hint="the pack was replaced: ask who gave you the address, or pin the new root",
        )


def local_path(value: PathOrAddress) -> Path:
    """Return a path unchanged, and for an address the verified file in the cache."""
    if is_address(value):
        return download(parse_address(str(value))).path
    return Path(value)


def load(value: PathOrAddress) -> Pack:
    """Read a pack from a path or from the Hub."""
    if is_address(value):
        return download(parse_address(str(value))).pack
    path = Path(value)
    if not os.path.exists(path) and (path.suffix != ".d3m" or len(path.parts) == 3):
        raise NotFoundError(
            f"there is no file {value}", hint="for the Hub write hf://datasets/org/name/file.d3m"
        )
    return read(path)


@dataclass(frozen=True, slots=True)
class RemoteInfo:
    """What the first bytes of a remote pack contain."""

    address: Address  # with file, commit and root
    header: Header
    outline: Pack  # to describe: names, recipe, sections and ledger are true, tensors are empty
    received: int  # bytes that were read of `header.size`
    requests: int


def remote_info(address: Address | str) -> RemoteInfo:
    """Read header and class names of a pack on the Hub, without the rest."""
    window = _Window(parse_address(address) if isinstance(address, str) else address)
    file, names = window.file, window.names()
    _log.info("%s: read %d of %d bytes", window.address, file.received, file.size)
    header = window.header
    return RemoteInfo(window.address, header, outline(header, names), file.received, file.requests)


def read_classes(value: PathOrAddress, classes: Sequence[int | str]) -> Pack:
    """Return some classes of a pack, as `Pack.select` does but without probes.

    From the Hub only their rows are read, and checked by their leaf hashes. A pack that is in the
    cache, or of which most is needed, is downloaded whole.

    Raises:
        UsageError: a class is unknown or repeated, or there is none.
    """
    if not is_address(value):
        return _selected(load(value), classes)
    from huggingface_hub import constants

    address = with_file(parse_address(str(value)))
    if constants.HF_HUB_OFFLINE or cached(address) is not None:
        return _selected(download(address).pack, classes)
    window = _Window(address)
    header = window.header
    rows = _rows(window.names(), classes)
    ranges = class_ranges(header, rows)
    most = 2 * sum(one.stop - one.start for one in ranges) > header.size
    if most or sorted(rows) == list(range(header.classes)):
        return _selected(download(window.address).pack, rows)
    # the part is checked by every rule of a whole file
    pack = read(pack_bytes(read_class_ranges(header, rows, window.parts(ranges))))
    _log.info("%s: read %d of %d bytes", window.address, window.file.received, window.file.size)
    return pack


def _selected(pack: Pack, classes: Sequence[int | str]) -> Pack:
    part = pack.select(classes)
    return part if part is pack else replace(part, probes=None)


def _rows(names: tuple[str, ...], classes: Sequence[int | str]) -> list[int]:
    place = {name: row for row, name in enumerate(names)}
    rows = [place.get(one, -1) if isinstance(one, str) else int(one) for one in classes]
    for one, row in zip(classes, rows, strict=True):
        if not 0 <= row < len(names):
            raise UsageError(f"the pack has no class {one!r}")
    if not rows or len(set(rows)) != len(rows):
        raise UsageError("invalid selection: expected at least one class, none of them twice")
    return rows


class _Window:
    """The parts of a remote pack that were read, by their place in the file."""

    def __init__(self, address: Address) -> None:
        self.file = RemoteFile(with_file(address))
        first = self.file.read(0, FIRST)
        missing = header_length(first) - len(first)
        if missing > 0 and len(first) < self.file.size:
            first += self.file.read(len(first), missing)
        self.header = read_header(first)
        self.header.check_size(self.file.size)
        _check_root(self.header.root, self.file.address)
        self.address = self.file.address.at(str(self.file.address.revision), root=self.header.root)
        self._parts: list[tuple[int, bytes]] = [(0, first)]

    def parts(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        """Return the bytes of ranges; what is missing is read, neighbours by one request."""
        spans: list[list[int]] = []
        for start, stop in sorted((one.start, one.stop) for one in ranges):
            if self._find(start, stop) is not None:
                continue
            if spans and start - spans[-1][1] <= JOIN:
                spans[-1][1] = max(stop, spans[-1][1])
            else:
                spans.append([start, stop])
        for start, stop in spans:
            self._parts.append((start, self.file.read(start, stop - start)))
        return [self._find(one.start, one.stop) or b"" for one in ranges]

    def names(self) -> tuple[str, ...]:
        """Return the class names, checked by their hash."""
        (data,) = self.parts([names_range(self.header)])
        return read_names(self.header, data)

    def _find(self, start: int, stop: int) -> bytes | None:
        for at, data in self._parts:
            if at <= start and stop <= at + len(data):
                return data[start - at : stop - at]
        return None

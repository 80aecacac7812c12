"""From an address to a verified pack: whole in the cache, or a part of it by range requests."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from d3pack.errors import (
    HubError,
    InvalidPackError,
    NotFoundError,
    StorageError,
    UsageError,
)
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
    read_file,
    read_header,
    read_names,
)
from d3pack.hub.address import Address, ObjectAddress, is_address, parse_address, parse_object
from d3pack.hub.cache import cached, fetch, with_file
from d3pack.hub.remote import RemoteFile
from d3pack.hub.settings import Trust
from d3pack.hub.signatures import check_remote
from d3pack.system import ObjectFile, is_url, replace_file

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
    pack, data = read_file(path)  # a file longer than its header says is not read whole
    _check_root(pack.root, pinned)
    exact = pinned.at(str(pinned.revision), root=pack.root)
    _log.info("%s", exact)
    return Pulled(exact, path, data, pack)


def _check_root(root: str, address: Address | ObjectAddress) -> None:
    """Raise an error unless the root is the one that the address pins."""
    if address.root in (None, root):
        return
    text = f"{address} is a valid pack, but its root is {root}"
    hint = "the pack was replaced: ask who gave you the address, or pin the new root"
    if isinstance(address, Address):
        raise HubError(text, code="E_HUB_PIN", hint=hint)
    raise StorageError(text, code="E_STORAGE_PIN", hint=hint)


def is_remote(value: PathOrAddress) -> bool:
    """Return whether this is an address on the Hub or in an object store, and not a path."""
    return is_url(value) or is_address(value)


def load(value: PathOrAddress) -> Pack:
    """Read a pack from a path, from the Hub or from an object store."""
    return load_named(value)[1]


def load_named(value: PathOrAddress) -> tuple[str, Pack]:
    """Read a pack as `load` does; return the name of its file, too."""
    if is_url(value):
        address = parse_object(str(value))
        return address.path.name, _Window(address).whole()
    if is_address(value):
        pulled = download(parse_address(str(value)))
        return pulled.path.name, pulled.pack
    path = Path(value)
    if not os.path.exists(path) and (path.suffix != ".d3m" or len(path.parts) == 3):
        raise NotFoundError(
            f"there is no file {value}", hint="for the Hub write hf://datasets/org/name/file.d3m"
        )
    return path.name, read(path)


@dataclass(frozen=True, slots=True)
class RemoteInfo:
    """What the first bytes of a remote pack contain."""

    address: Address | ObjectAddress  # with file, commit and root
    header: Header
    outline: Pack  # to describe: names, recipe, sections and ledger are true, tensors are empty
    received: int  # bytes that were read of `header.size`
    requests: int


def remote_info(address: Address | ObjectAddress | str) -> RemoteInfo:
    """Read header and class names of a pack on the Hub or in a store, without the rest."""
    if isinstance(address, str):
        address = parse_object(address) if is_url(address) else parse_address(address)
    window = _Window(address)
    file, names = window.file, window.names()
    _log.info("%s: read %d of %d bytes", window.address, file.received, file.size)
    header = window.header
    return RemoteInfo(window.address, header, outline(header, names), file.received, file.requests)


def read_classes(value: PathOrAddress, classes: Sequence[int | str]) -> Pack:
    """Return some classes of a pack, as `Pack.select` does but without probes.

    From the Hub and from stores only their rows are read, and checked by their leaf hashes. A pack
    that is in the cache, or of which most is needed, is downloaded whole.

    Raises:
        UsageError: a class is unknown or repeated, or there is none.
    """
    if is_url(value):
        return _read_part(_Window(parse_object(str(value))), classes)
    if not is_address(value):
        return _selected(load(value), classes)
    from huggingface_hub import constants

    address = with_file(parse_address(str(value)))
    if constants.HF_HUB_OFFLINE or cached(address) is not None:
        return _selected(download(address).pack, classes)
    return _read_part(_Window(address), classes)


def _read_part(window: _Window, classes: Sequence[int | str]) -> Pack:
    header = window.header
    rows = _rows(window.names(), classes)
    ranges = class_ranges(header, rows)
    most = 2 * sum(one.stop - one.start for one in ranges) > header.size
    if most or sorted(rows) == list(range(header.classes)):
        return _selected(window.whole(), rows)
    parts = window.parts(ranges)
    with window.one_version():
        # the part is checked by every rule of a whole file
        pack = read(pack_bytes(read_class_ranges(header, rows, parts)))
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

    def __init__(self, address: Address | ObjectAddress) -> None:
        self.address: Address | ObjectAddress
        self.file: RemoteFile | ObjectFile
        if isinstance(address, Address):
            self.file = RemoteFile(with_file(address))
        else:
            self.file = ObjectFile(address.path)
        first = self.file.read(0, FIRST)
        missing = header_length(first) - len(first)
        if missing > 0 and len(first) < self.file.size:
            first += self.file.read(len(first), missing)
        self.header = read_header(first)
        self.header.check_size(self.file.size)
        if isinstance(self.file, RemoteFile):
            address = self.file.address.at(str(self.file.address.revision))  # of the commit
        _check_root(self.header.root, address)
        self.address = replace(address, root=self.header.root)
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
        with self.one_version():
            return read_names(self.header, data)

    def whole(self) -> Pack:
        """Return the whole pack."""
        if isinstance(self.address, Address):
            return download(self.address).pack
        _, first = self._parts[0]
        with self.one_version():
            return read(first + self.file.read(len(first), self.file.size - len(first)))

    @contextmanager
    def one_version(self) -> Iterator[None]:
        """Say of a pack that breaks a rule whether the object was replaced while it was read."""
        try:
            yield
        except InvalidPackError:
            if isinstance(self.file, ObjectFile):
                self.file.check_unchanged()
            raise

    def _find(self, start: int, stop: int) -> bytes | None:
        for at, data in self._parts:
            if at <= start and stop <= at + len(data):
                return data[start - at : stop - at]
        return None

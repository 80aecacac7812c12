"""The header, or a few classes, of a remote pack: only the bytes that are needed, all verified."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from d3pack.errors import UsageError
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
from d3pack.hub.address import Address, is_address, parse
from d3pack.hub.cache import cached, with_file
from d3pack.hub.pull import PathOrAddress, check_root, load, pull
from d3pack.hub.remote import RemoteFile

FIRST = 1 << 16  # the first request: the header, the class names and the leaves of most packs
JOIN = 1 << 14  # wanted parts that are this close come in one request

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RemoteInfo:
    """What the first bytes of a remote pack say, and how few they were."""

    address: Address  # with the file, the commit and the root filled in
    header: Header
    outline: Pack  # for describing: names, recipe, sections and ledger are true, tensors are empty
    received: int  # bytes read of `header.size`
    requests: int


def remote_info(address: Address | str) -> RemoteInfo:
    """Header and class names of a pack on the Hub, without the rest."""
    window = _Window(_address(address))
    file = window.file
    names = window.names()
    _log.info("%s: read %d of %d bytes", window.address, file.received, file.size)
    return RemoteInfo(
        window.address,
        window.header,
        outline(window.header, names),
        file.received,
        file.requests,
    )


def read_classes(value: PathOrAddress, classes: Sequence[int | str]) -> Pack:
    """Some classes of a pack, as `Pack.select` gives them but without probes.

    From the Hub only their rows are read, and held to their leaf hashes; a pack that is in the
    cache, or of which most would be read, is taken whole.
    """
    if not is_address(value):
        return _chosen(load(value), classes)
    from huggingface_hub import constants

    address = with_file(parse(str(value)))
    if constants.HF_HUB_OFFLINE or cached(address) is not None:
        return _chosen(pull(address).pack, classes)
    window = _Window(address)
    header = window.header
    names = window.names()
    rows = _rows(names, classes)
    reads = class_ranges(header, rows)
    most = 2 * sum(one.stop - one.start for one in reads) > header.size
    if most or sorted(rows) == list(range(header.classes)):
        return _chosen(pull(window.address).pack, rows)
    # a part is held to every rule of a whole file
    pack = read(pack_bytes(read_class_ranges(header, rows, window.parts(reads))))
    _log.info("%s: read %d of %d bytes", window.address, window.file.received, window.file.size)
    return pack


def _chosen(pack: Pack, classes: Sequence[int | str]) -> Pack:
    part = pack.select(classes)
    return part if part is pack else replace(part, probes=None)


def _rows(names: tuple[str, ...], classes: Sequence[int | str]) -> list[int]:
    place = {name: row for row, name in enumerate(names)}
    rows = [place.get(one, -1) if isinstance(one, str) else int(one) for one in classes]
    for one, row in zip(classes, rows, strict=True):
        if not 0 <= row < len(names):
            raise UsageError(f"the pack has no class {one!r}")
    if not rows or len(set(rows)) != len(rows):
        raise UsageError("a part of a pack needs classes, none of them twice")
    return rows


class _Window:
    """The parts of a remote pack that have arrived, by their place in the file."""

    def __init__(self, address: Address) -> None:
        self.file = RemoteFile(with_file(address))
        first = self.file.read(0, FIRST)
        need = header_length(first)
        if need > len(first) and len(first) < self.file.size:
            first += self.file.read(len(first), need - len(first))
        self.header = read_header(first)
        self.header.check_size(self.file.size)
        check_root(self.header.root, self.file.address)
        self.address = self.file.address.at(str(self.file.address.revision), root=self.header.root)
        self._parts: list[tuple[int, bytes]] = [(0, first)]

    def parts(self, reads: Sequence[ByteRange]) -> list[bytes]:
        """Their bytes; what is missing is fetched, neighbours in one request."""
        places = sorted((one.start, one.stop) for one in reads)
        todo: list[list[int]] = []
        for start, stop in places:
            if self._find(start, stop) is not None:
                continue
            if todo and start - todo[-1][1] <= JOIN:
                todo[-1][1] = max(stop, todo[-1][1])
            else:
                todo.append([start, stop])
        for start, stop in todo:
            self._parts.append((start, self.file.read(start, stop - start)))
        return [self._part(one) for one in reads]

    def names(self) -> tuple[str, ...]:
        """The class names, held to their hash."""
        (data,) = self.parts([names_range(self.header)])
        return read_names(self.header, data)

    def _part(self, one: ByteRange) -> bytes:
        found = self._find(one.start, one.stop)
        assert found is not None, "read before it was fetched"
        return found

    def _find(self, start: int, stop: int) -> bytes | None:
        for at, data in self._parts:
            if at <= start and stop <= at + len(data):
                return data[start - at : stop - at]
        return None


def _address(address: Address | str) -> Address:
    return parse(address) if isinstance(address, str) else address

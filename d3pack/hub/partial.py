"""The header, or a few classes, of a remote pack: only the bytes that are needed, all verified."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from d3pack import container
from d3pack.codecs.params import NUMPY
from d3pack.coded import Array, Coded
from d3pack.container import Slot
from d3pack.errors import LeafError, LimitError, TrailingError, TruncatedError, UsageError
from d3pack.format import Header, pack_bytes, read, read_header
from d3pack.format.reader import check_hash
from d3pack.format.rules import class_names
from d3pack.hub.address import Address, is_address, parse
from d3pack.hub.cache import cached, with_file
from d3pack.hub.pull import PathOrAddress, check_root, load, pull
from d3pack.hub.remote import RemoteFile
from d3pack.pack import EMBEDDED, Pack, Probes

FIRST = 1 << 16  # the first request: the header, the class names and the leaves of most packs
JOIN = 1 << 14  # wanted parts that are this close come in one request

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RemoteInfo:
    """What the first bytes of a remote pack say, and how few they were."""

    address: Address  # with the file, the commit and the root filled in
    header: Header
    outline: Pack  # for describing: names, recipe, sections and ledger are true, tensors are zero
    received: int  # bytes read of `header.size`
    requests: int


def remote_info(address: Address | str) -> RemoteInfo:
    """Header and class names of a pack on the Hub, without the rest."""
    window = _Window(_address(address))
    names = class_names(window.shared(["classes"])["classes"], window.header.classes)
    blank = {slot.name: _array(slot, bytes(slot.stop - slot.start)) for slot in window.header.slots}
    file = window.file
    _log.info("%s: read %d of %d bytes", window.address, file.received, file.size)
    return RemoteInfo(
        window.address,
        window.header,
        _as_pack(window.header, names, blank),
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
    # Rows of sections that only a newer minor knows count in the leaves as well.
    wanted = [slot for slot in header.slots if slot.section in _PARTIAL or not slot.shared]
    names = class_names(window.shared(["classes"])["classes"], header.classes)
    rows = _rows(names, classes)
    spans = [span for slot in wanted for span in _spans(slot, rows)]
    most = 2 * sum(stop - start for start, stop in spans) > header.size
    if most or sorted(rows) == list(range(header.classes)):
        return _chosen(pull(window.address).pack, rows)
    window.fetch(spans)
    pack = _pack(window, wanted, names, rows)
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


# Left out: sections of newer minors, as in `select`; of a part also probes, hashed as a whole.
_KNOWN = (*container.KNOWN, EMBEDDED)
_PARTIAL = tuple(name for name in _KNOWN if name != "probes")


class _Window:
    """The parts of a remote pack that have arrived, by their place in the tensor data."""

    def __init__(self, address: Address) -> None:
        self.file = RemoteFile(with_file(address))
        first = self.file.read(0, FIRST)
        need = 8 + int.from_bytes(first[:8], "little")
        if need > container.MAX_HEADER:
            raise LimitError(
                f"a header of {need - 8} bytes, at most {container.MAX_HEADER}",
                hint="is this a .d3m file?",
            )
        if need > len(first) and len(first) < self.file.size:
            first += self.file.read(len(first), need - len(first))
        self.header = read_header(first)
        if self.file.size < self.header.size:
            raise TruncatedError(
                f"the file has {self.file.size} bytes, its header says {self.header.size}"
            )
        if self.file.size > self.header.size:
            raise TrailingError(f"{self.file.size - self.header.size} bytes after the last tensor")
        check_root(self.header.root, self.file.address)
        self.address = self.file.address.at(str(self.file.address.revision), root=self.header.root)
        self._parts: list[tuple[int, bytes]] = [(0, first[self.header.data :])]

    def fetch(self, spans: Iterable[tuple[int, int]]) -> None:
        """Get what is missing of these places; neighbours share a request."""
        todo: list[list[int]] = []
        for start, stop in sorted(span for span in spans if self._find(*span) is None):
            if todo and start - todo[-1][1] <= JOIN:
                todo[-1][1] = max(stop, todo[-1][1])
            else:
                todo.append([start, stop])
        for start, stop in todo:
            data = self.file.read(self.header.data + start, stop - start)
            self._parts.append((start, data))

    def part(self, start: int, stop: int) -> bytes:
        """Bytes that have been fetched."""
        found = self._find(start, stop)
        assert found is not None, "read before it was fetched"
        return found

    def shared(self, sections: Sequence[str]) -> dict[str, Coded]:
        """Sections whose tensors are all of one piece, held to their hashes."""
        slots = [slot for slot in self.header.slots if slot.section in sections]
        self.fetch((slot.start, slot.stop) for slot in slots)
        out = {}
        for slot in slots:
            data = self.part(slot.start, slot.stop)
            check_hash(slot, data, self.header.data)
            tensors = {slot.tensor: _array(slot, data)}
            out[slot.section] = Coded("", tensors, shared=frozenset(tensors))
        return out

    def _find(self, start: int, stop: int) -> bytes | None:
        for at, data in self._parts:
            if at <= start and stop <= at + len(data):
                return data[start - at : stop - at]
        return None


def _spans(slot: Slot, rows: Sequence[int]) -> list[tuple[int, int]]:
    if slot.shared:
        return [(slot.start, slot.stop)]
    return [(slot.start + row * slot.row, slot.start + (row + 1) * slot.row) for row in rows]


def _pack(window: _Window, wanted: list[Slot], names: tuple[str, ...], rows: list[int]) -> Pack:
    """The chosen classes as a pack of their own.

    The whole pack is laid out with zeros where nothing was read, so that `select` stays the one
    place that knows what a part of a pack is; the zeros do not survive it.
    """
    arrays = {slot.name: _laid_out(window, slot, rows) for slot in wanted}
    whole = _as_pack(window.header, names, arrays)
    _check_leaves(wanted, arrays, rows, names)
    return read(pack_bytes(whole.select(rows)))


def _as_pack(header: Header, names: tuple[str, ...], arrays: Mapping[str, Array]) -> Pack:
    """A pack of these tensors under the manifest of the file; sections without any are left out."""
    coded = {
        section["name"]: Coded(
            section["codec"],
            {entry[0]: arrays[f"{section['name']}.{entry[0]}"] for entry in section["tensors"]},
            section["params"],
            frozenset(entry[0] for entry in section["tensors"] if entry[3] == "shared"),
        )
        for section in header.manifest["sections"]
        if section["name"] in _KNOWN and f"{section['name']}.{section['tensors'][0][0]}" in arrays
    }
    carried = {name: coded[name] for name in (EMBEDDED,) if name in coded}
    pack = Pack(
        classes=names,
        images_per_class=header.manifest["images_per_class"],
        recipe=header.recipe,
        prompts=coded["prompts"],
        seed=int(header.manifest["seed"], 16),
        picks=coded["picks"].tensors["index"] if "picks" in coded else None,
        labels=coded.get("labels"),
        adapter=coded.get("adapter"),
        probes=Probes(**coded["probes"].tensors) if "probes" in coded else None,
        provenance=header.manifest["provenance"],
        ids=coded["ids"].tensors["ids"] if "ids" in coded else None,
        optional={name: header.manifest["optional"][name] for name in carried},
        extensions=carried,
        minor=header.manifest["d3m"][1],
    )
    object.__setattr__(pack, "_manifest", header.manifest)
    return pack


def _laid_out(window: _Window, slot: Slot, rows: Sequence[int]) -> Array:
    data = bytearray(slot.stop - slot.start)
    for start, stop in _spans(slot, rows):
        data[start - slot.start : stop - slot.start] = window.part(start, stop)
    if slot.shared:
        check_hash(slot, memoryview(data), window.header.data)
    return _array(slot, bytes(data))


def _array(slot: Slot, data: bytes) -> Array:
    return np.frombuffer(data, NUMPY[slot.dtype]).reshape(slot.shape)


def _check_leaves(
    wanted: list[Slot], arrays: Mapping[str, Array], rows: list[int], names: tuple[str, ...]
) -> None:
    """Hold the rows that were read to their leaves; the leaves are held to the root."""
    take = np.array(rows)
    stored = [Coded("", {s.tensor: arrays[s.name][take]}) for s in wanted if not s.shared]
    wrong = (container.leaves(stored, len(rows)) != arrays["leaves.hash"][take]).any(axis=1)
    if wrong.any():
        row = rows[int(np.argmax(wrong))]
        raise LeafError(f"class {row} ({names[row]!r}) does not match its leaf hash")


def _address(address: Address | str) -> Address:
    return parse(address) if isinstance(address, str) else address

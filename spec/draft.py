"""A pack in parts, in which one rule can be broken while all others are kept."""

from __future__ import annotations

import copy
import hashlib
import json
import struct
from collections.abc import Callable
from typing import Any

import reader


def canonical(value: Any) -> str:
    """Return canonical JSON as the specification defines it."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


class Draft:
    """Manifest and tensors of a valid pack, which can be changed; `bytes()` joins them.

    `blobs` holds the bytes of each tensor. Those that all classes share are in `shared`, the others
    have a row for each class; the order of both is that of the file.
    """

    def __init__(self, data: bytes) -> None:
        size = struct.unpack_from("<Q", data)[0]
        header = json.loads(data[8 : 8 + size])
        self.manifest: dict[str, Any] = json.loads(header["__metadata__"]["d3m"])
        self.blobs: dict[str, bytes] = {}
        self.shared: dict[str, list[str]] = {}  # by section
        self.rows: dict[str, list[str]] = {}
        classes, at = self.manifest["classes"], 0
        body = data[8 + size :]
        start, width = header["rows"]["data_offsets"][0], header["rows"]["shape"][1]
        row_at = 0
        for part in reader.read(data)["sections"].values():
            self.shared[part["name"]], self.rows[part["name"]] = [], []
            for tensor in part["tensors"]:
                name, length = tensor["name"], tensor["span"].stop - tensor["span"].start
                if tensor["shared"]:
                    self.shared[part["name"]].append(name)
                    self.blobs[name] = body[at : at + length]
                    at += length
                else:
                    self.rows[part["name"]].append(name)
                    rows = (body[start + c * width + row_at :][:length] for c in range(classes))
                    self.blobs[name] = b"".join(rows)
                    row_at += length
        self.text: str | None = None  # the manifest's spelling, if not the canonical one
        self.reheader: Callable[[str], str] = lambda text: text
        self.width = 0  # header bytes beyond what is needed
        self.space = " "
        self.tail = b""

    def copy(self) -> Draft:
        """Return another draft with the same content."""
        other = copy.copy(self)
        other.manifest = json.loads(json.dumps(self.manifest))  # a tenth of deepcopy's time
        other.blobs, other.shared, other.rows = dict(self.blobs), dict(self.shared), dict(self.rows)
        return other

    def section(self, name: str) -> list[Any]:
        """Return the entry of a section in the manifest: [name, codec, params, hash]."""
        return next(entry for entry in self.manifest["sections"] if entry[0] == name)

    def params(self, name: str) -> dict[str, Any]:
        """Return the parameters of a section."""
        value: dict[str, Any] = self.section(name)[2]
        return value

    def poke(self, name: str, at: int, value: bytes) -> Draft:
        """Overwrite bytes of a tensor."""
        old = self.blobs[name]
        at %= len(old)
        self.blobs[name] = old[:at] + value + old[at + len(value) :]
        return self

    def rehash(self) -> Draft:
        """Set the hash of every section that has shared bytes."""
        for entry in self.manifest["sections"]:
            if data := self._shared(entry[0]):
                entry[3:] = [hashlib.sha256(data).hexdigest()[:32]]
        return self

    def releaf(self) -> Draft:
        """Set the leaves, then every hash."""
        leaves = [hashlib.sha256(row).digest()[:16] for row in self._rows()]
        self.blobs["leaves.hash"] = b"".join(leaves)
        return self.rehash()

    def reroot(self) -> Draft:
        """Set the identity."""
        rest = {name: value for name, value in self.manifest.items() if name != "root"}
        self.manifest["root"] = hashlib.sha256(canonical(rest).encode()).hexdigest()
        return self

    def seal(self) -> Draft:
        """Set leaves, hashes and identity."""
        return self.releaf().reroot()

    def _names(self) -> list[str]:
        """Return the names of the sections, as far as there are some."""
        entries = self.manifest["sections"]
        first = [entry[0] for entry in entries if isinstance(entry, list) and entry]
        return [name for name in first if isinstance(name, str)]

    def _shared(self, section: str) -> bytes:
        return b"".join(self.blobs.get(name, b"") for name in self.shared.get(section, ()))

    def _rows(self) -> list[bytes]:
        """Return the row of each class; one row where the number of classes is none."""
        names = [name for section in self._names() for name in self.rows.get(section, ())]
        blobs = [self.blobs.get(name, b"") for name in names]
        count = self.manifest["classes"]
        if type(count) is not int or not 1 <= count <= 4096:
            count = 1
        spans = [(len(blob) // count, blob) for blob in blobs]
        return [b"".join(blob[c * n : c * n + n] for n, blob in spans) for c in range(count)]

    def bytes(self) -> bytes:
        """Return the file, in canonical form except for what was changed."""
        text = canonical(self.manifest) if self.text is None else self.text
        shared = b"".join(map(self._shared, self._names()))
        rows = self._rows()
        data = shared + b"".join(rows)
        shape = [len(rows), len(rows[0])]
        parts = [
            '{"__metadata__":{"d3m":' + json.dumps(text) + "}",
            _entry("shared", [len(shared)], [0, len(shared)]),
            _entry("rows", shape, [len(shared), len(data)]),
        ]
        header = self.reheader(",".join(parts) + "}").encode("utf-8", "surrogatepass")
        size = -(-(8 + len(header)) // 8) * 8 - 8 + self.width
        padded = header + self.space.encode() * (size - len(header))
        return struct.pack("<Q", len(padded)) + padded + data + self.tail


def _entry(name: str, shape: list[int], offsets: list[int]) -> str:
    value = {"dtype": "U8", "shape": shape, "data_offsets": offsets}
    return f'"{name}":{json.dumps(value, separators=(",", ":"))}'

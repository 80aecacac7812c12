"""A pack in parts, in which one rule can be broken while all others are kept."""

from __future__ import annotations

import copy
import hashlib
import json
import struct
from collections.abc import Callable
from typing import Any


def canonical(value: Any) -> str:
    """Return canonical JSON as the specification defines it."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


class Draft:
    """Manifest and tensors of a valid pack, which can be changed; `bytes()` joins them."""

    def __init__(self, data: bytes) -> None:
        size = struct.unpack_from("<Q", data)[0]
        header = json.loads(data[8 : 8 + size])
        self.manifest: dict[str, Any] = json.loads(header.pop("__metadata__")["d3m"])
        self.blobs: dict[str, bytes] = {}
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            if not name.startswith("pad."):
                self.blobs[name] = data[8 + size + start : 8 + size + stop]
        self.text: str | None = None  # the manifest's spelling, if not the canonical one
        self.reheader: Callable[[str], str] = lambda text: text
        self.width = 0  # header bytes beyond what is needed
        self.space = " "
        self.zero = b"\0"
        self.tail = b""

    def copy(self) -> Draft:
        """Return another draft with the same content."""
        other = copy.copy(self)
        other.manifest = json.loads(json.dumps(self.manifest))  # a tenth of deepcopy's time
        other.blobs = dict(self.blobs)
        return other

    def section(self, name: str) -> dict[str, Any]:
        """Return the entry of a section in the manifest."""
        return next(entry for entry in self.manifest["sections"] if entry["name"] == name)

    def tensor(self, name: str) -> list[Any]:
        """Return the entry of a tensor: [name, dtype, shape, axis, sha256]."""
        section, tensor = name.split(".")
        return next(entry for entry in self.section(section)["tensors"] if entry[0] == tensor)

    def poke(self, name: str, at: int, value: bytes) -> Draft:
        """Overwrite bytes of a tensor."""
        old = self.blobs[name]
        at %= len(old)
        self.blobs[name] = old[:at] + value + old[at + len(value) :]
        return self

    def rehash(self) -> Draft:
        """Set the hash of every tensor."""
        for name, blob in self.blobs.items():
            self.tensor(name)[4] = hashlib.sha256(blob).hexdigest()
        return self

    def releaf(self) -> Draft:
        """Set the leaves, then every hash."""
        classes = self.manifest["classes"]
        rows = []
        for section in self.manifest["sections"]:
            for tensor in section["tensors"]:
                if tensor[3] == "class":
                    blob = self.blobs[f"{section['name']}.{tensor[0]}"]
                    row = len(blob) // classes
                    rows.append([blob[i * row : (i + 1) * row] for i in range(classes)])
        leaf = [hashlib.sha256(b"".join(parts)).digest()[:16] for parts in zip(*rows, strict=True)]
        self.blobs["leaves.hash"] = b"".join(leaf)
        return self.rehash()

    def reroot(self) -> Draft:
        """Set the identity."""
        rest = {name: value for name, value in self.manifest.items() if name != "root"}
        self.manifest["root"] = hashlib.sha256(canonical(rest).encode()).hexdigest()
        return self

    def seal(self) -> Draft:
        """Set leaves, hashes and identity."""
        return self.releaf().reroot()

    def bytes(self) -> bytes:
        """Return the file, in canonical form except for what was changed."""
        text = canonical(self.manifest) if self.text is None else self.text
        parts = ['{"__metadata__":{"d3m":' + json.dumps(text) + "}"]
        data = b""
        pads = 0
        for section in self.manifest["sections"]:
            for tensor, dtype, shape, *_ in section["tensors"]:
                name = f"{section['name']}.{tensor}"
                gap = -len(data) % 64
                if gap:
                    offsets = [len(data), len(data) + gap]
                    parts.append(_entry(f"pad.{pads}", "U8", [gap], offsets))
                    pads += 1
                    data += self.zero * gap
                blob = self.blobs.get(name, b"")
                parts.append(_entry(name, dtype, shape, [len(data), len(data) + len(blob)]))
                data += blob
        header = self.reheader(",".join(parts) + "}").encode("utf-8", "surrogatepass")
        size = -(-(8 + len(header)) // 64) * 64 - 8 + self.width
        padded = header + self.space.encode() * (size - len(header))
        return struct.pack("<Q", len(padded)) + padded + data + self.tail


def _entry(name: str, dtype: Any, shape: Any, offsets: list[int]) -> str:
    value = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    return f'"{name}":{json.dumps(value, separators=(",", ":"))}'

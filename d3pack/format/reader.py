"""The strict reader. Checks run in the specification's order: the first broken rule is named."""

from __future__ import annotations

import hashlib
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from d3pack.errors import InvalidPackError, NotFoundError
from d3pack.format import canonical, container, rules
from d3pack.format.codecs.params import NUMPY
from d3pack.format.coded import Coded
from d3pack.format.pack import MAJOR, Pack, Probes, manifest_root
from d3pack.format.recipe import Recipe

Source = str | os.PathLike[str] | bytes | bytearray | memoryview

BINARY = getattr(os, "O_BINARY", 0)  # Windows would translate line ends
MAX_CLASSES = 2**20
MAX_IMAGES = 2**24
FIELDS = {
    "d3m", "requires", "optional", "classes", "images_per_class", "seed", "recipe", "provenance",
    "sections", "root",
}  # fmt: skip
_SEED = re.compile(r"[0-9a-f]{16}")
_FEATURE = re.compile(r"[a-z][a-z0-9-]{0,31}")


@dataclass(frozen=True, slots=True)
class Header:
    """All that is before the tensors, checked: what range requests are planned from."""

    manifest: Mapping[str, Any]
    recipe: Recipe
    slots: tuple[container.Slot, ...]  # offsets count from `data`
    data: int  # where the tensors begin
    size: int  # bytes of the whole file

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.manifest["classes"])

    @property
    def root(self) -> str:
        """The identity of the pack."""
        return str(self.manifest["root"])


def read(source: Source) -> Pack:
    """Read a pack from a path or from bytes; every rule and every hash is checked."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
        head = read_header(data)
        _check_size(head, len(data))
    else:
        head, data = _load(source)
    for start, stop in container.gaps(head.slots):
        if any(data[head.data + start : head.data + stop]):
            raise InvalidPackError(
                f"padding at offset {head.data + start} is not zero", code="E_PADDING"
            )
    view = memoryview(data)
    for slot in head.slots:
        check_hash(slot, view[head.data + slot.start : head.data + slot.stop], head.data)
    arrays = {
        slot.name: np.frombuffer(
            data, NUMPY[slot.dtype], math.prod(slot.shape), head.data + slot.start
        ).reshape(slot.shape)
        for slot in head.slots
    }
    return assemble(head, arrays)


def _load(path: str | os.PathLike[str]) -> tuple[Header, bytes]:
    """The header and all bytes of a regular file, read once: a mapped one could change under us.

    The header comes first, so that a file of another length is refused before it takes memory.
    """
    try:
        with open(path, "rb", opener=_open) as file:
            size = os.fstat(file.fileno()).st_size
            first = file.read(8)
            first += file.read(min(int.from_bytes(first, "little"), container.MAX_HEADER))
            head = read_header(first)
            _check_size(head, size)
            data = first + file.read(head.size - len(first))
            _check_size(head, len(data))
            return head, data
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise NotFoundError(f"{os.fspath(path)}: {error.strerror}") from None
    except (OSError, ValueError) as error:
        raise NotFoundError(f"{os.fspath(path)!r}: {error}") from None


def _open(path: str, flags: int) -> int:
    """Open without waiting for a pipe's other end; only regular files are read."""
    fd = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise NotFoundError(f"{path} is not a regular file")


def _check_size(head: Header, size: int) -> None:
    if size < head.size:
        raise InvalidPackError(
            f"the file has {size} bytes, its header says {head.size}",
            code="E_TRUNCATED",
            hint="fetch it again",
        )
    if size > head.size:
        raise InvalidPackError(f"{size - head.size} bytes after the last tensor", code="E_TRAILING")


def read_header(data: bytes) -> Header:
    """Check everything up to the first tensor; `data` may be a prefix of the file."""
    if len(data) < 8:
        raise InvalidPackError(
            f"{len(data)} bytes, a pack begins with 8 bytes of header length", code="E_TRUNCATED"
        )
    length = int.from_bytes(data[:8], "little")
    if length > container.MAX_HEADER:
        raise InvalidPackError(
            f"a header of {length} bytes, at most {container.MAX_HEADER}",
            code="E_LIMIT",
            hint="is this a .d3m file?",
        )
    if 8 + length > len(data):
        raise InvalidPackError(
            f"a header of {length} bytes in {len(data)} bytes", code="E_TRUNCATED"
        )
    raw = data[8 : 8 + length]
    manifest, text = _manifest(raw)
    recipe, placed = _check_manifest(manifest, text)
    if data[: 8 + length] != container.header(text, placed):
        raise InvalidPackError(
            "the header is not the one that its manifest demands", code="E_CANON"
        )
    return Header(
        canonical.freeze(manifest), recipe, placed, 8 + length, 8 + length + placed[-1].stop
    )


def check_hash(slot: container.Slot, data: bytes | memoryview, offset: int) -> None:
    """Refuse a tensor that is not the one written."""
    got = hashlib.sha256(data).hexdigest()
    if got != slot.sha256:
        raise InvalidPackError(
            f"{slot.name} at offset {offset + slot.start}: sha256 is {got}, must be {slot.sha256}",
            code="E_HASH",
            hint="the file is damaged: fetch it again",
        )


def assemble(head: Header, arrays: Mapping[str, Any]) -> Pack:
    """The Pack that these tensors make; leaves and values are checked."""
    coded = {
        section["name"]: coded_section(section, arrays) for section in head.manifest["sections"]
    }
    classes = head.classes
    want = container.leaves(
        (part for name, part in coded.items() if name not in ("classes", "leaves")), classes
    )
    wrong = (want != coded["leaves"].tensors["hash"]).any(axis=1)
    if wrong.any():
        raise InvalidPackError(
            f"class {int(np.argmax(wrong))} does not match its leaf hash", code="E_LEAF"
        )
    names = rules.class_names(coded["classes"], classes)
    rules.check_values(coded, names, head.manifest["images_per_class"])
    return under(head, names, coded)


def under(head: Header, names: tuple[str, ...], coded: Mapping[str, Coded]) -> Pack:
    """The Pack of these sections under the manifest of the file; nothing is checked."""
    probes = coded.get("probes")
    pack = Pack(
        classes=names,
        images_per_class=head.manifest["images_per_class"],
        recipe=head.recipe,
        prompts=coded["prompts"],
        seed=int(head.manifest["seed"], 16),
        picks=coded.get("picks"),
        labels=coded.get("labels"),
        adapter=coded.get("adapter"),
        probes=Probes(**probes.tensors) if probes else None,
        provenance=head.manifest["provenance"],
        ids=coded["ids"].tensors["ids"] if "ids" in coded else None,
        optional=head.manifest["optional"],
        extensions={name: part for name, part in coded.items() if name not in container.KNOWN},
        minor=head.manifest["d3m"][1],
    )
    object.__setattr__(pack, "_manifest", head.manifest)
    return pack


def coded_section(section: Mapping[str, Any], arrays: Mapping[str, Any]) -> Coded:
    """A section of the manifest with its tensors."""
    return Coded(
        section["codec"],
        {entry[0]: arrays[f"{section['name']}.{entry[0]}"] for entry in section["tensors"]},
        section["params"],
        frozenset(entry[0] for entry in section["tensors"] if entry[3] == "shared"),
    )


def _manifest(raw: bytes) -> tuple[dict[str, Any], str]:
    if not raw.startswith(b"{") or not raw.isascii():
        raise InvalidPackError(
            "the header does not begin with { or is not ASCII",
            code="E_HEADER",
            hint="is this a .d3m file?",
        )
    outer = canonical.loads(raw.decode("ascii"), "header")
    meta = outer.get("__metadata__")
    if not isinstance(meta, dict) or list(meta) != ["d3m"] or not isinstance(meta["d3m"], str):
        raise InvalidPackError(
            "the header has no __metadata__ with one d3m entry",
            code="E_HEADER",
            hint="this may be a safetensors file, but it is no pack",
        )
    text = meta["d3m"]
    if not text.isascii():
        raise InvalidPackError("manifest: not ASCII", code="E_JSON")
    manifest = canonical.loads(text, "manifest")
    if not isinstance(manifest, dict):
        raise InvalidPackError("the manifest is not an object", code="E_MANIFEST")
    return manifest, text


def _check_manifest(
    manifest: dict[str, Any], text: str
) -> tuple[Recipe, tuple[container.Slot, ...]]:
    _check_version(manifest)
    if canonical.spell(manifest) != text:
        raise InvalidPackError("the manifest is not in canonical form", code="E_CANON")
    for name in sorted(set(manifest) ^ FIELDS):
        raise InvalidPackError(
            f"{name}: {'unknown field' if name in manifest else 'missing'}", code="E_MANIFEST"
        )
    optional = manifest["optional"]
    if not isinstance(optional, dict) or not all(map(_FEATURE.fullmatch, optional)):
        raise InvalidPackError("optional: not an object of feature names", code="E_MANIFEST")
    if not isinstance(manifest["provenance"], dict):
        raise InvalidPackError("provenance: not an object", code="E_MANIFEST")
    if not isinstance(manifest["seed"], str) or not _SEED.fullmatch(manifest["seed"]):
        raise InvalidPackError("seed: not 16 hex digits", code="E_MANIFEST")
    for name, limit in (("classes", MAX_CLASSES), ("images_per_class", MAX_IMAGES)):
        if type(manifest[name]) is not int:
            raise InvalidPackError(f"{name}: not an integer", code="E_MANIFEST")
        if not 1 <= manifest[name] <= limit:
            raise InvalidPackError(
                f"{name}: {manifest[name]}, must be 1 to {limit}", code="E_LIMIT"
            )
    if manifest["root"] != manifest_root(manifest):
        raise InvalidPackError(
            "root is not the hash of the manifest",
            code="E_ROOT",
            hint="the file is damaged: fetch it again",
        )
    recipe = Recipe.from_json(manifest["recipe"])
    container.order(manifest["sections"], optional)
    placed = container.slots(manifest["sections"], manifest["classes"])
    rules.check_sections(manifest)
    return recipe, placed


def _check_version(manifest: dict[str, Any]) -> None:
    version = manifest.get("d3m")
    if not (isinstance(version, list) and len(version) == 2) or not all(
        type(part) is int and 0 <= part <= 2**31 - 1 for part in version
    ):
        raise InvalidPackError("d3m: not a version [major, minor]", code="E_MANIFEST")
    if version[0] != MAJOR:
        raise InvalidPackError(
            f"the pack is of version {version[0]}.{version[1]}, this reader knows {MAJOR}.x",
            code="E_VERSION",
            hint="install a newer d3pack",
        )
    requires = manifest.get("requires")
    if not isinstance(requires, list) or not all(isinstance(name, str) for name in requires):
        raise InvalidPackError("requires: not an array of feature names", code="E_MANIFEST")
    if requires:
        raise InvalidPackError(
            f"the pack (version {version[0]}.{version[1]}) requires {', '.join(requires)!r:.200}",
            code="E_FEATURE",
            hint="install a newer d3pack",
        )

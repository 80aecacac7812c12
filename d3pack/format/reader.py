"""The strict reader. Checks run in the specification's order: the first broken rule is named."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from d3pack.errors import InvalidPackError, NotFoundError, UsageError
from d3pack.format import canonical, container, rules
from d3pack.format.coded import EMPTY, Array, Coded
from d3pack.format.pack import (
    DEFAULTS,
    MAJOR,
    Pack,
    Probes,
    manifest_root,
    spelled_defaults,
)
from d3pack.format.recipe import Recipe

Source = str | os.PathLike[str] | bytes | bytearray | memoryview

MAX_CLASSES = 2**20
MAX_IMAGES = 2**24
REQUIRED = {"d3m", "classes", "images_per_class", "recipe", "sections", "root"}
FIELDS = REQUIRED | set(DEFAULTS)
_SEED = re.compile(r"[0-9a-f]{16}")
_FEATURE = re.compile(r"[a-z][a-z0-9-]{0,31}")
_DAMAGED = "the file is damaged: fetch it again"


@dataclass(frozen=True, slots=True)
class Header:
    """Everything before the data, checked: the manifest, and where each section lies."""

    manifest: Mapping[str, Any]  # as it stands in the file
    recipe: Recipe
    placement: container.Placement
    data: int  # where the data begin

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.data + self.placement.size

    @property
    def rows(self) -> int:
        """Where the rows of the classes begin."""
        return self.data + self.placement.shared

    @property
    def images(self) -> int:
        """Number of images of each class."""
        return int(self.manifest["images_per_class"])

    @property
    def seed(self) -> int:
        """The seed of the noise."""
        return int(self.manifest.get("seed", DEFAULTS["seed"]), 16)

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Where the pack comes from."""
        value: Mapping[str, Any] = self.manifest.get("provenance", EMPTY)
        return value

    @property
    def optional(self) -> Mapping[str, Any]:
        """Features that may be ignored."""
        value: Mapping[str, Any] = self.manifest.get("optional", EMPTY)
        return value

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.manifest["classes"])

    @property
    def root(self) -> str:
        """The identity of the pack."""
        return str(self.manifest["root"])

    def part(self, name: str) -> container.Part:
        """Return where a section lies."""
        return next(part for part in self.placement.parts if part.name == name)

    def check_size(self, size: int) -> None:
        """Raise `InvalidPackError` unless the file has exactly the bytes that the header names."""
        if size < self.size:
            raise InvalidPackError(
                f"the file has {size} bytes, its header says {self.size}",
                code="E_TRUNCATED",
                hint="fetch it again",
            )
        if size > self.size:
            raise InvalidPackError(f"{size - self.size} bytes after the data", code="E_TRAILING")


def read(source: Source) -> Pack:
    """Read a pack; every rule of the format and every hash is checked.

    Args:
        source: path of a .d3m file, or its bytes.

    Returns:
        The pack. It cannot change, and needs the file no more.

    Raises:
        InvalidPackError: a rule is broken; `code` says which, see section 11 of the format.
        NotFoundError: there is no file at the path, or it cannot be read.
        UsageError: it is not a regular file.

    Example:
        >>> import d3pack
        >>> pack = d3pack.read("cifar10.d3m")
        >>> pack.classes[:3], len(pack)
        (('airplane', 'automobile', 'bird'), 100)
        >>> d3pack.read(b"no pack")
        Traceback (most recent call last):
        d3pack.errors.InvalidPackError: [E_TRUNCATED] ...
    """
    if not isinstance(source, (bytes, bytearray, memoryview)):
        return read_file(source)[0]
    data = bytes(source)
    header = read_header(data)
    header.check_size(len(data))
    return _checked(header, data)


def read_file(path: str | os.PathLike[str]) -> tuple[Pack, bytes]:
    """Read a pack as `read` does; return the bytes that were checked, too."""
    header, data = _load(path)
    return _checked(header, data), data


def _checked(header: Header, data: bytes) -> Pack:
    """Return the pack of a whole file; every hash and every value is checked."""
    view, placement = memoryview(data), header.placement
    shared = view[header.data : header.rows]
    rows = np.frombuffer(view[header.rows :], np.uint8).reshape(placement.classes, placement.row)
    for part in placement.parts:
        if part.digest:
            part.check_hash(shared[part.shared])
    _check_leaves(placement, shared, rows)
    sections = {
        part.name: part.decode(shared[part.shared], rows[:, part.row]) for part in placement.parts
    }
    names = rules.decode_names(sections["classes"], header.classes)
    rules.check_values(sections, names, header.images)
    return build_pack(header, names, sections)


def _load(path: str | os.PathLike[str]) -> tuple[Header, bytes]:
    """Return the header and all bytes of a regular file.

    The file is read once, not mapped: a mapped file could change after it was checked. The header
    comes first, so that a file of another length is refused before it takes memory.
    """
    try:
        with open(path, "rb", opener=_open_regular) as file:
            size = os.fstat(file.fileno()).st_size
            first = file.read(8)
            first += file.read(min(int.from_bytes(first, "little"), container.MAX_HEADER))
            header = read_header(first)
            header.check_size(size)
            data = first + file.read(header.size - len(first))
            header.check_size(len(data))
            return header, data
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise NotFoundError(f"{os.fspath(path)}: {error.strerror}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise NotFoundError(f"{os.fspath(path)!r}: {reason}") from None


def _open_regular(path: str, flags: int) -> int:
    """Open a regular file; a pipe is refused without waiting for its writer."""
    fd = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise UsageError(f"{path} is not a regular file", hint="expected a .d3m file")


def header_length(first: bytes) -> int:
    """Return the bytes before the data, from the first 8 bytes of a file."""
    if len(first) < 8:
        raise InvalidPackError(
            f"{len(first)} bytes, a pack begins with 8 bytes of header length", code="E_TRUNCATED"
        )
    length = int.from_bytes(first[:8], "little")
    if length > container.MAX_HEADER:
        raise InvalidPackError(
            f"a header of {length} bytes, at most {container.MAX_HEADER}",
            code="E_LIMIT",
            hint="is this a .d3m file?",
        )
    return 8 + length


def read_header(data: bytes) -> Header:
    """Check everything up to the data; `data` may be the beginning of a file."""
    end = header_length(data)
    if end > len(data):
        raise InvalidPackError(
            f"a header of {end - 8} bytes in {len(data)} bytes", code="E_TRUNCATED"
        )
    manifest, text = _parse_manifest(data[8:end])
    recipe, placement = _check_manifest(manifest, text)
    if data[:end] != container.build_header(text, placement):
        raise InvalidPackError(
            "the header is not the one that its manifest determines", code="E_CANON"
        )
    return Header(canonical.freeze(manifest), recipe, placement, end)


def _check_leaves(placement: container.Placement, shared: memoryview, rows: Array) -> None:
    stored = next(part.shared for part in placement.parts if part.name == "leaves")
    leaves = b"".join(container.hash_rows(rows))
    if leaves != shared[stored]:
        size = container.LEAF
        both = (np.frombuffer(one, np.uint8).reshape(-1, size) for one in (leaves, shared[stored]))
        row = int(np.argmax(np.not_equal(*both).any(axis=1)))
        raise InvalidPackError(f"class {row} does not match its leaf hash", code="E_LEAF")


def build_pack(header: Header, names: tuple[str, ...], sections: Mapping[str, Coded]) -> Pack:
    """Return the pack of checked sections, under the manifest of the file."""
    probes = sections.get("probes")
    pack = Pack(
        classes=names,
        images_per_class=header.images,
        recipe=header.recipe,
        prompts=sections.get("prompts"),
        seed=header.seed,
        unconditional=sections.get("unconditional"),
        codes=sections.get("codes"),
        picks=sections.get("picks"),
        labels=sections.get("labels"),
        weights=sections.get("weights"),
        adapter=sections.get("adapter"),
        probes=Probes(**probes.tensors) if probes else None,
        provenance=header.provenance,
        ids=sections["ids"].tensors["ids"] if "ids" in sections else None,
        optional=header.optional,
        extensions={name: part for name, part in sections.items() if name not in container.KNOWN},
        minor=header.manifest["d3m"][1],
    )
    object.__setattr__(pack, "_manifest", header.manifest)
    return pack


def _parse_manifest(raw: bytes) -> tuple[dict[str, Any], str]:
    """Return the manifest, and its text, from the JSON of the header."""
    if not raw.startswith(b"{") or not raw.isascii():
        raise InvalidPackError(
            "the header does not begin with { or is not ASCII",
            code="E_HEADER",
            hint="is this a .d3m file?",
        )
    marks = sum(map(raw.count, (b",", b"[", b"{")))
    if marks > container.MAX_MARKS:
        raise InvalidPackError(
            f"a header of {marks} commas, [ and {{, at most {container.MAX_MARKS}", code="E_LIMIT"
        )
    outer = canonical.loads(raw.decode("ascii"), "header")
    meta = outer.get("__metadata__")
    if not isinstance(meta, dict) or list(meta) != ["d3m"] or not isinstance(meta["d3m"], str):
        raise InvalidPackError(
            "the header has no __metadata__ with one d3m entry",
            code="E_HEADER",
            hint="this may be a safetensors file, but it is not a pack",
        )
    text = meta["d3m"]
    if not text.isascii():
        raise InvalidPackError("manifest: not ASCII", code="E_JSON")
    manifest = canonical.loads(text, "manifest")
    if not isinstance(manifest, dict):
        raise InvalidPackError("the manifest is not an object", code="E_MANIFEST")
    return manifest, text


def _check_manifest(manifest: dict[str, Any], text: str) -> tuple[Recipe, container.Placement]:
    _check_version(manifest)
    if canonical.dumps_plain(manifest) != text:
        raise InvalidPackError("the manifest is not in canonical form", code="E_CANON")
    for name in spelled_defaults(manifest):
        raise InvalidPackError(f"{name} has its default and must be left out", code="E_CANON")
    _check_fields(manifest)
    if manifest["root"] != manifest_root(manifest):
        raise InvalidPackError("root is not the hash of the manifest", code="E_ROOT", hint=_DAMAGED)
    recipe = Recipe.from_json(manifest["recipe"])
    classes, images = manifest["classes"], manifest["images_per_class"]
    rules.check_total(classes, images)
    optional = manifest.get("optional", {})
    return recipe, container.place_sections(manifest["sections"], classes, images, optional)


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
    requires = manifest.get("requires", [])
    if not isinstance(requires, list) or not all(isinstance(name, str) for name in requires):
        raise InvalidPackError("requires: not an array of feature names", code="E_MANIFEST")
    if requires:
        raise InvalidPackError(
            f"the pack (version {version[0]}.{version[1]}) requires {', '.join(requires)!r:.200}",
            code="E_FEATURE",
            hint="install a newer d3pack",
        )


def _check_fields(manifest: dict[str, Any]) -> None:
    """Refuse fields of the manifest that are missing, unknown or of a wrong type."""
    for name in sorted((set(manifest) - FIELDS) | (REQUIRED - set(manifest))):
        raise InvalidPackError(
            f"{name}: {'unknown field' if name in manifest else 'missing'}", code="E_MANIFEST"
        )
    optional = manifest.get("optional", {})
    if not isinstance(optional, dict) or not all(map(_FEATURE.fullmatch, optional)):
        raise InvalidPackError("optional: not an object of feature names", code="E_MANIFEST")
    if not isinstance(manifest.get("provenance", {}), dict):
        raise InvalidPackError("provenance: not an object", code="E_MANIFEST")
    seed = manifest.get("seed", DEFAULTS["seed"])
    if not isinstance(seed, str) or not _SEED.fullmatch(seed):
        raise InvalidPackError("seed: not 16 hex digits", code="E_MANIFEST")
    for name, limit in (("classes", MAX_CLASSES), ("images_per_class", MAX_IMAGES)):
        if type(manifest[name]) is not int:
            raise InvalidPackError(f"{name}: not an integer", code="E_MANIFEST")
        if not 1 <= manifest[name] <= limit:
            raise InvalidPackError(
                f"{name}: {manifest[name]}, must be 1 to {limit}", code="E_LIMIT"
            )

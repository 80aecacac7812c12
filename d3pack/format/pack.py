"""The values a `.d3m` file holds. Immutable: every operation gives a new Pack."""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from d3pack.errors import UsageError
from d3pack.format import container
from d3pack.format.canonical import FrozenDict, dumps, freeze, spell, to_plain
from d3pack.format.codecs.labels import first_labels, restrict_labels
from d3pack.format.codecs.picks import decode_picks, first_picks
from d3pack.format.coded import EMPTY, Array, Coded, frozen
from d3pack.format.recipe import Recipe

__all__ = ["Array", "Coded", "Ledger", "Pack", "Probes"]

MAJOR, MINOR = 1, 0
EMBEDDED = "backbone"  # the optional feature, and its section, of a pack that carries its backbone


@dataclass(frozen=True, slots=True, eq=False)
class Probes:
    """Small reference images rebuilt by `verify --decode`."""

    images: Array  # uint8 (P, 3, h, w)
    labels: Array  # uint32 (P,) class of each
    indices: Array  # uint32 (P,) image index within the class

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", frozen(self.images))
        object.__setattr__(self, "labels", _unsigned(self.labels, "probe labels"))
        object.__setattr__(self, "indices", _unsigned(self.indices, "probe indices"))

    def __reduce__(self) -> tuple[Any, ...]:
        return Probes, (self.images, self.labels, self.indices)


@dataclass(frozen=True, slots=True)
class Ledger:
    """Where the bytes are. `sections` adds up to the size of the file."""

    sections: Mapping[str, int]
    classes: int
    images: int
    backbone: int  # bytes of the locked backbone files, which travel once for all packs
    teacher: int | None  # bytes of the teacher, when the provenance records them

    @property
    def total(self) -> int:
        """Bytes of the file."""
        return sum(self.sections.values())

    @property
    def per_class(self) -> float:
        """Bytes of the file for each class."""
        return self.total / self.classes

    @property
    def per_image(self) -> float:
        """Bytes of the file for each image."""
        return self.total / self.images

    @property
    def everything(self) -> int:
        """File, backbone and teacher: what must be at hand if nothing is there yet."""
        return self.total + self.backbone + (self.teacher or 0)


@dataclass(frozen=True, slots=True, eq=False)
class Pack:
    """A dataset as a recipe."""

    classes: tuple[str, ...]
    images_per_class: int
    recipe: Recipe
    prompts: Coded  # decodes to float32 (C, m, k, D); image i uses mode i mod m
    seed: int  # 64 bit; keys the noise of every image
    picks: Coded | None = None  # decodes to the candidate that image i of class c is: (C, n)
    labels: Coded | None = None  # decodes to float32 (C, n, C)
    adapter: Coded | None = None  # named tensors that tune the backbone
    probes: Probes | None = None
    provenance: Mapping[str, Any] = field(default_factory=lambda: EMPTY)
    ids: Array | None = None  # uint32 (C,): the class word of the noise counter; None: 0, 1, 2, ...
    optional: Mapping[str, Any] = field(default_factory=lambda: EMPTY)  # features of newer minors
    extensions: Mapping[str, Coded] = field(default_factory=lambda: EMPTY)  # and their sections
    minor: int = MINOR
    _manifest: FrozenDict | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "classes", tuple(map(str, self.classes)))
        put(self, "images_per_class", int(self.images_per_class))
        put(self, "seed", int(self.seed))
        if not 0 <= self.seed < 2**64:
            raise UsageError(f"seed {self.seed} is not an unsigned 64-bit integer")
        if self.ids is not None:
            put(self, "ids", _unsigned(self.ids, "class ids"))
        for name in ("provenance", "optional"):
            put(self, name, freeze(to_plain(getattr(self, name))))
        put(self, "extensions", FrozenDict(self.extensions))

    def __reduce__(self) -> tuple[Any, ...]:
        return Pack, tuple(getattr(self, item.name) for item in fields(self) if item.init)

    def __eq__(self, other: object) -> bool:
        return self.root == other.root if isinstance(other, Pack) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.root)

    def __len__(self) -> int:
        """Images of the dataset."""
        return len(self.classes) * self.images_per_class

    @property
    def root(self) -> str:
        """The identity: SHA-256 over the manifest, which holds the hash of every tensor."""
        return str(self.manifest["root"])

    @property
    def manifest(self) -> Mapping[str, Any]:
        """The manifest as it stands in the file."""
        if self._manifest is None:
            value = to_plain({
                "d3m": [MAJOR, self.minor],
                "requires": [],
                "optional": self.optional,
                "classes": len(self.classes),
                "images_per_class": self.images_per_class,
                "seed": f"{self.seed:016x}",
                "recipe": self.recipe.to_json(),
                "provenance": self.provenance,
                "sections": container.entries(self.sections()),
            })  # fmt: skip
            value["root"] = manifest_root(value)
            object.__setattr__(self, "_manifest", freeze(value))
        assert self._manifest is not None
        return self._manifest

    def sections(self) -> dict[str, Coded]:
        """Everything that is stored as tensors, in file order."""
        text = np.frombuffer("\n".join(self.classes).encode("utf-8", "surrogatepass"), np.uint8)
        out: dict[str, Coded] = {}
        if self.ids is not None:
            out["ids"] = Coded("u32", {"ids": self.ids})
        out["prompts"] = self.prompts
        if self.picks is not None:
            out["picks"] = self.picks
        if self.labels is not None:
            out["labels"] = self.labels
        if self.adapter is not None:
            out["adapter"] = self.adapter
        if self.probes is not None:
            names = ("images", "labels", "indices")
            tensors = {name: getattr(self.probes, name) for name in names}
            out["probes"] = Coded("u8", tensors, shared=frozenset(names))
        out |= {name: self.extensions[name] for name in sorted(self.extensions)}
        for name, coded in out.items():
            for tensor, array in coded.tensors.items():
                if tensor not in coded.shared and array.shape[:1] != (len(self.classes),):
                    raise UsageError(
                        f"{name}.{tensor} has shape {array.shape}",
                        hint=f"the first dimension must be the {len(self.classes)} classes",
                    )
        leaf = container.leaves(out.values(), len(self.classes))
        return {
            "classes": Coded("utf8", {"text": text}, shared=frozenset({"text"})),
            "leaves": Coded("sha256-128", {"hash": leaf}, shared=frozenset({"hash"})),
            **out,
        }

    def counters(self, classes: Any, images: Any) -> tuple[Array, Array]:
        """The class and image words of the noise counter for images `images` of classes `classes`.

        Selected classes keep the id that they had, curated images the candidate that was chosen.
        """
        rows, columns = np.asarray(classes, dtype=np.int64), np.asarray(images, dtype=np.int64)
        words = rows if self.ids is None else self.ids[rows].astype(np.int64)
        if self.picks is None:
            return words, columns
        wanted, place = np.unique(rows, return_inverse=True)
        return words, decode_picks(self.picks.take(wanted))[place.reshape(rows.shape), columns]

    def select(self, classes: Sequence[int | str]) -> Pack:
        """Some classes, in the given order, by index or name; their images stay the same.

        Soft labels become distributions over the classes that are left (`restrict_labels`).
        Features of newer minors are dropped: what they say may not hold for a part. A backbone that
        the pack carries stays.
        """
        rows = self._rows(classes)
        if rows == list(range(len(self.classes))):
            return self
        take = np.array(rows)
        ids = take if self.ids is None else self.ids[take]
        return replace(
            self._part({"select": len(rows)}),
            classes=tuple(self.classes[row] for row in rows),
            ids=None if np.array_equal(ids, np.arange(len(rows))) else ids,
            prompts=self.prompts.take(take),
            picks=None if self.picks is None else self.picks.take(take),
            labels=None if self.labels is None else restrict_labels(self.labels, take, take),
            probes=self._probes({row: new for new, row in enumerate(rows)}, self.images_per_class),
        )

    def first(self, k: int) -> Pack:
        """The first k images of every class: the best k, as the encoder chose them."""
        k = _whole(k, "a number of images")
        if not 1 <= k <= self.images_per_class:
            raise UsageError(f"first({k}): the pack has {self.images_per_class} images per class")
        if k == self.images_per_class:
            return self
        return replace(
            self._part({"first": k}),
            images_per_class=k,
            picks=None if self.picks is None else first_picks(self.picks, k),
            labels=None if self.labels is None else first_labels(self.labels, k),
            probes=self._probes({row: row for row in range(len(self.classes))}, k),
        )

    def ledger(self) -> Ledger:
        """Bytes per section, per class and per image, and what is needed beside the file."""
        manifest = self.manifest
        placed = container.slots(to_plain(manifest["sections"]), len(self.classes))
        sections = {"container": len(container.header(dumps(manifest), placed)) + placed[-1].stop}
        for slot in placed:
            if slot.section != "leaves":
                nbytes = slot.stop - slot.start
                sections[slot.section] = sections.get(slot.section, 0) + nbytes
                sections["container"] -= nbytes
        for name in ("recipe", "provenance", "optional"):
            if manifest[name]:
                nbytes = len(json.dumps(dumps(manifest[name]))) - 2  # as it stands in the header
                sections[name] = sections.get(name, 0) + nbytes  # a newer section may be called so
                sections["container"] -= nbytes
        teacher = self.provenance.get("teacher")
        weight = teacher.get("bytes") if isinstance(teacher, Mapping) else None
        return Ledger(
            sections=FrozenDict(sections),
            classes=len(self.classes),
            images=len(self),
            backbone=0 if EMBEDDED in self.extensions else self.recipe.backbone.nbytes,
            teacher=weight if type(weight) is int and weight >= 0 else None,
        )

    def _rows(self, classes: Sequence[int | str]) -> list[int]:
        place = {name: row for row, name in enumerate(self.classes)}
        rows = []
        for wanted in classes:
            row = place.get(wanted, -1) if isinstance(wanted, str) else _whole(wanted, "a class")
            if not 0 <= row < len(self.classes):
                raise UsageError(f"the pack has no class {wanted!r}")
            rows.append(row)
        if not rows or len(set(rows)) != len(rows):
            raise UsageError("select() needs classes, none of them twice")
        return rows

    def _part(self, what: dict[str, int]) -> Pack:
        """This pack, ready to lose something: it says where it comes from."""
        provenance = derived(self.provenance, self.root, what)
        kept = {EMBEDDED} & set(self.extensions)
        return replace(
            self,
            provenance=provenance,
            optional={name: self.optional[name] for name in kept},
            extensions={name: self.extensions[name] for name in kept},
            minor=MINOR,
        )

    def _probes(self, rows: Mapping[int, int], images: int) -> Probes | None:
        if self.probes is None:
            return None
        labels, indices = self.probes.labels.tolist(), self.probes.indices.tolist()
        keep = [i for i, row in enumerate(labels) if row in rows and indices[i] < images]
        if not keep:
            return None
        return Probes(
            self.probes.images[keep],
            np.array([rows[labels[i]] for i in keep]),
            self.probes.indices[keep],
        )


def manifest_root(manifest: Mapping[str, Any]) -> str:
    """SHA-256 over the canonical manifest without its `root`."""
    rest = {name: value for name, value in manifest.items() if name != "root"}
    return hashlib.sha256(spell(rest).encode("ascii")).hexdigest()


def derived(provenance: Mapping[str, Any], root: str, what: dict[str, int]) -> dict[str, Any]:
    """Provenance of a part: the identity of the pack that it was taken from, and what was taken."""
    before = provenance.get("derived", ())
    step = {"from": root, **what}
    return {**provenance, "derived": [*before, step] if isinstance(before, tuple) else [step]}


def _whole(value: Any, what: str) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise UsageError(f"{value!r:.80} is not {what}")
    return operator.index(value)


def _unsigned(array: Any, what: str) -> Array:
    wide = np.asarray(array)
    if wide.dtype.kind not in "iu" or (
        wide.size and not 0 <= int(wide.min()) <= int(wide.max()) < 2**32
    ):
        raise UsageError(f"{what} are not unsigned 32-bit integers")
    return frozen(wide.astype(np.uint32))

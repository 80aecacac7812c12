"""The values that a `.d3m` file holds. Immutable: every operation returns a new Pack."""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from d3pack.errors import BackboneChangedError, InvalidPackError, UsageError
from d3pack.format import canonical, container
from d3pack.format.canonical import FrozenDict, drop_defaults, dumps, dumps_plain, freeze, to_plain
from d3pack.format.codecs.codes import first_codes
from d3pack.format.codecs.files import decode_files
from d3pack.format.codecs.labels import first_labels, restrict_labels
from d3pack.format.codecs.picks import decode_picks, first_picks
from d3pack.format.codecs.weights import part_of_weights
from d3pack.format.coded import EMPTY, Array, Coded, freeze_array
from d3pack.format.recipe import DEFAULTS as RECIPE_DEFAULTS
from d3pack.format.recipe import Recipe, backbone_defaults, lock_of, parse_files
from d3pack.system import count

MAJOR, MINOR = 1, 0
# A field with its default is left out of the manifest.
DEFAULTS: Mapping[str, Any] = {"optional": {}, "provenance": {}, "requires": [], "seed": "0" * 16}
EMBEDDED = "backbone"  # the optional feature of a carried backbone, and its section


@dataclass(frozen=True, slots=True, eq=False)
class Probes:
    """Small reference images, which `verify --decode` rebuilds and compares."""

    images: Array  # uint8 (P, 3, h, w)
    labels: Array  # uint32 (P,): class of each
    indices: Array  # uint32 (P,): its number within the class

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", freeze_array(self.images))
        object.__setattr__(self, "labels", _to_uint32(self.labels, "probe labels"))
        object.__setattr__(self, "indices", _to_uint32(self.indices, "probe indices"))

    def pairs(self) -> list[tuple[int, int]]:
        """Return the class of each, and its number within the class."""
        return list(zip(self.labels.tolist(), self.indices.tolist(), strict=True))

    def __reduce__(self) -> tuple[Any, ...]:
        return Probes, (self.images, self.labels, self.indices)


@dataclass(frozen=True, slots=True)
class Ledger:
    """What the bytes of a pack are spent on. `sections` adds up to the size of the file."""

    sections: Mapping[str, int]
    classes: int
    images: int
    backbone: int  # bytes of the locked backbone files that are not in the pack
    teacher: int | None  # bytes of the teacher, where the provenance records them

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
        """Bytes of file, backbone and teacher together."""
        return self.total + self.backbone + (self.teacher or 0)


@dataclass(frozen=True, slots=True, eq=False)
class Pack:
    """A dataset as a recipe: learned prompts, seeds, and how a backbone makes images of them.

    A pack cannot change, pickles, and equals a pack with the same `root`. Its length is the number
    of images.

    Attributes:
        classes: names of the C classes.
        images_per_class: n. The first k images of a class are its best k.
        recipe: the backbone and how it is used.
        prompts: decodes to float32 (C, m, k, D). The i-th seeded image uses mode i mod m. None
            where all images are made of codes without prompts.
        unconditional: decodes to float32 (1, 1, k, D), the vectors of no class, for guidance; None:
            those of the empty text or, where the recipe has no template, zeros.
        seed: 64 bits, the key of the noise of every image.
        codes: decodes to `Codes`: single images as choices among noise. They come before those
            that are made of seeds.
        picks: the candidate that each seeded image is, (C, n) or less by those of codes; None:
            the i-th one is candidate i.
        labels: decodes to float32 (C, n, C), the soft labels.
        weights: decodes to float32 (C, n), how much each image counts in the loss of a training;
            None: all the same.
        adapter: named tensors that tune the backbone.
        probes: reference images, by which a decoder is verified.
        provenance: where the pack comes from, for people.
        ids: uint32 (C,), the class word of the noise counter; None: 0, 1, 2, ...
        optional: features of newer minor versions, and a carried backbone.
        extensions: sections of those features.
        minor: minor version of the format.

    Example:
        >>> import d3pack
        >>> pack = d3pack.read("cifar10.d3m")
        >>> pack.images_per_class, len(pack)
        (10, 100)
        >>> part = pack.select(["cat", "dog"]).first(5)
        >>> part.classes, len(part)
        (('cat', 'dog'), 10)
        >>> sum(pack.ledger().sections.values()) == len(d3pack.pack_bytes(pack))
        True
    """

    classes: tuple[str, ...]
    images_per_class: int
    recipe: Recipe
    prompts: Coded | None
    seed: int
    unconditional: Coded | None = None
    codes: Coded | None = None
    picks: Coded | None = None
    labels: Coded | None = None
    weights: Coded | None = None
    adapter: Coded | None = None
    probes: Probes | None = None
    provenance: Mapping[str, Any] = field(default_factory=lambda: EMPTY)
    ids: Array | None = None
    optional: Mapping[str, Any] = field(default_factory=lambda: EMPTY)
    extensions: Mapping[str, Coded] = field(default_factory=lambda: EMPTY)
    minor: int = MINOR
    _manifest: FrozenDict | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "classes", tuple(map(str, self.classes)))
        put(self, "images_per_class", int(self.images_per_class))
        put(self, "seed", int(self.seed))
        if not 0 <= self.seed < 2**64:
            raise UsageError(f"invalid seed {self.seed}: expected an unsigned 64-bit integer")
        if self.ids is not None:
            put(self, "ids", _to_uint32(self.ids, "class ids"))
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
        return len(self.classes) * self.images_per_class

    @property
    def root(self) -> str:
        """The identity: SHA-256 of the manifest, which holds the hash of every tensor."""
        return str(self.manifest["root"])

    @property
    def manifest(self) -> Mapping[str, Any]:
        """The manifest as it stands in the file: fields that have their default are left out."""
        if self._manifest is None:
            classes, images = len(self.classes), self.images_per_class
            manifest = to_plain({
                "d3m": [MAJOR, self.minor],
                "optional": self.optional,
                "classes": classes,
                "images_per_class": images,
                "seed": f"{self.seed:016x}",
                "recipe": self.recipe.to_json(),
                "provenance": self.provenance,
                "sections": container.describe_sections(self.sections(), classes, images),
            })  # fmt: skip
            manifest = without_defaults(manifest)
            manifest["root"] = manifest_root(manifest)
            object.__setattr__(self, "_manifest", freeze(manifest))
        assert self._manifest is not None
        return self._manifest

    def placement(self) -> container.Placement:
        """Return where every section lies in the file."""
        return container.place_sections(
            to_plain(self.manifest["sections"]),
            len(self.classes),
            self.images_per_class,
            self.optional,
        )

    def sections(self) -> dict[str, Coded]:
        """Return everything that is stored as tensors, in file order."""
        sections: dict[str, Coded | None] = {
            "ids": None if self.ids is None else Coded("u32", {"ids": self.ids}),
            "prompts": self.prompts,
            "unconditional": self.unconditional,
            "codes": self.codes,
            "picks": self.picks,
            "labels": self.labels,
            "weights": self.weights,
            "adapter": self.adapter,
        }
        if self.probes is not None:
            names = ("images", "labels", "indices")
            tensors = {name: getattr(self.probes, name) for name in names}
            if self.probes.images.ndim != 4:
                raise UsageError(
                    f"the probes have shape {self.probes.images.shape}",
                    hint="expected (probes, 3, height, width)",
                )
            images, _, height, width = self.probes.images.shape
            params = {"shape": [images, height, width]}
            sections["probes"] = Coded("u8", tensors, params, frozenset(names))
        sections |= {name: self.extensions[name] for name in sorted(self.extensions)}
        present = {name: coded for name, coded in sections.items() if coded is not None}
        for name, coded in present.items():
            for tensor, array in coded.tensors.items():
                if 0 in (array.ndim, array.size):
                    raise InvalidPackError(
                        f"{name}.{tensor} has shape {array.shape}: expected values", code="E_CODEC"
                    )
                if tensor not in coded.shared and array.shape[:1] != (len(self.classes),):
                    raise UsageError(
                        f"{name}.{tensor} has shape {array.shape}",
                        hint=f"the first dimension must be the {len(self.classes)} classes",
                    )
        if not all(self.classes):
            raise InvalidPackError("a class name is empty", code="E_NAME")
        text = np.frombuffer("\n".join(self.classes).encode("utf-8", "surrogatepass"), np.uint8)
        leaves = container.compute_leaves(present.values(), len(self.classes))
        return {
            "classes": Coded("utf8", {"text": text}, {"bytes": text.size}, frozenset({"text"})),
            "leaves": Coded("sha256-128", {"hash": leaves}, shared=frozenset({"hash"})),
            **present,
        }

    @property
    def coded_images(self) -> int:
        """Images of a class that are made of codes: the first ones."""
        return 0 if self.codes is None else int(self.codes.params["images"])

    @property
    def all_coded(self) -> bool:
        """Whether every image is made of a code, and none of a seed."""
        return self.coded_images == self.images_per_class

    @property
    def holds_photographs(self) -> bool:
        """Whether codes are those of photographs; the method `modes` codes images that it makes."""
        return self.codes is not None and self.provenance.get("method") != "modes"

    @property
    def sampling(self) -> str:
        """How its images are sampled, for a person."""
        recipe = self.recipe
        steps = count(len(recipe.sigmas) - 1, "step")
        seeds = f"{recipe.sampler}, {steps}, guidance {recipe.guidance:g}"
        if self.codes is None:
            return seeds
        levels = f"codes of {len(self.codes.params['atoms'])} levels"
        return levels if self.all_coded else f"{seeds}; {levels}"

    def counters(self, classes: Any, images: Any) -> tuple[Array, Array]:
        """Return the class and image words of the noise counter for images of classes.

        Classes of a selection keep the id that they had. A picked image has its candidate's number,
        a coded one its own.
        """
        rows, columns = np.asarray(classes, dtype=np.int64), np.asarray(images, dtype=np.int64)
        words = rows if self.ids is None else self.ids[rows].astype(np.int64)
        seeded = columns - self.coded_images
        if self.picks is None:
            return words, np.where(seeded < 0, columns, seeded)
        unique, place = np.unique(rows, return_inverse=True)
        picks = decode_picks(self.picks.take(unique))
        chosen = picks[place.reshape(rows.shape), np.maximum(seeded, 0)]
        return words, np.where(seeded < 0, columns, chosen)

    def modes(self, images: Any) -> Array:
        """Return which of the prompts of its class each image uses."""
        columns = np.asarray(images, dtype=np.int64)
        prompts = 1 if self.prompts is None else self.prompts.params["shape"][0]
        seeded = columns - self.coded_images
        own = columns if self.codes is None else columns % self.codes.params["codes"]
        modes: Array = np.where(seeded < 0, own, seeded) % prompts
        return modes

    def select(self, classes: Sequence[int | str]) -> Pack:
        """Return a pack of some classes, whose images stay the same.

        Soft labels become distributions over the classes that are left. Features of newer minor
        versions are dropped, because they may not hold for a part; a carried backbone stays.

        Args:
            classes: names or numbers, in the order of the new pack.

        Raises:
            UsageError: a class is unknown or given twice, or there is none.
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
            prompts=None if self.prompts is None else self.prompts.take(take),
            codes=None if self.codes is None else self.codes.take(take),
            picks=None if self.picks is None else self.picks.take(take),
            labels=None if self.labels is None else restrict_labels(self.labels, take, take),
            weights=None if self.weights is None else part_of_weights(self.weights, take),
            probes=self._probes({row: new for new, row in enumerate(rows)}, self.images_per_class),
        )

    def first(self, k: int) -> Pack:
        """Return a pack of the first k images of every class: its best k.

        Args:
            k: from 1 to `images_per_class`.

        Raises:
            UsageError: the pack has fewer images.
        """
        k = to_index(k, "a number of images")
        if not 1 <= k <= self.images_per_class:
            raise UsageError(f"first({k}): the pack has {self.images_per_class} images per class")
        if k == self.images_per_class:
            return self
        seeded = k - self.coded_images
        unused = self.codes is not None and seeded <= 0 and not self.codes.params["prompts"]
        return replace(
            self._part({"first": k}),
            images_per_class=k,
            prompts=None if unused else self.prompts,
            codes=None if self.codes is None else first_codes(self.codes, k),
            picks=first_picks(self.picks, seeded) if self.picks and seeded > 0 else None,
            labels=None if self.labels is None else first_labels(self.labels, k),
            weights=None if self.weights is None else part_of_weights(self.weights, images=k),
            probes=self._probes({row: row for row in range(len(self.classes))}, k),
        )

    def ledger(self) -> Ledger:
        """Return what the bytes of the file are spent on, and what is needed besides the file."""
        manifest = self.manifest
        placement = self.placement()
        total = len(container.build_header(dumps(manifest), placement)) + placement.size
        parts = [
            (part.name, _length(part.shared) + len(self.classes) * _length(part.row))
            for part in placement.parts
            if part.name != "leaves"
        ]
        for name in ("recipe", "provenance", "optional"):
            if name in manifest:
                parts.append((name, len(json.dumps(dumps(manifest[name]))) - 2))  # in the header
        sections = {"container": total}
        for name, nbytes in parts:  # sections of newer minors may be called like these
            sections[name] = sections.get(name, 0) + nbytes
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
        check_classes(classes)
        numbers = {name: row for row, name in enumerate(self.classes)}
        rows = []
        for item in classes:
            row = numbers.get(item, -1) if isinstance(item, str) else to_index(item, "a class")
            if not 0 <= row < len(self.classes):
                raise UsageError(f"the pack has no class {item!r}")
            rows.append(row)
        if not rows or len(set(rows)) != len(rows):
            raise UsageError("select() needs classes, none of them twice")
        return rows

    def _part(self, cut: dict[str, int]) -> Pack:
        """Return this pack with a record of what is going to be cut."""
        kept = {EMBEDDED} & set(self.extensions)
        return replace(
            self,
            provenance=derived(self.provenance, self.root, cut),
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


def carried_files(pack: Pack) -> dict[str, bytes] | None:
    """Return the files of a carried backbone (section 8a); None when the pack carries none.

    `read` passes this section on unchecked, as any optional feature. A writer, a verifier and a
    decoder call this.

    Raises:
        InvalidPackError: the section does not hold files of the size that the recipe names
            (E_CODEC), or their list breaks a rule (E_RECIPE).
        BackboneChangedError: the files have another lock than the recipe says.
    """
    coded = pack.extensions.get(EMBEDDED)
    if coded is None and EMBEDDED not in pack.optional:
        return None
    if coded is None or pack.optional.get(EMBEDDED) != {}:
        raise InvalidPackError(
            "backbone: the feature must be {} and have a section of its name", code="E_CODEC"
        )
    files = decode_files(coded, pack.recipe.backbone.nbytes)
    digests = {path: [len(data), hashlib.sha256(data).hexdigest()] for path, data in files.items()}
    if lock_of(parse_files(digests, "backbone.params.files")) != pack.recipe.backbone.lock:
        raise BackboneChangedError(
            "the carried backbone is not the one that the recipe names",
            hint="the pack was not made correctly: ask its maker for another",
        )
    return files


def without_defaults(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest without the fields that have their default."""
    recipe = manifest["recipe"]
    backbone = drop_defaults(recipe["backbone"], backbone_defaults(recipe["backbone"]))
    return drop_defaults(
        {**manifest, "recipe": drop_defaults({**recipe, "backbone": backbone}, RECIPE_DEFAULTS)},
        DEFAULTS,
    )


def spelled_defaults(manifest: Mapping[str, Any]) -> list[str]:
    """Return which fields of a manifest have their default, and so must be left out."""
    recipe = manifest.get("recipe")
    backbone = recipe.get("backbone") if isinstance(recipe, dict) else None
    levels = (
        ("", manifest, DEFAULTS),
        ("recipe.", recipe, RECIPE_DEFAULTS),
        (
            "recipe.backbone.",
            backbone,
            backbone_defaults(backbone) if isinstance(backbone, dict) else {},
        ),
    )
    return [
        at + name
        for at, value, defaults in levels
        if isinstance(value, dict)
        for name in canonical.spelled_defaults(value, defaults)
    ]


def _length(span: slice) -> int:
    return int(span.stop - span.start)


def manifest_root(manifest: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the canonical manifest without its `root`."""
    rest = {name: value for name, value in manifest.items() if name != "root"}
    return hashlib.sha256(dumps_plain(rest).encode("ascii")).hexdigest()


def derived(provenance: Mapping[str, Any], root: str, cut: dict[str, int]) -> dict[str, Any]:
    """Return the provenance of a part: with the root of the pack it was cut from, and the cut."""
    before = provenance.get("derived", ())
    step = {"from": root, **cut}
    return {**provenance, "derived": [*before, step] if isinstance(before, tuple) else [step]}


def check_classes(classes: object) -> None:
    """Raise if classes are no list: each letter of a text would be one."""
    if isinstance(classes, str | bytes) or not isinstance(classes, Iterable):
        raise UsageError(
            f"invalid classes {classes!r:.80}: expected a list", hint=f"write [{classes!r:.80}]"
        )


def to_index(value: Any, expected: str) -> int:
    """Return an integer of any kind; a truth value is none."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise UsageError(f"{value!r:.80} is not {expected}")
    return operator.index(value)


def _to_uint32(array: Any, name: str) -> Array:
    wide = np.asarray(array)
    if wide.dtype.kind not in "iu" or (
        wide.size and not 0 <= int(wide.min()) <= int(wide.max()) < 2**32
    ):
        raise UsageError(f"{name} are not unsigned 32-bit integers")
    return freeze_array(wide.astype(np.uint32))

"""Decoded images as files: a tree of folders, tar shards, parquet or npz parts.

Every file is written completely or not at all, so an interrupted export goes on where it stopped. A
hidden file, `.d3pack-export.json`, says what a folder holds and is locked during an export, and in
a tree `.classes.json` names the classes. Other tools ignore both: files of images lie in the folder
alone, so that they load as a dataset.

A shard of an export writes its share of the files: of a tree, each unit is a group that is decoded
together; else it is a file. Both are the same for every number of shards.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
import time
import unicodedata
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice, tee
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from d3pack.decode.claim import CLASSES, check_new, check_space, claimed, to_json
from d3pack.decode.pairs import Pair, Pairs
from d3pack.decode.settings import ExportSettings
from d3pack.decode.tree import Tree
from d3pack.errors import UsageError
from d3pack.format.codecs import decode_labels, decode_weights
from d3pack.system import ObjectPath, Shard, replace_file, require, writing

if TYPE_CHECKING:
    from torch import Tensor

    from d3pack.decode.decoder import Decoder
    from d3pack.format import Coded, Pack

T = TypeVar("T")
Pixels = npt.NDArray[np.uint8]
Progress = Callable[[int, int], None]  # images done, images in all
_LONG_GROUP = 5.0  # seconds after which the images of a group count while they are made
_PARQUET_ROWS = 256  # of a row group
_PART = re.compile(r"part-([0-9]{5,12})-of-")
_MAX_SLUG = 48
_PLAIN = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9 '(),_-]*[A-Za-z0-9()'])?")
_TAKEN = {"con", "prn", "aux", "nul", "train", "training", "val", "valid", "validation", "test"}
_TAKEN |= {"testing", "dev"} | {f"{port}{n}" for port in ("com", "lpt") for n in range(10)}


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export did."""

    images: int  # of a shard: in its share
    decoded: int  # the others were there before
    seconds: float

    @property
    def rate(self) -> float:
        """Decoded images a second."""
        return self.decoded / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One image as it is stored in a tar or parquet file."""

    label: int
    index: int
    image: bytes
    soft_label: npt.NDArray[np.float32] | None
    weight: np.float32 | None

    @property
    def key(self) -> str:
        """Name of the image in its file, without suffix."""
        return f"{self.label:05d}_{self.index:05d}"


def export_images(
    decoder: Decoder,
    output: Path | ObjectPath,
    settings: ExportSettings | None = None,
    *,
    classes: Sequence[int] | None = None,
    images_per_class: int | None = None,
    shard: Shard | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Decode images into a folder.

    A folder that an earlier call has begun is completed: images that are there are kept. Tar,
    parquet and npz files hold labels, class names and, where the pack has them, soft labels and
    weights; a tree of folders has no place for these two.

    Shards may write into one folder from many processes and machines. They need nothing of each
    other; the same call without a shard writes what is still missing, and removes what killed
    processes left. The folder is then that of a single call.

    Args:
        decoder: of the pack.
        output: an empty folder, or that of an interrupted call; it is made where it is missing. In
            an object store each file is sent when it is complete.
        settings: layout, image format and images of one file.
        classes: their numbers; by default all.
        images_per_class: the first, which are the best; by default all.
        shard: which share to write; by default all.
        progress: called with (images done, images in all), of the share; while a group takes
            long, also with those that its steps are worth. It must not use the decoder.

    Raises:
        UsageError: the folder holds something else, images or folders that this export does not
            write, or is in use by another call without a shard or of the same one.
        NoSpaceError: the disk is full, or cannot hold so many images; what is complete is kept.
        StorageError: the object store cannot be reached, or refuses; what is complete is kept.
    """
    settings = settings or ExportSettings()
    pack = decoder.pack
    classes = range(len(pack.classes)) if classes is None else classes
    count = pack.images_per_class if images_per_class is None else images_per_class
    shard = shard or Shard()
    export = _Export(decoder, output, settings, Pairs(classes, count), shard, progress)
    started = time.perf_counter()
    check_new(output, export.images)
    with claimed(output, _mark(decoder, settings, classes, count), shard):
        decoded = export.write()
    return ExportReport(export.images, decoded, time.perf_counter() - started)


def select_classes(names: Sequence[str], selection: str | None) -> list[int]:
    """Return class numbers from "cat,dog", "0,5" or "3-7"; names come before numbers."""
    if selection is None:
        return list(range(len(names)))
    numbers = {name: index for index, name in enumerate(names)}
    if selection in numbers:  # a name may hold a comma
        return [numbers[selection]]
    chosen: set[int] = set()
    for part in (p.strip() for p in selection.split(",")):
        first, dash, last = part.partition("-")
        if part in numbers:
            chosen.add(numbers[part])
            continue
        last = last if dash else first
        is_range = first.isdecimal() and last.isdecimal()
        if not is_range or not int(first) <= int(last) < len(names):
            raise UsageError(
                f"there is no class {part!r}",
                hint=f"use names, or numbers from 0 to {len(names) - 1}",
            )
        chosen.update(range(int(first), int(last) + 1))
    return sorted(chosen)


def class_folders(names: Sequence[str]) -> list[str]:
    """Return the folder name of every class.

    They are the names themselves where all of these are safe, differ whatever their case, and sort
    as the classes do, so that readers of folders give the same labels; else numbers come first.
    """
    differ = len({name.casefold() for name in names}) == len(names)
    if differ and list(names) == sorted(names) and all(map(_is_safe, names)):
        return list(names)
    return [class_folder(c, name, len(names)) for c, name in enumerate(names)]


def _is_safe(name: str) -> bool:
    """Return whether a name can be a folder on every system, and is not taken for a split."""
    plain = _PLAIN.fullmatch(name) and len(name) <= _MAX_SLUG
    return bool(plain) and name.casefold() not in _TAKEN


def class_folder(index: int, name: str, classes: int) -> str:
    """Return a name for what belongs to a class: its number, for the order, and its name."""
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "_", ascii_name).strip("_")[:_MAX_SLUG].rstrip("_") or "class"
    return f"{index:0{max(5, len(str(classes - 1)))}d}_{slug}"


class _Export:
    """One export: what is written, how, and how much of it is done."""

    def __init__(
        self,
        decoder: Decoder,
        output: Path | ObjectPath,
        settings: ExportSettings,
        pairs: Pairs,
        shard: Shard,
        progress: Progress | None,
    ) -> None:
        self.decoder, self.output, self.settings = decoder, output, settings
        self.pairs, self.shard = pairs, shard
        self.pack = decoder.pack
        self.suffix = settings.image
        self._size = decoder.group if settings.layout == "folder" else settings.shard_size
        units = -(-len(pairs) // self._size)
        self._units = shard.share(units)
        self.images = len(self._units) * self._size  # of the share
        if units - 1 in self._units:
            self.images -= -len(pairs) % self._size
        self._progress = progress
        self._done, self._begun = 0, 0.0  # images written, and what steps are worth since then
        self._said, self._told = 0, time.monotonic()

    def write(self) -> int:
        """Write what is missing; return the number of images decoded."""
        with self.decoder.watched(self._step if self._progress else None):
            return self._write_tree() if self.settings.layout == "folder" else self._write_files()

    def _add(self, images: int) -> None:
        self._done += images
        self._begun = max(0.0, self._begun - images)
        self._tell(self._done)

    def _step(self, share: float) -> None:
        """Count a step of images that are being decoded, and tell of it where they take long."""
        self._begun += share
        if time.monotonic() - self._told > _LONG_GROUP:
            self._tell(min(self._done + int(self._begun), self.images))

    def _tell(self, images: int) -> None:
        self._said = max(self._said, images)
        if self._progress:
            self._progress(self._said, self.images)
        self._told = time.monotonic()

    def _begin(self, present: int) -> None:
        """Take note of the images that are there; refuse others for which there is no space."""
        check_space(self.output, self.images - present)
        self._add(present)

    def _write_tree(self) -> int:
        names, output = self.pack.classes, self.output
        folders = class_folders(names)
        tree = Tree(output, folders, self.suffix, self.pairs, self._units, self._size)
        self._begin(tree.present())
        replace_file(output / CLASSES, to_json(dict(zip(folders, names, strict=True))))

        def save(pair: Pair, pixels: Pixels) -> None:
            file = output / folders[pair[0]] / tree.file_name(pair[1])
            replace_file(file, _encode(pixels, self.settings))

        # of the pairs, only those are kept that are being decoded
        missing, pairs = tee(tree.missing())
        written = 0
        with _pool() as pool:
            groups = (
                [
                    pool.submit(save, *job)
                    for job in zip(islice(pairs, len(at)), _pixels(images), strict=True)
                ]
                for at, images in self.decoder.stream(missing)
            )
            for group in _one_behind(groups):
                written += len(group)
                self._add(len(group))
        return written

    def _write_files(self) -> int:
        write, suffix = {
            "webdataset": (self._write_tar, "tar"),
            "parquet": (self._write_parquet, "parquet"),
            "npz": (self._write_npz, "npz"),
        }[self.settings.layout]
        files, size = -(-len(self.pairs) // self._size), self._size

        def name(n: int) -> str:
            return f"part-{n:05d}-of-{files:05d}.{suffix}"

        names = _file_names(self.output)
        numbers = {int(match[1]) for match in map(_PART.match, names) if match}
        existing = {n for n in numbers if n in self._units and name(n) in names}
        present = sum(len(self.pairs[n * size : (n + 1) * size]) for n in existing)
        self._begin(present)
        for n in self._units:
            if n not in existing:
                with writing(self.output / name(n)) as temporary, temporary.open("wb") as file:
                    write(file, self.pairs[n * size : (n + 1) * size])
        return self.images - present

    def _samples(self, part: Pairs) -> Iterator[Sample]:
        """Decode images and yield them as they are stored."""
        encode = _raw if self.settings.layout == "npz" else _encode
        soft_labels, weights = _soft_labels(self.pack), _weights(self.pack)
        with _pool() as pool:
            groups = (
                [pool.submit(encode, pixels, self.settings) for pixels in _pixels(images)]
                for _, images in self.decoder.stream(part)
            )
            start = 0
            for images in _one_behind(groups):
                stop = start + len(images)
                for (c, i), image in zip(part[start:stop], images, strict=True):
                    yield Sample(c, i, image, soft_labels.of(c, i), weights.of(c, i))
                start = stop
                self._add(len(images))

    def _write_tar(self, file: Any, part: Pairs) -> None:
        """Write a WebDataset shard; its bytes depend on no clock.

        The members of an image have one key: `.json` with the class name and the weight, the image,
        `.cls` with the label, and `.soft_label.npy`. The name comes before the label, because
        readers that know both take the first.
        """
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for sample in self._samples(part):
                facts: dict[str, Any] = {"class_name": self.pack.classes[sample.label]}
                facts["index"] = sample.index
                if sample.weight is not None:
                    facts["weight"] = float(sample.weight)
                members = {
                    "json": json.dumps(facts).encode(),
                    self.suffix: sample.image,
                    "cls": str(sample.label).encode(),
                }
                if sample.soft_label is not None:
                    array = io.BytesIO()
                    np.save(array, sample.soft_label)
                    members["soft_label.npy"] = array.getvalue()
                for suffix, data in members.items():
                    member = tarfile.TarInfo(f"{sample.key}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))

    def _write_parquet(self, file: Any, part: Pairs) -> None:
        """Write rows as `datasets` reads them: image, label with names, index and more."""
        pa = require("pyarrow", "parquet output")
        pq = require("pyarrow.parquet", "parquet output")
        features: dict[str, Any] = {
            "image": {"_type": "Image"},
            "label": {"names": list(self.pack.classes), "_type": "ClassLabel"},
            "index": {"dtype": "int32", "_type": "Value"},
        }
        image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        fields = [("image", image), ("label", pa.int64()), ("index", pa.int32())]
        if self.pack.labels is not None:
            value = {"dtype": "float32", "_type": "Value"}
            features["soft_label"] = {"feature": value, "length": -1, "_type": "Sequence"}
            fields.append(("soft_label", pa.list_(pa.float32())))
        if self.pack.weights is not None:
            features["weight"] = {"dtype": "float32", "_type": "Value"}
            fields.append(("weight", pa.float32()))
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        schema = pa.schema(fields, metadata=metadata)
        with pq.ParquetWriter(file, schema) as writer:
            samples = self._samples(part)
            while group := list(islice(samples, _PARQUET_ROWS)):
                rows = [
                    {
                        "image": {"bytes": sample.image, "path": f"{sample.key}.{self.suffix}"},
                        "label": sample.label,
                        "index": sample.index,
                        "soft_label": sample.soft_label,
                        "weight": sample.weight,
                    }
                    for sample in group
                ]
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))

    def _write_npz(self, file: Any, part: Pairs) -> None:
        """Write `labels`, `indices`, `class_names` and `images` (N, H, W, 3).

        `soft_labels` and `weights` come with them where the pack has these.
        """
        labels, indices = np.array(list(part), dtype=np.int64).T
        names = np.array(self.pack.classes)
        arrays = {"labels": labels, "indices": indices, "class_names": names}
        if self.pack.labels is not None:
            soft_labels = _soft_labels(self.pack)
            arrays["soft_labels"] = np.stack([soft_labels.of(c, i) for c, i in part])
        if self.pack.weights is not None:
            weights = _weights(self.pack)
            arrays["weights"] = np.stack([weights.of(c, i) for c, i in part])
        date = (1980, 1, 1, 0, 0, 0)
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name, array in arrays.items():
                with archive.open(zipfile.ZipInfo(f"{name}.npy", date), "w") as member:
                    np.lib.format.write_array(member, np.ascontiguousarray(array))
            shape = (len(part), *self.pack.recipe.size, 3)
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            entry = zipfile.ZipInfo("images.npy", date)
            with archive.open(entry, "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for sample in self._samples(part):  # one by one: all may not fit into memory
                    member.write(sample.image)


class _Stored:
    """What a pack stores for images, image by image; that of one class is decoded at a time."""

    def __init__(self, coded: Coded | None, decode: Callable[[Coded], Any]) -> None:
        self._coded, self._decode = coded, decode
        self._decoded: tuple[int, Any] = (-1, None)

    def of(self, label: int, index: int) -> Any:
        """Return what is stored for an image, or None where the pack stores nothing."""
        if self._coded is None:
            return None
        if self._decoded[0] != label:
            self._decoded = (label, self._decode(self._coded.take(np.array([label])))[0])
        return self._decoded[1][index]


def _soft_labels(pack: Pack) -> _Stored:
    """Return float32 (C,) for each image."""
    return _Stored(pack.labels, decode_labels)


def _weights(pack: Pack) -> _Stored:
    """Return a float32 for each image."""
    return _Stored(pack.weights, decode_weights)


def _pool() -> ThreadPoolExecutor:
    """Return threads that compress images: compressing releases the interpreter lock."""
    return ThreadPoolExecutor(os.cpu_count() or 1)


def _pixels(images: Tensor) -> Pixels:
    pixels: Pixels = images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return pixels


def _one_behind(groups: Iterator[list[Future[T]]]) -> Iterator[list[T]]:
    """Yield results group by group; a group is decoded while the one before it is written."""
    waiting: list[Future[T]] = []
    for group in groups:
        if waiting:
            yield [future.result() for future in waiting]
        waiting = group
    if waiting:
        yield [future.result() for future in waiting]


def _raw(pixels: Pixels, settings: ExportSettings) -> bytes:
    return pixels.tobytes()


def _encode(pixels: Pixels, settings: ExportSettings) -> bytes:
    image, data = Image.fromarray(pixels), io.BytesIO()
    if settings.image == "png":
        image.save(data, "PNG", compress_level=4)
    else:
        lossless = settings.quality is None
        image.save(data, "WEBP", lossless=lossless, quality=settings.quality or 80, method=4)
    return data.getvalue()


def _mark(
    decoder: Decoder, settings: ExportSettings, classes: Sequence[int], count: int
) -> dict[str, Any]:
    """Return what decides about the files. A tree may grow by classes and images, shards not."""
    how = decoder.describe()
    mark: dict[str, Any] = {
        "root": decoder.pack.root,
        **asdict(settings),
        **{name: how[name] for name in ("numerics", "switches", "group")},
        "classes": [*classes],
        "images_per_class": count,
    }
    if settings.layout == "folder":
        for name in ("shard_size", "classes", "images_per_class"):
            del mark[name]
    return mark


def _file_names(folder: Path | ObjectPath) -> set[str]:
    return {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()

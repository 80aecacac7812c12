"""Decoded images as files: a tree of folders, tar shards, parquet or npz parts.

Every file is written completely or not at all, so an interrupted export goes on where it stopped. A
hidden file, `.d3pack-export.json`, says what a folder holds and is locked during an export. Other
tools ignore it: shards lie in the folder alone, so that they load as a dataset.
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from d3pack.errors import D3MError, UsageError
from d3pack.format.codecs import decode_labels
from d3pack.system import (
    Lock,
    check,
    disk_full_as_error,
    lock,
    option,
    remove_leftovers,
    replace_file,
    require,
    writing,
)

if TYPE_CHECKING:
    from torch import Tensor

    from d3pack.decode.decoder import Decoder, Pair
    from d3pack.format import Pack

T = TypeVar("T")
Layout = Literal["folder", "webdataset", "parquet", "npz"]
Pixels = npt.NDArray[np.uint8]
Progress = Callable[[int, int], None]  # images done, images in all
MARK = ".d3pack-export.json"
_SUFFIXES = {"webdataset": "tar", "parquet": "parquet", "npz": "npz"}
_PARQUET_ROWS = 256  # of a row group
_MAX_SLUG = 48


@dataclass(frozen=True, slots=True)
class ExportSettings:
    """How decoded images are written."""

    layout: Layout = option(
        "folder",
        "Folders of classes (ImageFolder, hard labels only), webdataset, parquet or npz.",
        flag="--to",
    )
    image: Literal["png", "webp"] = option("png", "Image format; npz has none.")
    quality: int | None = option(None, "Lossy webp; without it: lossless.", ge=1, le=100)
    shard: int = option(1024, "Images of one shard or part.", ge=1)

    def __post_init__(self) -> None:
        check(self)
        if self.quality is not None and self.image != "webp":
            raise UsageError("quality is a setting of webp", hint='set image="webp", too')


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export did."""

    images: int
    decoded: int  # the others were there before
    seconds: float

    @property
    def rate(self) -> float:
        """Decoded images a second."""
        return self.decoded / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One image as it is stored in a shard."""

    label: int
    index: int
    image: bytes
    soft_label: npt.NDArray[np.float32] | None

    @property
    def key(self) -> str:
        """Name of the image in a shard, without suffix."""
        return f"{self.label:05d}_{self.index:05d}"


def export_images(
    decoder: Decoder,
    output: Path,
    settings: ExportSettings | None = None,
    *,
    classes: Sequence[int] | None = None,
    images_per_class: int | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Decode images into a folder.

    A folder that an earlier call has begun is completed: images that are there are kept. Shards
    hold labels, class names and, where the pack has them, soft labels.

    Args:
        decoder: of the pack.
        output: an empty folder, or that of an interrupted call; it is made where it is missing.
        settings: layout, image format and size of shards.
        classes: their numbers; by default all.
        images_per_class: the first, which are the best; by default all.
        progress: called with (images done, images in all).

    Raises:
        UsageError: the folder holds something else, more images than asked for, or is in use.
        NoSpaceError: the disk is full; what is complete is kept.
    """
    settings = settings or ExportSettings()
    pack = decoder.pack
    classes = range(len(pack.classes)) if classes is None else classes
    count = pack.images_per_class if images_per_class is None else images_per_class
    pairs = [(c, i) for c in classes for i in range(count)]
    started = time.perf_counter()
    with _claimed(output, _mark(decoder, settings, classes, count)):
        write = _write_tree if settings.layout == "folder" else _write_shards
        decoded = write(decoder, output, pairs, settings, progress or (lambda done, total: None))
    return ExportReport(len(pairs), decoded, time.perf_counter() - started)


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


def class_folder(index: int, name: str, classes: int) -> str:
    """Return the folder name of a class: its number, for the order, and its name in ASCII."""
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "_", ascii_name).strip("_")[:_MAX_SLUG].rstrip("_") or "class"
    return f"{index:0{max(5, len(str(classes - 1)))}d}_{slug}"


def _write_tree(
    decoder: Decoder,
    output: Path,
    pairs: list[Pair],
    settings: ExportSettings,
    progress: Progress,
) -> int:
    names = decoder.pack.classes
    folders = [class_folder(c, name, len(names)) for c, name in enumerate(names)]
    files = [f"{folders[c]}/{i:05d}.{settings.image}" for c, i in pairs]
    existing = {
        f"{folder}/{name}"
        for folder in folders
        for name in _file_names(output / folder)
        if name.endswith(f".{settings.image}")
    }
    if extra := existing.difference(files):
        raise UsageError(
            f"{output} holds {len(extra)} images of an earlier export that this one does not make",
            hint="choose an empty folder",
        )
    replace_file(output / "classes.json", _to_json(dict(zip(folders, names, strict=True))))
    missing = [item for item in zip(pairs, files, strict=True) if item[1] not in existing]
    for folder in {file.partition("/")[0] for _, file in missing}:
        (output / folder).mkdir(exist_ok=True)
    done = len(pairs) - len(missing)
    progress(done, len(pairs))

    def save(file: str, pixels: Pixels) -> None:
        replace_file(output / file, _encode(pixels, settings))

    with _pool() as pool:
        groups = (
            [pool.submit(save, missing[p][1], x) for p, x in zip(at, _pixels(images), strict=True)]
            for at, images in decoder.stream(pair for pair, _ in missing)
        )
        for group in _one_behind(groups):
            done += len(group)
            progress(done, len(pairs))
    return len(missing)


def _write_shards(
    decoder: Decoder,
    output: Path,
    pairs: list[Pair],
    settings: ExportSettings,
    progress: Progress,
) -> int:
    write = {"webdataset": _write_tar, "parquet": _write_parquet, "npz": _write_npz}
    suffix = _SUFFIXES[settings.layout]
    starts = range(0, len(pairs), settings.shard)
    parts = {
        f"part-{n:05d}-of-{len(starts):05d}.{suffix}": pairs[start : start + settings.shard]
        for n, start in enumerate(starts)
    }
    existing = _file_names(output)
    missing = {name: part for name, part in parts.items() if name not in existing}
    done = len(pairs) - sum(map(len, missing.values()))
    progress(done, len(pairs))
    encode = _raw if settings.layout == "npz" else _encode
    soft_labels = _SoftLabels(decoder.pack)

    def samples(part: list[Pair]) -> Iterator[Sample]:
        nonlocal done
        groups = (
            [pool.submit(encode, x, settings) for x in _pixels(images)]
            for _, images in decoder.stream(part)
        )
        start = 0
        for images in _one_behind(groups):
            stop = start + len(images)
            for (c, i), image in zip(part[start:stop], images, strict=True):
                yield Sample(c, i, image, soft_labels.of(c, i))
            start = stop
            done += len(images)
            progress(done, len(pairs))

    with _pool() as pool:
        for name, part in missing.items():
            with writing(output / name) as temporary, temporary.open("wb") as file:
                write[settings.layout](file, part, samples(part), decoder.pack, settings)
    return sum(map(len, missing.values()))


class _SoftLabels:
    """Soft labels image by image; those of one class are decoded at a time."""

    def __init__(self, pack: Pack) -> None:
        self._coded = pack.labels
        self._decoded: tuple[int, Any] = (-1, None)

    def of(self, label: int, index: int) -> Any:
        """Return float32 (C,), or None where the pack has no soft labels."""
        if self._coded is None:
            return None
        if self._decoded[0] != label:
            self._decoded = (label, decode_labels(self._coded, label))
        return self._decoded[1][index]


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


def _write_tar(
    file: Any,
    part: list[Pair],
    samples: Iterable[Sample],
    pack: Pack,
    settings: ExportSettings,
) -> None:
    """Write a WebDataset shard; its bytes depend on no clock.

    The members of an image have one key: `.json` with the class name, the image, `.cls` with the
    label, and `.soft_label.npy`. The name comes before the label, because readers that know both
    take the first.
    """
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            facts = {"class_name": pack.classes[sample.label], "index": sample.index}
            members = {
                "json": json.dumps(facts).encode(),
                settings.image: sample.image,
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


def _write_parquet(
    file: Any,
    part: list[Pair],
    samples: Iterable[Sample],
    pack: Pack,
    settings: ExportSettings,
) -> None:
    """Write rows as `datasets` reads them: image, label with class names, index, soft label."""
    pa = require("pyarrow", "parquet output")
    pq = require("pyarrow.parquet", "parquet output")
    features: dict[str, Any] = {
        "image": {"_type": "Image"},
        "label": {"names": list(pack.classes), "_type": "ClassLabel"},
        "index": {"dtype": "int32", "_type": "Value"},
    }
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    fields = [("image", image), ("label", pa.int64()), ("index", pa.int32())]
    if pack.labels is not None:
        value = {"dtype": "float32", "_type": "Value"}
        features["soft_label"] = {"feature": value, "length": -1, "_type": "Sequence"}
        fields.append(("soft_label", pa.list_(pa.float32())))
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema(fields, metadata=metadata)
    with pq.ParquetWriter(file, schema) as writer:
        rows = iter(samples)
        while group := list(islice(rows, _PARQUET_ROWS)):
            table = [
                {
                    "image": {
                        "bytes": s.image,
                        "path": f"{s.key}.{settings.image}",
                    },
                    "label": s.label,
                    "index": s.index,
                    "soft_label": s.soft_label,
                }
                for s in group
            ]
            writer.write_table(pa.Table.from_pylist(table, schema=schema))


def _write_npz(
    file: Any,
    part: list[Pair],
    samples: Iterable[Sample],
    pack: Pack,
    settings: ExportSettings,
) -> None:
    """Write arrays `labels`, `indices`, `class_names`, `soft_labels` and `images` (N, H, W, 3)."""
    height, width = pack.recipe.size
    labels, indices = np.array(part, dtype=np.int64).T
    arrays = {"labels": labels, "indices": indices, "class_names": np.array(pack.classes)}
    if pack.labels is not None:
        soft_labels = _SoftLabels(pack)
        arrays["soft_labels"] = np.stack([soft_labels.of(c, i) for c, i in part])
    date = (1980, 1, 1, 0, 0, 0)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy", date), "w") as member:
                np.lib.format.write_array(member, np.ascontiguousarray(array))
        shape = (len(part), height, width, 3)
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        with archive.open(zipfile.ZipInfo("images.npy", date), "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for sample in samples:  # one by one: all of them may not fit into memory
                member.write(sample.image)


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
        for name in ("shard", "classes", "images_per_class"):
            del mark[name]
    return mark


@contextmanager
def _claimed(output: Path, mark: dict[str, Any]) -> Iterator[None]:
    """Lock a folder that is empty or has the same mark, for one export at a time."""
    path = output / MARK
    try:
        output.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"{output} is not a folder", hint="choose another output") from None
    except OSError as error:
        raise D3MError(f"cannot make the folder {output}: {error.strerror}") from None
    try:
        with disk_full_as_error(f"to write into {output}"):
            if not path.exists() and any(output.iterdir()):
                raise UsageError(f"{output} is not empty", hint="choose an empty folder")
            with _lock(path, output) as locked:
                _check_mark(path, mark, output)
                if locked.held:
                    remove_leftovers(output)
                yield
    except BrokenPipeError:  # of a progress that nobody reads any more
        raise
    except OSError as error:
        raise D3MError(
            f"cannot write into {output}: {error.strerror or error}",
            hint="finished files are kept: the same call goes on",
        ) from error


def _lock(path: Path, output: Path) -> Lock:
    try:
        return lock(path)
    except BlockingIOError:
        raise UsageError(
            f"another export is writing into {output}", hint="wait for it, or choose another folder"
        ) from None


def _check_mark(path: Path, mark: dict[str, Any], output: Path) -> None:
    """Write the mark of a new export, or compare it with the one that is there."""
    content = path.read_bytes()
    if not content:
        path.write_bytes(_to_json(mark))  # in place: the file is locked
        return
    try:
        is_same = json.loads(content) == mark
    except ValueError:
        is_same = False
    if not is_same:
        raise UsageError(f"{output} holds another export", hint="choose an empty folder")


def _file_names(folder: Path) -> set[str]:
    return {entry.name for entry in os.scandir(folder)} if folder.is_dir() else set()


def _to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode("utf-8")

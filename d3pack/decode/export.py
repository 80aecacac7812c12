"""Decoded images as files: a tree of folders, tar shards, parquet or npz parts.

Every file is written completely or not at all, so an interrupted export goes on where it stopped.
`export.json` says what a folder holds, and is locked while one writes there; a folder that holds
something else is left alone.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from d3pack.decode.names import class_folder
from d3pack.errors import D3MError, UsageError
from d3pack.system import (
    Lock,
    disk_full_as_error,
    lock,
    remove_leftovers,
    replace_file,
    require,
    writing,
)

if TYPE_CHECKING:
    from torch import Tensor

    from d3pack.decode.decoder import Decoder, Pair

T = TypeVar("T")
Pixels = npt.NDArray[np.uint8]
Progress = Callable[[int, int], None]  # images there, images in all
KINDS = ("folder", "webdataset", "parquet", "npz")


@dataclass(frozen=True, slots=True)
class ExportSettings:
    """What to write and how."""

    kind: str = "folder"
    suffix: str = "png"  # or "webp"
    quality: int | None = None  # None: lossless
    shard: int = 1024  # images of one shard or part

    def check(self) -> None:
        """Raise `UsageError` unless it can be followed."""
        if self.kind not in KINDS:
            raise UsageError(f"unknown layout {self.kind!r}", hint=f"one of {', '.join(KINDS)}")
        if self.suffix not in ("png", "webp"):
            raise UsageError(f"unknown image format {self.suffix!r}", hint="png or webp")
        if self.quality is not None and (self.suffix == "png" or not 1 <= self.quality <= 100):
            raise UsageError("a quality belongs to webp", hint="1 to 100; without it: lossless")
        if self.shard < 1:
            raise UsageError("a shard needs at least one image")


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export did."""

    images: int
    made: int  # the others were there before
    seconds: float

    @property
    def rate(self) -> float:
        """Images a second, those that were there not counted."""
        return self.made / self.seconds if self.seconds else 0.0


def export_images(
    decoder: Decoder,
    out: Path,
    classes: Sequence[int],
    count: int,
    plan: ExportSettings,
    progress: Progress | None = None,
) -> ExportReport:
    """Write the first `count` images of some classes."""
    plan.check()
    names = decoder.pack.classes
    pairs = [(c, i) for c in classes for i in range(count)]
    started = time.perf_counter()
    with _claimed(out, _title(decoder, plan, classes, count)):
        by_folder = {class_folder(c, names[c], len(names)): names[c] for c in range(len(names))}
        replace_file(out / "classes.json", _json(by_folder))
        if plan.kind == "folder":
            made = _tree(decoder, out, pairs, plan, progress)
        else:
            made = _shards(decoder, out, pairs, plan, progress)
    return ExportReport(len(pairs), made, time.perf_counter() - started)


def _tree(
    decoder: Decoder, out: Path, pairs: list[Pair], plan: ExportSettings, progress: Progress | None
) -> int:
    names = decoder.pack.classes

    def path(pair: Pair) -> Path:
        return (
            out / class_folder(pair[0], names[pair[0]], len(names)) / f"{pair[1]:05d}.{plan.suffix}"
        )

    there = {c: _names(path((c, 0)).parent) for c in {c for c, _ in pairs}}
    missing = [pair for pair in pairs if path(pair).name not in there[pair[0]]]
    for c in {c for c, _ in missing}:
        path((c, 0)).parent.mkdir(exist_ok=True)
    done = len(pairs) - len(missing)
    if progress:
        progress(done, len(pairs))

    def save(pair: Pair, pixels: Pixels) -> None:
        replace_file(path(pair), _encode(pixels, plan))

    with _pool() as pool:
        groups = (
            [
                pool.submit(save, missing[p], x)
                for p, x in zip(positions, _pixels(images), strict=True)
            ]
            for positions, images in decoder.stream(missing)
        )
        for group in _one_behind(groups):
            done += len(group)
            if progress:
                progress(done, len(pairs))
    return len(missing)


def _pool() -> ThreadPoolExecutor:
    """Compressing runs without the interpreter lock, and the disk makes some threads wait."""
    return ThreadPoolExecutor((os.cpu_count() or 1) + 8)


def _pixels(images: Tensor) -> Pixels:
    found: Pixels = images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return found


def _one_behind(groups: Iterator[list[Future[T]]]) -> Iterator[list[T]]:
    """What was asked for, group by group; the next one is decoded while the last is written."""
    waiting: list[Future[T]] = []
    for group in groups:
        if waiting:
            yield [one.result() for one in waiting]
        waiting = group
    if waiting:
        yield [one.result() for one in waiting]


def _shards(
    decoder: Decoder, out: Path, pairs: list[Pair], plan: ExportSettings, progress: Progress | None
) -> int:
    write = {"webdataset": _tar, "parquet": _parquet, "npz": _npz}[plan.kind]
    ending = {"webdataset": "tar", "parquet": "parquet", "npz": "npz"}[plan.kind]
    starts = range(0, len(pairs), plan.shard)
    parts = {
        out / f"part-{n:05d}-of-{len(starts):05d}.{ending}": pairs[s : s + plan.shard]
        for n, s in enumerate(starts)
    }
    there = _names(out)
    missing = {path: part for path, part in parts.items() if path.name not in there}
    done = len(pairs) - sum(map(len, missing.values()))
    if progress:
        progress(done, len(pairs))
    coded = _raw if plan.kind == "npz" else _encode
    with _pool() as pool:
        for path, part in missing.items():

            def contents(part: list[Pair] = part) -> Iterator[bytes]:
                nonlocal done
                groups = (
                    [pool.submit(coded, x, plan) for x in _pixels(images)]
                    for _, images in decoder.stream(part)
                )
                for group in _one_behind(groups):
                    yield from group
                    done += len(group)
                    if progress:
                        progress(done, len(pairs))

            with writing(path) as temporary, temporary.open("wb") as file:
                write(file, part, contents(), decoder, plan)
    return sum(map(len, missing.values()))


def _tar(
    file: Any, part: list[Pair], images: Iterator[bytes], decoder: Decoder, plan: ExportSettings
) -> None:
    """WebDataset: members of one key side by side, `.cls` the label. Bytes depend on no clock."""
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for (c, i), image in zip(part, images, strict=True):
            for ending, data in ((plan.suffix, image), ("cls", str(c).encode())):
                member = tarfile.TarInfo(f"{c:05d}_{i:05d}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def _parquet(
    file: Any, part: list[Pair], images: Iterator[bytes], decoder: Decoder, plan: ExportSettings
) -> None:
    """Rows as `datasets` reads them: an image column, a class label with its names."""
    pa = require("pyarrow", "parquet output")
    pq = require("pyarrow.parquet", "parquet output")
    features = {
        "image": {"_type": "Image"},
        "label": {"names": list(decoder.pack.classes), "_type": "ClassLabel"},
        "index": {"dtype": "int32", "_type": "Value"},
    }
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema(
        [("image", image), ("label", pa.int64()), ("index", pa.int32())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    with pq.ParquetWriter(file, schema) as writer:
        numbered = enumerate(zip(part, images, strict=True))
        for _, rows in groupby(numbered, key=lambda item: item[0] // 256):
            table = [
                {
                    "image": {"bytes": x, "path": f"{c:05d}_{i:05d}.{plan.suffix}"},
                    "label": c,
                    "index": i,
                }
                for _, ((c, i), x) in rows
            ]
            writer.write_table(pa.Table.from_pylist(table, schema=schema))


def _npz(
    file: Any, part: list[Pair], images: Iterator[bytes], decoder: Decoder, plan: ExportSettings
) -> None:
    """Arrays `images` (N, H, W, 3), `labels`, `indices`; the images go in one by one."""
    height, width = decoder.pack.recipe.size
    when = (1980, 1, 1, 0, 0, 0)
    columns = np.array(part, dtype=np.int64).T
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, column in zip(("labels", "indices"), columns, strict=True):
            with archive.open(zipfile.ZipInfo(f"{name}.npy", when), "w") as member:
                np.lib.format.write_array(member, column)
        header = {
            "descr": "|u1",
            "fortran_order": False,
            "shape": (len(part), height, width, 3),
        }
        entry = zipfile.ZipInfo("images.npy", when)
        with archive.open(entry, "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for image in images:
                member.write(image)


def _raw(pixels: Pixels, plan: ExportSettings) -> bytes:
    return pixels.tobytes()


def _encode(pixels: Pixels, plan: ExportSettings) -> bytes:
    image, data = Image.fromarray(pixels), io.BytesIO()
    if plan.suffix == "png":
        image.save(data, "PNG", compress_level=4)
    else:
        lossless = plan.quality is None
        image.save(data, "WEBP", lossless=lossless, quality=plan.quality or 80, method=4)
    return data.getvalue()


def _title(
    decoder: Decoder, plan: ExportSettings, classes: Sequence[int], count: int
) -> dict[str, Any]:
    """What decides about the bytes. A tree may grow by classes and images, shards may not."""
    how = decoder.describe()
    parts = {"shard": plan.shard, "classes": [*classes], "ipc": count}
    return {
        "root": decoder.pack.root,
        "layout": plan.kind,
        "image": plan.suffix,
        "quality": plan.quality,
        "numerics": how["numerics"],
        "switches": how["switches"],
        "group": how["group"],
        **({} if plan.kind == "folder" else parts),
    }


@contextmanager
def _claimed(out: Path, title: dict[str, Any]) -> Iterator[None]:
    """Lock an empty folder, or one of the same title to go on in; one export at a time."""
    note = out / "export.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"{out} is not a folder", hint="choose another output") from None
    except OSError as error:
        raise D3MError(f"cannot make the folder {out}: {error.strerror}") from None
    try:
        with disk_full_as_error(f"to write into {out}"):
            if not note.exists() and any(out.iterdir()):
                raise UsageError(f"{out} is not empty", hint="choose an empty folder")
            with _locked(note, out) as locked:
                _entitle(note, title, out)
                if locked.held:
                    remove_leftovers(out)
                yield
    except BrokenPipeError:  # of whoever was told about the progress
        raise
    except OSError as error:
        raise D3MError(
            f"cannot write into {out}: {error.strerror or error}",
            hint="what is whole was kept, the same call goes on",
        ) from error


def _locked(note: Path, out: Path) -> Lock:
    try:
        return lock(note)
    except BlockingIOError:
        raise UsageError(
            f"another decode is writing into {out}", hint="wait for it, or choose another folder"
        ) from None


def _entitle(note: Path, title: dict[str, Any], out: Path) -> None:
    """Write the title of a new export, in place: the file is locked."""
    content = note.read_bytes()
    if not content:
        note.write_bytes(_json(title))
    elif not _same(content, title):
        raise UsageError(f"{out} holds another export", hint="choose an empty folder")


def _same(found: bytes, title: dict[str, Any]) -> bool:
    try:
        return bool(json.loads(found) == title)
    except ValueError:
        return False


def _names(path: Path) -> set[str]:
    return {entry.name for entry in os.scandir(path)} if path.is_dir() else set()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode("utf-8")

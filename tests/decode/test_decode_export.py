"""`d3pack decode`: what is written is the decoder's pixels, whole files only, and resumable."""

from __future__ import annotations

import errno
import io
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any, Literal

import numpy as np
import pytest
import torch
from cli import invoke
from PIL import Image
from tiny_backbones import tiny_pack, tiny_sd

import d3pack
from d3pack.decode import (
    Decoder,
    ExportSettings,
    class_folder,
    class_folders,
    export_images,
    select_classes,
)
from d3pack.decode.export import _encode
from d3pack.decode.settings import Layout
from d3pack.errors import NoSpaceError, UsageError
from d3pack.format.codecs import decode_labels, decode_weights, encode_labels, encode_weights
from d3pack.sources import open_source

COUNT = 8


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    root = tmp_path_factory.mktemp("export")
    path = tiny_sd(root / "sd")
    pack = tiny_pack(path, images=COUNT)
    d3pack.write(pack, root / "small.d3m")
    decoder = Decoder(pack, path=path)
    images = decoder.images(range(3 * COUNT)).permute(0, 2, 3, 1).numpy()
    yield {
        "decoder": decoder,
        "pack": pack,
        "file": str(root / "small.d3m"),
        "backbone": str(path),
        "images": images.reshape(3, COUNT, 64, 64, 3),
    }
    decoder.close()


def pixels(source: Any) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(source).convert("RGB"))


@pytest.mark.heavy
@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_folder_layout_holds_the_decoders_pixels(
    suffix: Literal["png", "webp"], made: dict[str, Any], tmp_path: Path
) -> None:
    done = export_images(
        made["decoder"],
        tmp_path / "out",
        ExportSettings(image=suffix),
        classes=[0, 2],
        images_per_class=3,
    )
    assert (done.images, done.decoded) == (6, 6)
    names = made["pack"].classes
    folders = sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_dir())
    expected = class_folders(names)
    assert folders == [expected[c] for c in (0, 2)]
    for c in (0, 2):
        files = sorted((tmp_path / "out" / expected[c]).iterdir())
        assert [f.name for f in files] == [f"{i:05d}.{suffix}" for i in range(3)]
        for i, file in enumerate(files):
            assert np.array_equal(pixels(file), made["images"][c, i])
    real = json.loads((tmp_path / "out/.classes.json").read_text())
    assert real == dict(zip(expected, names, strict=True))


def test_folder_layout_resumes_and_grows(made: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_images(made["decoder"], out, ExportSettings(), classes=[0], images_per_class=2)
    first = out / "goldfish 0/00000.png"
    stamp = first.stat().st_mtime_ns
    (out / "goldfish 0/00001.png").unlink()
    (first.parent / "00003.png.part").write_bytes(b"half")  # what a crash leaves
    seen: list[tuple[int, int]] = []
    done = export_images(
        made["decoder"],
        out,
        ExportSettings(),
        classes=[0, 1],
        images_per_class=4,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert (done.images, done.decoded) == (8, 7)
    assert seen[0] == (1, 8)
    assert seen[-1] == (8, 8)
    assert first.stat().st_mtime_ns == stamp
    for c in range(2):
        for i in range(4):
            file = out / class_folders(made["pack"].classes)[c] / f"{i:05d}.png"
            assert np.array_equal(pixels(file), made["images"][c, i])
    assert (
        export_images(
            made["decoder"], out, ExportSettings(), classes=[0, 1], images_per_class=4
        ).decoded
        == 0
    )
    assert not list(out.rglob("*.part"))


@pytest.mark.heavy
def test_interrupted_export_leaves_complete_files_only(
    made: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def stop(done: int, total: int) -> None:
        if done >= 8:
            raise KeyboardInterrupt

    for kind in ("folder", "webdataset", "npz"):
        with pytest.raises(KeyboardInterrupt):
            export_images(
                made["decoder"],
                out / kind,
                ExportSettings(kind, shard_size=8),
                classes=[0, 1, 2],
                images_per_class=COUNT,
                progress=stop,
            )
        whole = export_images(
            made["decoder"],
            out / kind,
            ExportSettings(kind, shard_size=8),
            classes=[0, 1, 2],
            images_per_class=COUNT,
        )
        assert whole.decoded < whole.images or kind != "folder"
        assert not list((out / kind).rglob("*.part"))
        fresh = out / f"{kind}-fresh"
        export_images(
            made["decoder"],
            fresh,
            ExportSettings(kind, shard_size=8),
            classes=[0, 1, 2],
            images_per_class=COUNT,
        )
        for path in sorted(p for p in fresh.rglob("*") if p.is_file()):
            again = out / kind / path.relative_to(fresh)
            assert again.read_bytes() == path.read_bytes()


def test_images_of_a_long_group_count_while_they_are_made(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("d3pack.decode.export._LONG_GROUP", 0.0)
    seen: list[tuple[int, int]] = []
    export_images(
        made["decoder"], tmp_path / "out", progress=lambda done, total: seen.append((done, total))
    )
    steps = sum(steps for _, steps in made["decoder"].plan(range(len(made["pack"]))))
    assert len(seen) > steps
    assert seen == sorted(seen)
    assert (seen[0][0], seen[-1]) == (0, (len(made["pack"]),) * 2)


def test_second_export_into_a_folder_is_refused(made: dict[str, Any], tmp_path: Path) -> None:
    plan = ExportSettings("webdataset", shard_size=8)
    refused = []

    def intrude(done: int, total: int) -> None:
        with pytest.raises(UsageError, match="another export is writing"):
            export_images(
                made["decoder"], tmp_path / "out", plan, classes=[0], images_per_class=COUNT
            )
        refused.append(done)

    export_images(
        made["decoder"],
        tmp_path / "out",
        plan,
        classes=[0],
        images_per_class=COUNT,
        progress=intrude,
    )
    assert refused == [0, 4, 8]
    assert (
        export_images(
            made["decoder"], tmp_path / "out", plan, classes=[0], images_per_class=COUNT
        ).decoded
        == 0
    )


def test_unwritable_outputs_are_errors(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(UsageError, match="is not a folder"):
            export_images(made["decoder"], out, ExportSettings(), classes=[0], images_per_class=1)

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for plan in (ExportSettings(), ExportSettings("npz")):
        with pytest.raises(NoSpaceError, match="no space left to write"):
            export_images(
                made["decoder"], tmp_path / plan.layout, plan, classes=[0], images_per_class=1
            )
        assert list((tmp_path / plan.layout).iterdir()) == []
    monkeypatch.undo()
    for kind in ("folder", "npz"):  # and the same call goes on
        assert (
            export_images(
                made["decoder"],
                tmp_path / kind,
                ExportSettings(kind),
                classes=[0],
                images_per_class=1,
            ).decoded
            == 1
        )


def test_export_resumes_after_a_full_disk(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.fsync, []

    def full(fd: int) -> None:
        calls.append(fd)
        if len(calls) > 6:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        real(fd)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NoSpaceError, match="no space left to write"):
        export_images(
            made["decoder"],
            tmp_path / "out",
            ExportSettings(),
            classes=[0, 1],
            images_per_class=COUNT,
        )
    assert not list((tmp_path / "out").rglob("*.part"))
    monkeypatch.undo()
    assert (
        export_images(
            made["decoder"],
            tmp_path / "out",
            ExportSettings(),
            classes=[0, 1],
            images_per_class=COUNT,
        ).decoded
        >= 2 * COUNT - 6  # six calls can let six files through
    )


@pytest.mark.parametrize("kind", ["folder", "webdataset", "parquet"])
def test_next_group_is_decoded_while_one_is_written(
    kind: Layout, made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, second = made["decoder"].stream, Event()

    def watched(wanted: Any) -> Iterator[Any]:
        for number, group in enumerate(stream(wanted)):
            if number == 1:
                second.set()
            yield group

    def patient(pixels: Any, plan: ExportSettings) -> bytes:
        assert second.wait(30)
        return _encode(pixels, plan)

    monkeypatch.setattr(made["decoder"], "stream", watched)
    monkeypatch.setattr("d3pack.decode.export._encode", patient)
    export_images(
        made["decoder"], tmp_path, ExportSettings(kind), classes=[0], images_per_class=COUNT
    )


def test_webdataset_shards_hold_the_decoders_pixels(made: dict[str, Any], tmp_path: Path) -> None:
    export_images(
        made["decoder"],
        tmp_path / "out",
        ExportSettings("webdataset", shard_size=10),
        classes=[0, 1, 2],
        images_per_class=COUNT,
    )
    shards = sorted((tmp_path / "out").glob("*.tar"))
    assert [s.name for s in shards] == [f"part-{n:05d}-of-00003.tar" for n in range(3)]
    found = {}
    for shard in shards:
        with tarfile.open(shard) as tar:
            members = tar.getmembers()
            for facts, image, label in zip(*(members[i::3] for i in range(3)), strict=True):
                key, _ = image.name.split(".")
                assert (facts.name, label.name) == (f"{key}.json", f"{key}.cls")
                contents = [tar.extractfile(one) for one in (facts, image, label)]
                values = [one.read() for one in contents if one is not None]
                assert int(values[2]) == int(key[:5])
                name = made["pack"].classes[int(values[2])]
                assert json.loads(values[0]) == {"class_name": name, "index": int(key[6:])}
                found[key] = pixels(io.BytesIO(values[1]))
    assert len(found) == 24
    for key, image in found.items():
        assert np.array_equal(image, made["images"][int(key[:5]), int(key[6:])])


def test_parquet_parts_hold_the_decoders_pixels(made: dict[str, Any], tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    export_images(
        made["decoder"],
        tmp_path / "out",
        ExportSettings("parquet", shard_size=6),
        classes=[1, 2],
        images_per_class=5,
    )
    parts = sorted((tmp_path / "out").glob("*.parquet"))
    rows = [row for part in parts for row in pq.read_table(part).to_pylist()]
    assert [(r["label"], r["index"]) for r in rows] == [(c, i) for c in (1, 2) for i in range(5)]
    for row in rows:
        found = pixels(io.BytesIO(row["image"]["bytes"]))
        assert np.array_equal(found, made["images"][row["label"], row["index"]])
    schema = pq.read_schema(tmp_path / "out/part-00000-of-00002.parquet")
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert features["label"]["names"] == list(made["pack"].classes)


def test_npz_parts_hold_the_decoders_pixels(made: dict[str, Any], tmp_path: Path) -> None:
    export_images(
        made["decoder"],
        tmp_path / "out",
        ExportSettings("npz", shard_size=20),
        classes=[0, 1, 2],
        images_per_class=COUNT,
    )
    parts = [np.load(p) for p in sorted((tmp_path / "out").glob("*.npz"))]
    assert [len(p["images"]) for p in parts] == [20, 4]
    images = np.concatenate([p["images"] for p in parts])
    assert np.array_equal(images, made["images"].reshape(-1, 64, 64, 3))
    labels = np.concatenate([p["labels"] for p in parts])
    assert labels.tolist() == [c for c in range(3) for _ in range(COUNT)]


def test_folder_of_other_files_is_refused(made: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        export_images(made["decoder"], out, ExportSettings(), classes=[0], images_per_class=1)
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]
    (out / "thesis.txt").unlink()
    export_images(made["decoder"], out, ExportSettings(), classes=[0], images_per_class=1)
    for other in (ExportSettings("npz"), ExportSettings(image="webp")):
        with pytest.raises(UsageError, match="another export"):
            export_images(made["decoder"], out, other, classes=[0], images_per_class=1)
    (out / ".d3pack-export.json").write_text("{")
    with pytest.raises(UsageError, match="another export"):
        export_images(made["decoder"], out, ExportSettings(), classes=[0], images_per_class=1)


def test_folder_with_more_images_than_asked_for_is_refused(
    made: dict[str, Any], tmp_path: Path
) -> None:
    """Else the report would count fewer images than the folder holds."""
    out = tmp_path / "out"
    export_images(made["decoder"], out, classes=[0, 1], images_per_class=2)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    for classes, count, extra in (([0, 1], 1, 2), ([0], 2, 2), ([2], 2, 4)):
        with pytest.raises(UsageError, match=f"holds {extra} images of an earlier export"):
            export_images(made["decoder"], out, classes=classes, images_per_class=count)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    (out / "goldfish 0/Thumbs.db").touch()  # what a file manager leaves
    assert export_images(made["decoder"], out, classes=[0, 1], images_per_class=2).decoded == 0


@pytest.mark.parametrize(
    "name", ["zzz/", "extra.png", "goldfish 0/sub/", "goldfish 0/x.png", "penguin 1/00000.jpg"]
)
def test_folder_with_images_of_others_is_refused(
    name: str, made: dict[str, Any], tmp_path: Path
) -> None:
    """Else a reader of folders would find other classes or images than the report counts."""
    out = tmp_path / "out"
    export_images(made["decoder"], out, classes=[0, 1], images_per_class=2)
    for hidden in (out / ".cache", out / "goldfish 0/.thumbs"):
        hidden.mkdir()
    (out / ".DS_Store").touch()
    assert export_images(made["decoder"], out, classes=[0, 1], images_per_class=2).decoded == 0
    if name.endswith("/"):
        (out / name).mkdir()
    else:
        (out / name).touch()
    with pytest.raises(UsageError, match=f"not of this export: '{name.rstrip('/')}'"):
        export_images(made["decoder"], out, classes=[0, 1], images_per_class=2)


@pytest.fixture(scope="module")
def labelled(made: dict[str, Any]) -> Iterator[tuple[Decoder, Any]]:
    """A decoder of a pack with soft labels and weights, and what the labels decode to."""
    rng = np.random.default_rng(4)
    labels = encode_labels(rng.dirichlet(np.full(3, 0.5), (3, COUNT)), k=2)
    weights = encode_weights(rng.uniform(0.5, 2, (3, COUNT)))
    pack = replace(made["pack"], labels=labels, weights=weights)
    with Decoder(pack, path=made["backbone"]) as decoder:
        yield decoder, decode_labels(labels)


def weights_of(decoder: Decoder) -> Any:
    weights = decoder.pack.weights
    assert weights is not None
    return decode_weights(weights)


@pytest.mark.parametrize("shard", [1024, 10])
@pytest.mark.parametrize("layout", ["parquet", "webdataset", "folder"])
def test_exports_load_with_datasets(
    layout: Layout,
    shard: int,
    labelled: tuple[Decoder, Any],
    made: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    datasets = pytest.importorskip("datasets")
    decoder, soft = labelled
    weights = weights_of(decoder)
    export_images(decoder, tmp_path / "out", ExportSettings(layout, shard_size=shard))
    loaded = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    rows = loaded["train"]
    assert len(rows) == 3 * COUNT
    names = list(made["pack"].classes)
    for number, row in enumerate(rows):
        c, i = divmod(number, COUNT)
        image = row["png" if layout == "webdataset" else "image"]
        assert np.array_equal(np.asarray(image.convert("RGB")), made["images"][c, i])
        if layout == "webdataset":
            facts = {"class_name": names[c], "index": i, "weight": weights[c, i]}
            assert (row["cls"], row["json"]) == (c, facts)
            assert np.array_equal(np.float32(row["soft_label.npy"]), soft[c, i])
        elif layout == "parquet":
            assert (row["label"], row["index"], row["weight"]) == (c, i, weights[c, i])
            assert np.array_equal(np.float32(row["soft_label"]), soft[c, i])
        else:
            assert row["label"] == c
    if layout == "parquet":
        assert rows.features["label"].names == names
        assert rows.features["weight"].dtype == "float32"


def test_one_image_of_one_class_loads_as_an_image(made: dict[str, Any], tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    export_images(made["decoder"], tmp_path / "out", classes=[1], images_per_class=1)
    loaded = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    (row,) = loaded["train"]
    assert np.array_equal(np.asarray(row["image"].convert("RGB")), made["images"][1, 0])


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the library leaves its files open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_shards_load_with_webdataset(
    labelled: tuple[Decoder, Any], made: dict[str, Any], tmp_path: Path
) -> None:
    webdataset = pytest.importorskip("webdataset")
    decoder, soft = labelled
    weights = weights_of(decoder)
    export_images(decoder, tmp_path, ExportSettings("webdataset", shard_size=10))
    urls = sorted(str(path) for path in tmp_path.glob("*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert len(samples) == 3 * COUNT
    for number, sample in enumerate(samples):
        c, i = divmod(number, COUNT)
        assert np.array_equal(sample["png"], made["images"][c, i])
        assert sample["cls"] == c
        name = made["pack"].classes[c]
        assert sample["json"] == {"class_name": name, "index": i, "weight": weights[c, i]}
        assert np.array_equal(sample["soft_label.npy"], soft[c, i])


def test_npz_parts_hold_class_names_soft_labels_and_weights(
    labelled: tuple[Decoder, Any], made: dict[str, Any], tmp_path: Path
) -> None:
    decoder, soft = labelled
    export_images(decoder, tmp_path, ExportSettings("npz", shard_size=20))
    parts = [np.load(path, allow_pickle=False) for path in sorted(tmp_path.glob("*.npz"))]
    for part in parts:
        assert part["class_names"].tolist() == list(made["pack"].classes)
    rows = np.concatenate([part["soft_labels"] for part in parts])
    assert np.array_equal(rows, soft.reshape(-1, 3))
    weights = np.concatenate([part["weights"] for part in parts])
    assert weights.dtype == np.float32
    assert np.array_equal(weights, weights_of(decoder).reshape(-1))


def test_weights_are_those_of_the_exported_images(
    labelled: tuple[Decoder, Any], tmp_path: Path
) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    decoder, _ = labelled
    part: dict[str, Any] = {"classes": [2, 0], "images_per_class": 3}
    expected = weights_of(decoder)[[2, 0], :3].reshape(-1)
    export_images(decoder, tmp_path / "npz", ExportSettings("npz"), **part)
    export_images(decoder, tmp_path / "parquet", ExportSettings("parquet"), **part)
    (npz,) = (tmp_path / "npz").glob("*.npz")
    (table,) = (tmp_path / "parquet").glob("*.parquet")
    assert np.array_equal(np.load(npz)["weights"], expected)
    assert np.array_equal(pq.read_table(table)["weight"].to_numpy(), expected)


def test_files_of_a_pack_without_weights_have_none(made: dict[str, Any], tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    for layout in ("npz", "parquet", "webdataset"):
        settings = ExportSettings(layout)
        export_images(made["decoder"], tmp_path / layout, settings, images_per_class=1)
    (npz,), (table,), (tar,) = (tmp_path.glob(f"*/*.{kind}") for kind in ("npz", "parquet", "tar"))
    assert "weights" not in np.load(npz)
    assert "weight" not in pq.read_schema(table).names
    with tarfile.open(tar) as archive:
        facts = archive.extractfile("00000_00000.json")
        assert facts is not None
        assert set(json.load(facts)) == {"class_name", "index"}


def test_folder_layout_reads_as_an_image_folder(made: dict[str, Any], tmp_path: Path) -> None:
    """As torchvision's ImageFolder reads it: sorted folders are classes, sorted files images."""
    export_images(made["decoder"], tmp_path / "out")
    folders = sorted(entry.name for entry in os.scandir(tmp_path / "out") if entry.is_dir())
    assert len(folders) == 3
    for c, folder in enumerate(folders):
        files = sorted((tmp_path / "out" / folder).iterdir())
        for i, file in enumerate(files):
            assert np.array_equal(pixels(file), made["images"][c, i])
        assert len(files) == COUNT


def test_torchvision_reads_the_folders(made: dict[str, Any], tmp_path: Path) -> None:
    """With torchvision itself, where one that fits this torch is installed."""
    readers = pytest.importorskip("torchvision.datasets", exc_type=ImportError)
    export_images(made["decoder"], tmp_path / "out")
    folder = readers.ImageFolder(tmp_path / "out", transform=np.asarray)
    names = json.loads((tmp_path / "out" / ".classes.json").read_text())
    assert {names[name] for name in folder.classes} == set(made["pack"].classes)
    assert len(folder) == 3 * COUNT
    for number, (image, label) in enumerate(folder):
        c = made["pack"].classes.index(names[folder.classes[label]])
        assert np.array_equal(image, made["images"][c, number % COUNT])


def test_shards_are_encoded_again_with_their_class_names(
    made: dict[str, Any], tmp_path: Path
) -> None:
    from d3pack.sources import open_source

    export_images(made["decoder"], tmp_path, ExportSettings("webdataset", shard_size=10))
    source = open_source(str(tmp_path))
    assert sorted(source.classes) == sorted(made["pack"].classes)
    assert list(source.counts) == [COUNT] * 3


def test_lossy_webp_is_smaller(made: dict[str, Any], tmp_path: Path) -> None:
    sizes = {}
    for quality in (None, 30):
        out = tmp_path / str(quality)
        export_images(
            made["decoder"],
            out,
            ExportSettings(image="webp", quality=quality),
            classes=[0],
            images_per_class=1,
        )
        sizes[quality] = next(out.glob("*/*.webp")).stat().st_size
    assert sizes[30] < sizes[None]


@pytest.mark.parametrize(
    "settings",
    [
        {"layout": "zip"},
        {"image": "gif"},
        {"quality": 50},
        {"image": "webp", "quality": 0},
        {"shard_size": 0},
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        ExportSettings(**settings)


@pytest.mark.parametrize(
    "names",
    [
        ("dog", "cat"),  # readers of folders would swap their labels
        ("Cat", "cat"),  # one folder where case does not count
        ("cat", "nul"),
        ("cat", "train"),
        ("a" * 49, "b"),
        *[("cat", name) for name in ("naïve", "../x", "x/y", "x.", "x ", "-x", ".x", "x:y", "猫")],
    ],
)
def test_class_folders_are_numbered_where_names_are_not_safe(names: tuple[str, ...]) -> None:
    assert class_folders(names) == [class_folder(c, name, 2) for c, name in enumerate(names)]


def test_class_folders_are_the_names_where_these_are_safe() -> None:
    names = ("Golden Retriever", "bus (yellow)", "cat", "x-ray")
    assert class_folders(names) == list(names)


def test_decoded_folders_give_the_names_of_the_pack_again(
    made: dict[str, Any], tmp_path: Path
) -> None:
    export_images(made["decoder"], tmp_path / "out", images_per_class=1)
    assert (tmp_path / "out/.classes.json").is_file()
    assert open_source(tmp_path / "out").classes == made["pack"].classes


def test_class_folders_have_safe_names() -> None:
    assert class_folder(1, "Golden Retriever", 3) == "00001_golden_retriever"
    assert class_folder(1, "naïve café/../x", 3) == "00001_naive_cafe_x"
    assert class_folder(1, "猫", 3) == "00001_class"
    assert class_folder(1, "a" * 200, 3) == "00001_" + "a" * 48
    assert class_folder(7, "CON", 10) == "00007_con"
    assert sorted(class_folder(c, "x", 100_001) for c in (99_999, 100_000))[0] == "099999_x"


def test_classes_are_selected_by_name_number_or_range() -> None:
    names = ("cat", "dog", "3", "bus, yellow")
    assert select_classes(names, None) == [0, 1, 2, 3]
    assert select_classes(names, "dog, cat") == [0, 1]
    assert select_classes(names, "0,3") == [0, 2]  # "3" is a name
    assert select_classes(names, "1-2") == [1, 2]
    assert select_classes(names, "bus, yellow") == [3]
    for wrong in ("fish", "9", "1-9", "-1", "", "cat,"):
        with pytest.raises(UsageError, match="no class"):
            select_classes(names, wrong)


def call(*words: str) -> Any:
    return invoke(*words)


def test_decode_command_writes_and_reports_images(made: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["decode", made["file"], "-o", str(out), "--backbone", made["backbone"]]
    first = call(*words, "--classes", "1", "--ipc", "2", "--format", "json")
    assert first.exit_code == 0, first.output
    answer = json.loads(first.stdout)
    assert (answer["images"], answer["made"], answer["root"]) == (2, 2, made["pack"].root)
    assert answer["decoder"]["numerics"] == "exact"
    assert "exact on cpu" in first.stderr
    assert "2 images of 64x64, 24.6 kB as raw pixels" in first.stderr
    for i in range(2):
        assert np.array_equal(pixels(out / f"penguin 1/{i:05d}.png"), made["images"][1, i])
    again = call(*words, "--ipc", "2")
    assert again.exit_code == 0
    assert "6 images" in again.stdout
    assert "2 existed already" in again.stdout
    fewer = call(*words, "--ipc", "1")
    assert "holds 3 images of an earlier export" in fewer.stderr
    quiet = call(*words, "--ipc", "2", "--format", "quiet")
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("parts", "names"),
    [
        (["labels", "weights"], "no soft labels and no weights"),
        (["weights"], "no weights"),
        ([], None),
    ],
)
def test_decode_command_says_what_folders_have_no_place_for(
    parts: list[str],
    names: str | None,
    labelled: tuple[Decoder, Any],
    made: dict[str, Any],
    tmp_path: Path,
) -> None:
    whole = labelled[0].pack
    pack = replace(made["pack"], **{part: getattr(whole, part) for part in parts})
    d3pack.write(pack, tmp_path / "given.d3m")
    words = ["decode", str(tmp_path / "given.d3m"), "--backbone", made["backbone"], "--ipc", "1"]
    for options, said in (("", True), ("--to npz", False), ("--format quiet", False)):
        out = tmp_path / f"out{options}"
        done = call(*words, "-o", str(out), *options.split())
        assert done.exit_code == 0, done.output
        expected = [f"folders hold {names}: --to parquet keeps them"] if said and names else []
        assert [line for line in done.stderr.splitlines() if "folders" in line] == expected


def test_decode_command_reports_fast_numerics(made: dict[str, Any], tmp_path: Path) -> None:
    words = ["decode", made["file"], "-o", str(tmp_path / "out"), "--backbone", made["backbone"]]
    answer = call(*words, "--ipc", "1", "--fast", "bf16,channels_last", "--format", "json")
    assert answer.exit_code == 0, answer.output
    how = json.loads(answer.stdout)["decoder"]
    assert (how["numerics"], how["switches"], how["dtype"]) == (
        "fast",
        ["bf16", "channels_last"],
        "bfloat16",
    )


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        (["--ipc", "99"], "E_USAGE", "8 images per class"),
        (["--ipc", "0"], "E_USAGE", "8 images per class"),
        (["--classes", "zebra"], "E_USAGE", "no class 'zebra'"),
        (["--to", "zip"], "E_USAGE", "invalid --to 'zip'"),
        (["--fast", "turbo"], "E_USAGE", "unknown switch"),
        (["--fast", "tiny_vae"], "E_USAGE", "needs an autoencoder"),
        (["--backbone", "/nowhere"], "E_NOT_FOUND", "no backbone directory"),
    ],
)
def test_invalid_calls_of_decode_are_refused(
    words: list[str], code: str, why: str, made: dict[str, Any], tmp_path: Path
) -> None:
    base = ["decode", made["file"], "-o", str(tmp_path / "o"), "--backbone", made["backbone"]]
    result = call(*base, *words)
    assert result.exit_code != 0
    error = result.exception
    assert isinstance(error, d3pack.D3MError)
    assert error.code == code
    assert why in str(error)
    assert not (tmp_path / "o").exists()


def test_stream_yields_one_group_at_a_time(made: dict[str, Any]) -> None:
    stream = made["decoder"].stream([(c, i) for c in range(3) for i in range(COUNT)] * 50)
    sizes = {len(images) for _, (_, images) in zip(range(6), stream, strict=False)}
    assert sizes == {made["decoder"].group}
    assert not torch.is_inference(next(stream)[1])  # may be changed in place

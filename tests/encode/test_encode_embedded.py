"""A pack that carries its backbone: one file is enough, and every byte of it is checked."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encode_world import make_tree, settings_of
from safetensors.numpy import load, save

from d3pack.dataset import D3MDataset
from d3pack.decode import Decoder, backbone_path, unpack_backbone, verify_probes
from d3pack.encode import encode
from d3pack.errors import BackboneChangedError, D3MError
from d3pack.format import carried_files, read, write
from d3pack.format.codecs import decode_files, encode_files
from d3pack.format.codecs.files import split_files
from d3pack.format.coded import Coded
from d3pack.format.pack import EMBEDDED, Pack
from d3pack.testing import raises_code


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("embedded")
    make_tree(root / "source", 8)
    settings = settings_of(
        images_per_class=3,
        method="classcond",
        sampler_steps=3,
        guidance=2.0,
        group=4,
        teacher_samples=200,
        model="tiny",
        embed=True,
        search_images=12,
        licence="cc0-1.0",
    )
    encode(root / "source", root / "all.d3m", settings, teachers=root / "teachers")
    return root / "all.d3m"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A person who has nothing but the file."""
    monkeypatch.setenv("D3PACK_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.heavy
def test_pack_with_its_backbone_decodes_alone(packed: Path, tmp_path: Path, home: Path) -> None:
    assert not backbone_path(packed).exists()
    shutil.copy(packed, tmp_path / "alone.d3m")
    pack = read(tmp_path / "alone.d3m")
    report = verify_probes(pack, Decoder(pack))
    assert report.verdict == "exact"
    images = Decoder(pack).images(range(9))
    assert len(list((home / "embedded").iterdir())) == 1
    dataset = D3MDataset(tmp_path / "alone.d3m", cache_dir=tmp_path / "cache", quiet=True)
    assert torch.equal(dataset[4][0], images[4])


def test_bytes_of_the_backbone_are_in_the_ledger(packed: Path) -> None:
    pack = read(packed)
    ledger = pack.ledger()
    assert ledger.total == packed.stat().st_size
    assert ledger.backbone == 0
    whole = pack.recipe.backbone.nbytes
    assert 0.45 * whole < ledger.sections[EMBEDDED] < 0.6 * whole
    assert pack.recipe.backbone.licence == "cc0-1.0"


def test_selection_of_a_pack_keeps_the_backbone(packed: Path, tmp_path: Path) -> None:
    pack = read(packed)
    part = pack.select(["lemon"]).first(2)
    write(part, tmp_path / "part.d3m")
    images = Decoder(read(tmp_path / "part.d3m")).images(range(2))
    row = pack.classes.index("lemon")
    assert torch.equal(images, Decoder(pack).images([(row, 0), (row, 1)]))


def test_embedded_backbone_of_another_hash_is_refused(packed: Path, home: Path) -> None:
    pack = read(packed)
    coded = pack.extensions[EMBEDDED]
    shared = coded.tensors["shared"].copy()
    shared[coded.params["parts"][0] + 5] ^= 1
    other = Coded("files", {"shared": shared}, coded.params, coded.shared)
    wrong = replace(pack, extensions={EMBEDDED: other})
    with pytest.raises(BackboneChangedError, match="not the one that the recipe names"):
        Decoder(wrong)
    assert not (home / "embedded").exists()


def test_damaged_copy_is_unpacked_again(packed: Path) -> None:
    pack = read(packed)
    folder = unpack_backbone(pack)
    assert folder is not None
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert unpack_backbone(pack) == folder
    Decoder(pack)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_slower_process_leaves_the_copy_of_a_faster_one(
    packed: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    """Both see that a copy is missing or damaged; only the faster one writes it."""
    pack = read(packed)
    folder = unpack_backbone(pack)
    assert folder is not None
    if damaged:
        weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
    else:
        shutil.rmtree(folder)
    real, both = carried_files, threading.Barrier(2, timeout=60)

    def delayed(pack: Any) -> Any:
        both.wait()
        return real(pack)

    monkeypatch.setattr("d3pack.decode.carried.carried_files", delayed)

    def copy(_: int) -> tuple[int, int]:
        made = unpack_backbone(pack)
        assert made is not None
        return made.stat().st_ino, (made / "transformer" / "config.json").stat().st_ino

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(copy, range(2))
    assert first == second
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]


def files() -> dict[str, bytes]:
    random = np.random.default_rng(0)
    tensors = {
        "wide": random.normal(size=(7, 5, 3)).astype(np.float16),
        "zero": np.zeros((4, 6), np.float16),
        "bias": random.normal(size=9).astype(np.float16),
        "exact": random.normal(size=(3, 3)).astype(np.float32),
    }
    return {"a/config.json": b'{"x": 1}', "a/w.safetensors": save(tensors), "empty": b""}


def test_files_round_trip_but_for_the_last_bits_of_matrices() -> None:
    before = files()
    coded = encode_files(before)
    after = decode_files(coded)
    assert after.keys() == before.keys()
    assert after["a/config.json"] == before["a/config.json"]
    assert after["empty"] == b""
    old, new = load(before["a/w.safetensors"]), load(after["a/w.safetensors"])
    for name in ("zero", "bias", "exact"):
        assert np.array_equal(old[name], new[name])
    off = np.abs(old["wide"].astype(np.float32) - new["wide"].astype(np.float32))
    assert 0 < off.max() <= np.abs(old["wide"].astype(np.float32)).max() / 250
    assert coded.nbytes < 0.9 * sum(map(len, before.values()))


def test_inconsistent_sections_are_refused() -> None:
    coded = encode_files(files())

    def other(**changes: np.ndarray) -> Coded:
        runs = {
            **dict(zip(("plain", "codes", "scales"), split_files(coded), strict=True)),
            **changes,
        }
        shared = np.frombuffer(b"".join(run.tobytes() for run in runs.values()), np.uint8)
        params = {**coded.params, "parts": [run.size for run in runs.values()]}
        return Coded("files", {"shared": shared}, params, coded.shared)

    plain, codes, scales = split_files(coded)
    assert decode_files(other()) == decode_files(coded)
    for bad in (
        other(codes=codes[:-1]),
        other(scales=np.append(scales, np.float16(1))),
        other(plain=plain[:40]),
        other(plain=np.append(plain, np.uint8(0))),
        Coded("zip", coded.tensors, coded.params, coded.shared),
        Coded(
            "files",
            coded.tensors,
            {**coded.params, "files": [["a/w.safetensors", "i8"]]},
            coded.shared,
        ),
        Coded("files", coded.tensors, {**coded.params, "parts": [1, 2]}, coded.shared),
        Coded("files", coded.tensors, {}, coded.shared),
    ):
        with raises_code("E_CODEC"):
            decode_files(bad)


def test_flipped_byte_is_found_before_a_model_is_opened(packed: Path, tmp_path: Path) -> None:
    data = bytearray(packed.read_bytes())
    pack: Pack = read(packed)
    data[len(data) - pack.extensions[EMBEDDED].nbytes // 2] ^= 16
    (tmp_path / "bad.d3m").write_bytes(data)
    with pytest.raises(D3MError):
        read(tmp_path / "bad.d3m")

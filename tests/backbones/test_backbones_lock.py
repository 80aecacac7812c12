"""The lock: every wrong file is refused by name before it is parsed."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from d3pack.backbones import (
    cache_home,
    default_backbone,
    kinds,
    lock_backbone,
    lock_directory,
    open_backbone,
    verify_files,
)
from d3pack.backbones.lock import check_path
from d3pack.errors import BackboneChangedError, BackboneError, NotFoundError
from d3pack.format import BackboneRef, FileLock, directory_revision
from d3pack.testing import raises_code

UNET = "unet/diffusion_pytorch_model.safetensors"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_lock_names_every_needed_file_and_nothing_else(sd: Path) -> None:
    (sd / "safety_checker").mkdir()
    (sd / "safety_checker/config.json").write_text("{}")
    (sd / "unet/notes.py").write_text("raise SystemExit")
    ref = lock_directory(sd, licence="creativeml-openrail-m")
    assert (ref.kind, ref.repo, ref.licence) == ("stable-diffusion", "", "creativeml-openrail-m")
    assert sorted(ref.files) == [
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "unet/config.json",
        UNET,
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    assert ref.files[UNET].size == (sd / UNET).stat().st_size
    assert ref.revision == directory_revision(ref.files)
    assert ref.nbytes == sum((sd / path).stat().st_size for path in ref.files)
    assert lock_directory(shutil.copytree(sd, sd.parent / "copy")) == replace(
        ref, licence="unknown"
    )


def test_a_mirror_is_held_to_the_same_hashes(sd: Path, originals: dict[str, Path]) -> None:
    ref = lock_directory(originals["sd"])
    assert open_backbone(ref, path=sd).ref == ref
    with raises_code("E_BACKBONE_MISSING", match="public home"):
        open_backbone(ref)
    with pytest.raises(NotFoundError):
        open_backbone(ref, path=sd / "nowhere")


@pytest.mark.parametrize("family", ["sd", "dit"])
def test_one_flipped_bit_in_each_file(
    family: str, originals: dict[str, Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(originals[family], tmp_path / "copy"))
    ref = lock_directory(copy)
    assert len(ref.files) >= 6
    for path in ref.files:
        kept = (copy / path).read_bytes()
        flip(copy / path)
        with pytest.raises(BackboneChangedError, match=path) as caught:
            open_backbone(ref, path=copy)
        assert caught.value.exit_code == 4
        assert caught.value.hint
        (copy / path).write_bytes(kept)
    verify_files(copy, ref)


@pytest.mark.parametrize("family", ["sd", "dit"])
def test_each_file_missing(family: str, originals: dict[str, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(originals[family], tmp_path / "copy"))
    ref = lock_directory(copy)
    for path in ref.files:
        (copy / path).rename(copy / "away")
        with raises_code("E_BACKBONE_MISSING", match=path):
            open_backbone(ref, path=copy)
        (copy / "away").rename(copy / path)


def test_a_longer_or_shorter_file_is_not_even_hashed(sd: Path, home: Path) -> None:
    ref = lock_directory(sd)
    shutil.rmtree(home, ignore_errors=True)
    with (sd / UNET).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(BackboneChangedError, match="bytes instead of"):
        verify_files(sd, replace(ref, files={UNET: ref.files[UNET]}))
    assert not home.exists()


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that were written long ago; their ctime cannot be set."""
    monkeypatch.setattr("d3pack.backbones.lock._TICK", 0)


@pytest.mark.usefixtures("settled")
def test_verification_is_remembered(sd: Path, home: Path) -> None:
    hashed: list[str] = []
    ref = lock_directory(sd, progress=lambda path, done, size: hashed.append(path))
    assert sorted(set(hashed)) == sorted(ref.files)
    hashed.clear()
    verify_files(sd, ref, lambda path, done, size: hashed.append(path))
    assert not hashed
    os.utime(sd / UNET, ns=(1, 1))  # touched: who knows
    verify_files(sd, ref, lambda path, done, size: hashed.append(path))
    assert set(hashed) == {UNET}
    hashed.clear()
    kept = (sd / UNET).read_bytes()
    (sd / UNET).unlink()
    (sd / UNET).write_bytes(kept)  # the same bytes in another inode
    os.utime(sd / UNET, ns=(1, 1))
    verify_files(sd, ref, lambda path, done, size: hashed.append(path))
    assert set(hashed) <= {UNET}  # a file system may hand the same inode out again


@pytest.mark.usefixtures("settled")
def test_a_rewrite_with_its_time_set_back_is_seen(sd: Path) -> None:
    ref = lock_directory(sd)
    before = (sd / UNET).stat()
    time.sleep(0.05)  # longer than a tick of the clock here
    flip(sd / UNET)
    os.utime(sd / UNET, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(BackboneChangedError, match=UNET):
        verify_files(sd, ref)


def test_what_was_written_just_now_is_not_remembered(sd: Path, home: Path) -> None:
    ref = lock_directory(sd)
    for path in ref.files:  # by their own account old
        os.utime(sd / path, ns=(1, 1))
    verify_files(sd, ref)
    assert not (home / "verified.json").exists()


@pytest.mark.parametrize("path", ["vae/config.json", "tokenizer/vocab.json", UNET])
def test_a_file_rewritten_after_its_check_is_not_used(path: str, sd: Path, home: Path) -> None:
    """Between its hash and its parsing there is time: that of hashing the files after it."""
    ref = lock_directory(sd)
    shutil.rmtree(home, ignore_errors=True)  # so that every file is hashed
    last = max(ref.files)

    def rewrite(name: str, done: int, size: int) -> None:
        if name == last and done == size:
            data = (sd / path).read_bytes()
            (sd / path).write_bytes(data[:-2] + bytes(2) if path == UNET else data + b" ")

    with pytest.raises(BackboneChangedError, match=path):
        open_backbone(ref, path=sd, progress=rewrite)


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("junk", [b"", b"{", b"[1, 2]", b'{"a": 7}', b"\xff\xfe", b'"x"'])
def test_a_broken_memory_costs_time_and_nothing_else(sd: Path, home: Path, junk: bytes) -> None:
    ref = lock_directory(sd)
    (home / "verified.json").write_bytes(junk)
    verify_files(sd, ref)
    flip(sd / UNET)
    with pytest.raises(BackboneChangedError):
        verify_files(sd, ref)


@pytest.mark.usefixtures("settled")
def test_a_lying_memory_is_not_believed(sd: Path, home: Path) -> None:
    ref = lock_directory(sd)
    memory = home / "verified.json"
    known = json.loads(memory.read_text())
    memory.write_text(json.dumps(dict.fromkeys(known, "0" * 64)))
    verify_files(sd, ref)  # hashed again, found right
    assert json.loads(memory.read_text()) == known


def test_where_the_memory_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("D3PACK_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_home() == tmp_path / "d3pack"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert cache_home() == tmp_path / "me/.cache/d3pack"


def test_a_read_only_home_only_costs_time(sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D3PACK_HOME", "/proc/nowhere")
    verify_files(sd, lock_directory(sd))


def test_pickles_are_refused(sd: Path) -> None:
    (sd / UNET).unlink()
    torch.save({"w": torch.zeros(1)}, sd / "unet/diffusion_pytorch_model.bin")
    with raises_code("E_BACKBONE_REFUSED", match="pickle"):
        open_backbone(str(sd))
    with raises_code("E_BACKBONE_REFUSED", match="pickle"):
        check_path("unet/diffusion_pytorch_model.bin")
    pickled = _ref({"unet/diffusion_pytorch_model.bin": FileLock(1, "0" * 64)})
    with raises_code("E_BACKBONE_REFUSED", match="pickle"):
        open_backbone(pickled, path=sd)


def _ref(files: dict[str, FileLock]) -> BackboneRef:
    return BackboneRef("stable-diffusion", "", "0" * 40, files)


@pytest.mark.parametrize(
    "path",
    [
        "../outside.json",
        "/etc/hosts.txt",
        "unet//config.json",
        "unet/./config.json",
        "a\\b.json",
        "unet/.hidden.json",
        "",
        "a/b/c/d/e.json",
        "unet/model.py",
        "unet/model",
        "unet/config.json\n",
    ],
)
def test_odd_names_are_refused(path: str) -> None:
    with raises_code("E_BACKBONE_REFUSED"):
        check_path(path)


def test_links_may_not_lead_out(sd: Path, tmp_path: Path) -> None:
    ref = lock_directory(sd)
    outside = tmp_path / "outside.json"
    (sd / "vae/config.json").rename(outside)
    (sd / "vae/config.json").symlink_to(outside)
    with raises_code("E_BACKBONE_REFUSED", match="leads out"):
        verify_files(sd, ref)
    (sd / "vae/config.json").unlink()
    (sd / "vae/config.json").symlink_to(sd / "vae/config.json")  # a loop
    with raises_code("E_BACKBONE_MISSING"):
        verify_files(sd, ref)
    (sd / "vae/config.json").unlink()
    (sd / "vae/config.json").mkdir()
    with raises_code("E_BACKBONE_REFUSED", match="regular"):
        verify_files(sd, ref)


def test_links_of_a_hub_cache_are_followed(sd: Path, tmp_path: Path) -> None:
    ref = lock_directory(sd)
    entry = tmp_path / "models--org--name"
    for i, path in enumerate(ref.files):
        blob = entry / "blobs" / str(i)
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(sd / path, blob)
        link = entry / "snapshots" / ref.revision / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    assert len(verify_files(entry / "snapshots" / ref.revision, ref)) == len(ref.files)


def test_variants_and_shards(sd: Path) -> None:
    state = {n: t.half() for n, t in load_file(sd / UNET).items()}
    small = "unet/diffusion_pytorch_model.fp16.safetensors"
    save_file(state, sd / small)
    assert small not in lock_directory(sd).files
    for part in ("vae/diffusion_pytorch_model", "text_encoder/model"):
        shutil.copy(sd / f"{part}.safetensors", sd / f"{part}.fp16.safetensors")
    assert small in lock_directory(sd, variant="fp16").files
    (sd / UNET).unlink()  # only the half-size weights are there
    assert small in lock_directory(sd).files
    (sd / small).unlink()
    with raises_code("E_BACKBONE_MISSING", match="diffusion_pytorch_model"):
        lock_directory(sd)
    names = sorted(state)
    halves = (names[::2], names[1::2])
    for i, half in enumerate(halves, 1):
        shard = f"unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors"
        save_file({n: state[n] for n in half}, sd / shard)
    ref = lock_directory(sd)
    assert sum("-of-00002" in path for path in ref.files) == 2
    assert open_backbone(ref, path=sd).latent_shape == (4, 8, 8)


def test_directories_that_are_no_backbone(tmp_path: Path, sd: Path) -> None:
    (tmp_path / "empty").mkdir()
    with raises_code("E_BACKBONE_CONFIG", match="diffusers' layout"):
        open_backbone(str(tmp_path / "empty"))
    with pytest.raises(NotFoundError, match="no backbone"):
        open_backbone("./no/such/place")
    with pytest.raises(NotFoundError, match="no backbone"):
        open_backbone("nothing")
    shutil.rmtree(sd / "text_encoder")
    with raises_code("E_BACKBONE_MISSING", match="text_encoder"):
        open_backbone(str(sd))


def test_unknown_kinds_and_defaults() -> None:
    assert {"stable-diffusion", "dit"} <= set(kinds())
    with pytest.raises(BackboneError, match="unknown kind"):
        open_backbone(replace(_ref({}), kind="gan"), path=".")
    assert default_backbone("cpu") == "mini"
    assert default_backbone("cuda:0") == "stable-diffusion-v1-5/stable-diffusion-v1-5"


def test_locking_by_name(sd: Path) -> None:
    ref, root = lock_backbone(str(sd))
    assert root == sd
    assert ref == lock_directory(sd)

"""The lock: every wrong file is refused by name before it is parsed."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from d3pack.backbones import (
    cache_home,
    complete,
    default_backbone,
    kinds,
    lock_backbone,
    lock_directory,
    open_backbone,
    verify_files,
    write_list,
)
from d3pack.backbones.lock import check_path
from d3pack.backbones.stable_diffusion import LAYOUT
from d3pack.errors import BackboneChangedError, BackboneError, NotFoundError
from d3pack.format import BackboneRef, FileLock, files_json, lock_of
from d3pack.testing import raises_code

UNET = "unet/diffusion_pytorch_model.safetensors"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_lock_names_the_needed_files_only(sd: Path) -> None:
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
    assert ref.lock == lock_of(ref.files)
    assert ref.revision == ref.lock[:40]
    assert ref.nbytes == sum((sd / path).stat().st_size for path in ref.files)
    assert lock_directory(shutil.copytree(sd, sd.parent / "copy")) == replace(
        ref, licence="unknown"
    )


def test_copy_in_another_directory_must_have_the_same_hashes(
    sd: Path, originals: dict[str, Path]
) -> None:
    ref = lock_directory(originals["sd"])
    assert open_backbone(ref, path=sd).ref == ref
    with raises_code("E_BACKBONE_MISSING", match="public home"):
        open_backbone(ref)
    with pytest.raises(NotFoundError):
        open_backbone(ref, path=sd / "nowhere")


@pytest.mark.parametrize("family", ["sd", "dit", "sdxl"])
def test_changed_bit_in_any_file_is_refused(
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


@pytest.mark.parametrize("family", ["sd", "dit", "sdxl"])
def test_missing_files_are_named(family: str, originals: dict[str, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(originals[family], tmp_path / "copy"))
    ref = lock_directory(copy)
    for path in ref.files:
        (copy / path).rename(copy / "away")
        with raises_code("E_BACKBONE_MISSING", match=path):
            open_backbone(ref, path=copy)
        (copy / "away").rename(copy / path)


def test_file_of_wrong_size_is_refused_without_hashing(sd: Path, home: Path) -> None:
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
def test_verified_files_are_not_hashed_again(sd: Path, home: Path) -> None:
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
def test_rewritten_file_with_old_time_is_hashed_again(sd: Path) -> None:
    ref = lock_directory(sd)
    before = (sd / UNET).stat()
    time.sleep(0.05)  # longer than a tick of the clock here
    flip(sd / UNET)
    os.utime(sd / UNET, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(BackboneChangedError, match=UNET):
        verify_files(sd, ref)


def test_just_written_files_are_not_remembered(sd: Path, home: Path) -> None:
    ref = lock_directory(sd)
    for path in ref.files:  # by their own account old
        os.utime(sd / path, ns=(1, 1))
    verify_files(sd, ref)
    assert not (home / "verified.json").exists()


@pytest.mark.parametrize("path", ["vae/config.json", "tokenizer/vocab.json", UNET])
def test_file_rewritten_after_its_check_is_refused(path: str, sd: Path, home: Path) -> None:
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
def test_damaged_record_of_hashes_is_ignored(sd: Path, home: Path, junk: bytes) -> None:
    ref = lock_directory(sd)
    (home / "verified.json").write_bytes(junk)
    verify_files(sd, ref)
    flip(sd / UNET)
    with pytest.raises(BackboneChangedError):
        verify_files(sd, ref)


@pytest.mark.usefixtures("settled")
def test_wrong_record_of_hashes_is_corrected(sd: Path, home: Path) -> None:
    ref = lock_directory(sd)
    memory = home / "verified.json"
    known = json.loads(memory.read_text())
    memory.write_text(json.dumps(dict.fromkeys(known, "0" * 64)))
    verify_files(sd, ref)  # hashed again, found right
    assert json.loads(memory.read_text()) == known


def test_cache_home_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("D3PACK_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_home() == tmp_path / "d3pack"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert cache_home() == tmp_path / "me/.cache/d3pack"
    monkeypatch.setenv("D3PACK_HOME", "~/packs")
    assert cache_home() == tmp_path / "me/packs"
    monkeypatch.delenv("D3PACK_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "~/cache")
    assert cache_home() == tmp_path / "me/cache/d3pack"


def test_read_only_cache_home_is_no_error(sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_unsafe_file_names_are_refused(path: str) -> None:
    with raises_code("E_BACKBONE_REFUSED"):
        check_path(path)


def test_links_out_of_the_directory_are_refused(sd: Path, tmp_path: Path) -> None:
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


def test_variants_and_shards_are_locked(sd: Path) -> None:
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


def test_directories_without_a_backbone_are_refused(tmp_path: Path, sd: Path) -> None:
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


def test_unknown_kinds_are_refused_and_defaults_depend_on_the_device() -> None:
    assert {"stable-diffusion", "dit"} <= set(kinds())
    with pytest.raises(BackboneError, match="unknown kind"):
        open_backbone(replace(_ref({}), kind="gan"), path=".")
    assert default_backbone("cpu") == "mini"
    assert default_backbone("cuda:0") == "Photoroom/prx-256-t2i"


# -- a pack has the lock; the list of files comes with the backbone -------------------------------


def bare(ref: BackboneRef) -> BackboneRef:
    """The reference as a pack has it: without the list of files."""
    read = BackboneRef.from_json(ref.to_json())
    assert (read, dict(read.files)) == (ref, {})
    return read


def forget(home: Path) -> None:
    shutil.rmtree(home, ignore_errors=True)


@pytest.mark.parametrize("family", ["sd", "dit", "sdxl"])
def test_list_is_made_from_the_files_of_the_family(
    family: str, originals: dict[str, Path], tmp_path: Path, home: Path
) -> None:
    copy = Path(shutil.copytree(originals[family], tmp_path / "copy"))
    ref = lock_directory(copy)
    (copy / "unet/notes.txt" if family == "sd" else copy / "notes.txt").write_text("mine")
    forget(home)
    assert open_backbone(bare(ref), path=copy).ref.files == ref.files
    forget(home)
    flip(copy / "vae/config.json")
    with pytest.raises(
        BackboneChangedError, match=rf"does not hold the files of lock {ref.lock[:12]}"
    ):
        open_backbone(bare(ref), path=copy)
    (copy / "vae/config.json").unlink()
    with raises_code("E_BACKBONE_MISSING", match="vae/config.json"):
        open_backbone(bare(ref), path=copy)


def test_changed_file_is_named_where_a_list_is_there(sd: Path, home: Path) -> None:
    ref = lock_directory(sd)
    forget(home)
    write_list(sd, ref)
    flip(sd / UNET)
    with pytest.raises(BackboneChangedError, match=UNET):
        open_backbone(bare(ref), path=sd)
    (sd / "lock.json").unlink()
    with pytest.raises(BackboneChangedError, match="does not hold the files"):
        open_backbone(bare(ref), path=sd)
    flip(sd / UNET)
    lock_directory(sd)  # remembers the list
    flip(sd / UNET)
    with pytest.raises(BackboneChangedError, match=UNET):
        open_backbone(bare(ref), path=sd)


def test_pack_that_names_another_size_is_refused_with_and_without_a_list(
    sd: Path, home: Path
) -> None:
    """Its ledger would count other bytes than the backbone has."""
    ref = lock_directory(sd)
    wrong = replace(bare(ref), nbytes=ref.nbytes - 1)
    for listed in ("remembered", "nowhere", "beside"):
        if listed == "nowhere":
            forget(home)
        elif listed == "beside":
            write_list(sd, ref)
        with pytest.raises(BackboneChangedError, match=f"{ref.nbytes - 1:,} bytes"):
            open_backbone(wrong, path=sd)


def test_list_of_another_size_is_made_without_hashing(sd: Path, home: Path) -> None:
    ref = lock_directory(sd)
    forget(home)
    hashed: list[str] = []
    with (sd / UNET).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(BackboneChangedError):
        complete(bare(ref), sd, lambda path, done, size: hashed.append(path))
    assert not hashed


def test_other_variants_and_optional_files_beside_the_locked_ones(sd: Path, home: Path) -> None:
    full = lock_directory(sd)
    for part in (
        "unet/diffusion_pytorch_model",
        "vae/diffusion_pytorch_model",
        "text_encoder/model",
    ):
        state = {n: t.half() for n, t in load_file(sd / f"{part}.safetensors").items()}
        save_file(state, sd / f"{part}.fp16.safetensors")
    half = lock_directory(sd, variant="fp16")
    (sd / "tokenizer/special_tokens_map.json").write_text("{}")
    for ref in (full, half):
        forget(home)
        assert open_backbone(bare(ref), path=sd).ref.files == ref.files


def test_few_variants_are_looked_for(sd: Path) -> None:
    paths = [p.relative_to(sd).as_posix() for p in sd.rglob("*") if p.is_file()]
    made_up = [f"text_encoder/model.v{i:03}.safetensors" for i in range(200)]
    plain = list(LAYOUT.choices(paths))
    parts = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model")
    made_up += [f"{part}.v{i:03}.safetensors" for i in range(200) for part in parts]
    assert len(list(LAYOUT.choices(paths + made_up))) == 9 * len(plain)


def other_list(ref: BackboneRef, **changes: FileLock) -> str:
    return json.dumps({"files": files_json({**ref.files, **changes})})


@pytest.mark.parametrize(
    "make",
    [
        lambda ref: "",
        lambda ref: "{",
        lambda ref: "[]",
        lambda ref: '{"files": 5}',
        lambda ref: "[" * 100_000,
        lambda ref: '{"files": {}}',
        lambda ref: other_list(ref, **{UNET: FileLock(1, "0" * 64)}),
        lambda ref: other_list(ref, **{"more.json": FileLock(1, "0" * 64)}),
        lambda ref: other_list(ref, **{"../secret.json": FileLock(1, "0" * 64)}),
        lambda ref: other_list(ref, **{"/etc/passwd.txt": FileLock(1, "0" * 64)}),
        lambda ref: other_list(ref, **{f"f{i}.json": FileLock(1, "0" * 64) for i in range(1024)}),
        lambda ref: other_list(ref, **{f"f{i}.json": FileLock(1, "0" * 64) for i in range(20_000)}),
        lambda ref: json.dumps({"files": {path: [1, "0" * 64] for path in ref.files}}),
        lambda ref: '{"files": ' + "9" * 5000 + "}",
    ],
)
def test_wrong_list_beside_the_files_is_not_believed(
    make: Callable[[BackboneRef], str], sd: Path, home: Path
) -> None:
    """It neither replaces the locked list nor makes other files be read."""
    ref = lock_directory(sd)
    forget(home)
    (sd / "lock.json").write_text(make(ref))
    assert open_backbone(bare(ref), path=sd).ref.files == ref.files
    flip(sd / UNET)
    with pytest.raises(BackboneChangedError):
        open_backbone(bare(ref), path=sd)


@pytest.mark.posix
def test_long_list_and_one_that_is_no_file_are_not_read(sd: Path, home: Path) -> None:
    ref = lock_directory(sd)
    entries = ",".join(f'"f{i}": [1, "{"0" * 64}"]' for i in range(1_000_000))
    (sd / "lock.json").write_text(f'{{"files": {{{entries}}}}}')
    forget(home)
    start = time.process_time()
    assert complete(bare(ref), sd).files == ref.files
    assert time.process_time() - start < 1
    (sd / "lock.json").unlink()
    os.mkfifo(sd / "lock.json")
    forget(home)
    assert complete(bare(ref), sd).files == ref.files


@pytest.mark.parametrize(
    "path", ["../outside.json", "a/.hidden.json", "unet/model.py", "a\\b.json"]
)
def test_locked_list_with_an_unsafe_path_is_refused(path: str, sd: Path, home: Path) -> None:
    """The maker of a pack can lock any list: its hash is right, its paths are not."""
    (sd.parent / "outside.json").write_text("{}")
    good = lock_directory(sd)
    bad = replace(good, files={**good.files, path: FileLock(2, "44" * 32)})
    write_list(sd, bad)
    with pytest.raises(BackboneError):
        open_backbone(bare(bad), path=sd)


def test_damaged_memory_of_lists_is_ignored(sd: Path, home: Path) -> None:
    ref = lock_directory(sd)
    (place,) = (home / "locks").iterdir()
    for junk in (b"", b"{", b'{"files": {"../x.json": [1, "00"]}}', b"\xff"):
        place.write_bytes(junk)
        assert complete(bare(ref), sd).files == ref.files


def test_lock_by_name_equals_lock_of_the_directory(sd: Path) -> None:
    ref, root = lock_backbone(str(sd))
    assert root == sd
    assert ref == lock_directory(sd)

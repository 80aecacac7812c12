"""A backbone from the Hub is downloaded by its lock: the listed files, or a clear error."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hub_loopback import LoopbackHub
from huggingface_hub import constants, file_download
from tiny_backbones import tiny_sd
from tiny_flow import tiny_flow

from d3pack.backbones import fetch_backbone, lock_backbone, lock_directory, open_backbone
from d3pack.backbones.lock import remember_list
from d3pack.cli import main
from d3pack.dataset import D3MDataset
from d3pack.errors import BackboneChangedError, BackboneError, NoSpaceError
from d3pack.format import files_json, pack_bytes
from d3pack.format.recipe import BackboneRef
from d3pack.system import size
from d3pack.testing import raises_code

Files = dict[str, bytes]
REPO = "org/tiny"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A small Stable Diffusion, and other files that repositories have."""
    root = tiny_sd(tmp_path_factory.mktemp("backbones") / "sd")
    files = {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    return {**files, "README.md": b"# tiny", "unet/extra.bin": b"pickle", "run.py": b"print()"}


@pytest.fixture
def known(
    hub: LoopbackHub, files: Files, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> BackboneRef:
    """Its reference with the list of files; the caches are empty."""
    monkeypatch.setenv("D3PACK_HOME", str(tmp_path / "first"))
    hub.put(REPO, files, kind="models")
    ref, _ = lock_backbone(REPO)
    forget(hub, monkeypatch, tmp_path)
    return ref


@pytest.fixture(params=["remembered", "asked"])
def ref(request: pytest.FixtureRequest, known: BackboneRef) -> BackboneRef:
    """The reference as a pack has it; its list is in the memory of this machine, or not."""
    if request.param == "remembered":
        remember_list(known)
    return bare(known)


def bare(ref: BackboneRef) -> BackboneRef:
    """The reference as a pack has it: without the list of files."""
    read = BackboneRef.from_json(ref.to_json())
    assert not read.files
    return read


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def forget(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "second"))
    monkeypatch.setenv("D3PACK_HOME", str(tmp_path / "home"))
    hub.seen.clear()


def test_only_the_listed_files_are_downloaded_once(
    hub: LoopbackHub, ref: BackboneRef, known: BackboneRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = open_backbone(ref)
    assert backbone.ref == ref
    assert backbone.ref.files == known.files
    got = {
        path.relative_to(root).as_posix()
        for root in Path(constants.HF_HUB_CACHE).glob("*/snapshots/*")
        for path in root.rglob("*")
        if not path.is_dir()
    }
    assert got == set(known.files)
    assert not {"README.md", "unet/extra.bin", "run.py"} & got

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    open_backbone(ref)


def test_text_encoder_is_not_downloaded_for_outputs(
    hub: LoopbackHub, ref: BackboneRef, known: BackboneRef, request: pytest.FixtureRequest
) -> None:
    fetch_backbone(ref, encoder=False)
    text = {path for path in known.files if path.startswith(("text_encoder/", "tokenizer/"))}
    assert len(text) >= 3
    asked = requested(hub)
    assert asked >= set(known.files) - text
    # small files of no known hash are fetched for the list, weights never are
    is_known = "remembered" in request.node.name
    assert asked & text == (set() if is_known else text - {"text_encoder/model.safetensors"})
    open_backbone(ref, encoder=False)
    assert requested(hub) == asked
    open_backbone(ref)
    assert "text_encoder/model.safetensors" in requested(hub)


def test_bytes_to_fetch_are_said_before_they_are_fetched(
    hub: LoopbackHub, known: BackboneRef, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "d3pack")
    lock_backbone(REPO)
    text = ("text_encoder/", "tokenizer/")
    decoding = sum(f.size for path, f in known.files.items() if not path.startswith(text))
    (line,) = caplog.messages
    assert line.startswith(f"{REPO} (licence ")
    assert f"{size(known.nbytes)} to fetch; {size(decoding)} are decoded with" in line
    caplog.clear()
    lock_backbone(REPO)
    assert not caplog.messages


@pytest.mark.parametrize("encoder", [True, False])
def test_bytes_of_the_backbone_of_a_pack_are_said_before_they_are_fetched(
    hub: LoopbackHub, known: BackboneRef, caplog: pytest.LogCaptureFixture, encoder: bool
) -> None:
    caplog.set_level("INFO", "d3pack")
    fetch_backbone(known, encoder=encoder)
    (line,) = caplog.messages
    text = ("text_encoder/", "tokenizer/")
    decoding = sum(f.size for path, f in known.files.items() if not path.startswith(text))
    assert line.startswith(f"{REPO} (licence ")
    assert f"{size(decoding)} are decoded with" in line
    assert f"{size(known.nbytes if encoder else decoding)} to fetch" in line
    caplog.clear()
    fetch_backbone(known, encoder=encoder)
    assert not caplog.messages


def test_flow_family_of_the_hub_is_known_by_one_small_file(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D3PACK_HOME", str(tmp_path / "home"))
    root = tiny_flow("prx", tmp_path / "prx")
    files = {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file()
    }
    hub.put("org/prx", files, kind="models")
    ref, _ = lock_backbone("org/prx")
    assert ref.kind == "prx"
    assert ref.files == lock_directory(root).files


def test_branch_is_locked_as_a_commit(hub: LoopbackHub, ref: BackboneRef) -> None:
    assert ref.revision == hub.repo(REPO, "models").refs["main"]


def test_renamed_repository_opens_with_a_warning(
    hub: LoopbackHub, ref: BackboneRef, files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "d3pack")
    old = hub.repos.pop(f"models/{REPO}")
    hub.repos["models/org/new"] = old
    hub.repo(REPO, "models").moved_to = "org/new"
    old.name = "org/new"
    open_backbone(ref)
    assert "org/tiny is now called org/new on the Hub" in caplog.messages
    assert lock_backbone(REPO)[0].repo == "org/new"
    hub.seen.clear()
    open_backbone(ref)
    assert hub.seen == []


def test_rewritten_history_is_an_error(hub: LoopbackHub, ref: BackboneRef, files: Files) -> None:
    del hub.repos[f"models/{REPO}"]
    hub.put(REPO, {**files, "README.md": b"anew"}, kind="models")
    with raises_code("E_BACKBONE_GONE", match=r"no longer has the revision .* the locked files"):
        open_backbone(ref)


def requested(hub: LoopbackHub) -> set[str]:
    asked = {seen.path.partition("/resolve/")[2].partition("/")[2] for seen in hub.seen}
    return asked - {""}


def test_published_list_saves_the_hashing_of_small_files(
    hub: LoopbackHub, files: Files, known: BackboneRef
) -> None:
    listed = {**files, "lock.json": json.dumps({"files": files_json(known.files)}).encode()}
    commit = hub.put(REPO, listed, kind="models")
    ref = bare(replace(known, revision=commit))
    hub.seen.clear()
    assert open_backbone(ref).ref.files == known.files
    assert requested(hub) == {"lock.json", *known.files}


@pytest.mark.parametrize(
    "published", [b"{", b"[" * 99_999, b'{"files": {"../x.json": [1, "' + b"0" * 64 + b'"]}}']
)
def test_wrong_published_list_is_not_believed(
    hub: LoopbackHub, files: Files, known: BackboneRef, published: bytes
) -> None:
    commit = hub.put(REPO, {**files, "lock.json": published}, kind="models")
    ref = bare(replace(known, revision=commit))
    assert open_backbone(ref).ref.files == known.files


def test_repository_with_other_files_is_refused_before_its_weights_are_fetched(
    hub: LoopbackHub, files: Files, known: BackboneRef
) -> None:
    config = "vae/config.json"
    changed = files[config].replace(b"4", b"5", 1)
    for other in (changed, files[config] + b" "):
        commit = hub.put(REPO, {**files, config: other}, kind="models")
        hub.seen.clear()
        with pytest.raises(BackboneChangedError, match=r"org/tiny at .* does not hold the files"):
            open_backbone(bare(replace(known, revision=commit)))
        assert not [path for path in requested(hub) if path.endswith(".safetensors")]


def test_copy_in_the_cache_needs_no_list(
    hub: LoopbackHub, known: BackboneRef, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_backbone(known)
    shutil.rmtree(home, ignore_errors=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.seen.clear()
    assert open_backbone(bare(known)).ref.files == known.files
    assert hub.seen == []


def test_deleted_repository_is_an_error(hub: LoopbackHub, ref: BackboneRef) -> None:
    del hub.repos[f"models/{REPO}"]
    with raises_code("E_BACKBONE_GONE", match=r"is not on the Hub.* that holds the locked files"):
        open_backbone(ref)


def test_gated_repository_is_an_error(
    hub: LoopbackHub, ref: BackboneRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repo(REPO, "models").gated = True
    with raises_code("E_BACKBONE_GATED", match=r"accept its licence at huggingface\.co/org/tiny"):
        open_backbone(ref)
    monkeypatch.setenv("HF_TOKEN", "hf_loopback")
    with raises_code("E_BACKBONE_GATED"):
        open_backbone(ref)
    hub.granted.add(REPO)
    open_backbone(ref)


def test_byte_changed_in_transfer_is_downloaded_again(hub: LoopbackHub, ref: BackboneRef) -> None:
    hub.fault("other_bytes", "cdn")
    hub.fault("other_bytes", "config.json")
    open_backbone(ref)


def test_file_that_differs_by_a_byte_is_refused(hub: LoopbackHub, ref: BackboneRef) -> None:
    hub.fault("other_bytes", "cdn", times=99)
    with pytest.raises(BackboneChangedError, match=r"\.safetensors is not the locked file"):
        open_backbone(ref)
    hub.faults.clear()
    open_backbone(ref)


@pytest.mark.heavy
def test_offline_error_names_what_is_missing(
    hub: LoopbackHub, ref: BackboneRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with raises_code("E_BACKBONE_OFFLINE", match=r"org/tiny at .* is not on this machine"):
        open_backbone(ref)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    open_backbone(ref)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    open_backbone(ref)


@pytest.mark.heavy
def test_damaged_copy_is_refused_offline(
    hub: LoopbackHub, ref: BackboneRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_backbone(ref)
    (config,) = Path(constants.HF_HUB_CACHE).glob("*/snapshots/*/unet/config.json")
    blob = config.resolve()
    blob.write_bytes(blob.read_bytes().replace(b"8", b"9", 1))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BackboneChangedError, match=r"unet/config\.json is not the locked file"):
        open_backbone(ref)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    open_backbone(ref)


def test_full_disk_is_a_no_space_error(
    hub: LoopbackHub, ref: BackboneRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(file_download, "http_get", full)
        with pytest.raises(NoSpaceError, match="no space left in the Hub cache; free some"):
            open_backbone(ref)
    open_backbone(ref)


def test_a_cache_that_cannot_be_written_is_named(
    hub: LoopbackHub, ref: BackboneRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))

    monkeypatch.setattr(file_download, "http_get", refused)
    with pytest.raises(BackboneError, match="the Hub cache cannot be written; set HF_HOME"):
        open_backbone(ref)


@pytest.mark.parametrize("status", [429, 500])
def test_busy_hub_is_one_line_of_error(hub: LoopbackHub, ref: BackboneRef, status: int) -> None:
    hub.fault("status", "", status=status, times=999)
    with pytest.raises(BackboneError) as caught:
        open_backbone(ref)
    assert "\n" not in str(caught.value)


def test_dead_endpoint_is_one_line_of_error(
    hub: LoopbackHub, ref: BackboneRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with raises_code("E_BACKBONE_OFFLINE", match="the Hub cannot be reached"):
        open_backbone(ref)


def test_files_in_the_shared_store_are_checked(hub: LoopbackHub, ref: BackboneRef) -> None:
    store = pytest.importorskip("huggingface_hub.utils._shared_blobs")
    open_backbone(ref)
    cache = Path(constants.HF_HUB_CACHE)
    (weights,) = cache.glob("*/snapshots/*/unet/*.safetensors")
    blob = weights.parent / os.readlink(weights)
    size = weights.stat().st_size
    assert store.publish_blob_to_shared_store(
        blob_path=blob, xet_hash="cd" * 32, cache_dir=cache, expected_size=size,
        replace_existing=False,
    )  # fmt: skip
    assert not weights.resolve().is_relative_to(blob.parent)
    open_backbone(ref)


@pytest.mark.heavy
def test_pull_downloads_the_backbone(
    hub: LoopbackHub,
    ref: BackboneRef,
    known: BackboneRef,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Afterwards the pack decodes offline, and opens no socket."""
    from hub_packs import make_pack

    pack = make_pack(3, 2, full=False, dims=32)
    pack = replace(pack, recipe=replace(pack.recipe, backbone=ref, group=2))
    hub.put("org/set", {"a.d3m": pack_bytes(pack)})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["d3pack", "pull", "org/set", "--cache-only", "--with-backbone"]
    )
    with contextlib.suppress(SystemExit):
        main()
    assert "verified" in capsys.readouterr().out
    asked = {seen.path.partition("/resolve/")[2].partition("/")[2] for seen in hub.seen}
    assert {path for path in asked if path} == {"a.d3m", "a.d3m.sig", *known.files}

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    data = D3MDataset("org/set", cache=None)
    assert data[0][0].shape == (3, 64, 64)

"""`d3pack cache`: stores are listed, removed and checked without torch."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli import invoke

from d3pack.dataset import D3MDataset, list_stores
from d3pack.format import Pack


def cache(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "d3pack", "cache", *args],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def dataset(pack: Pack, backbone: Path) -> D3MDataset:
    """A dataset with a complete store, which no process uses."""
    dataset = D3MDataset(pack, backbone=backbone, quiet=True)
    dataset.__getitems__(list(range(21)))
    dataset.close()
    return dataset


def test_cache_ls_lists_stores(dataset: D3MDataset) -> None:
    (fact,) = json.loads(cache("ls", "--format", "json").stdout)
    assert fact["root"] == dataset.root
    assert (fact["decoded"], fact["images"], fact["in_use"]) == (21, 21, False)
    assert fact["bytes"] >= 21 * 3 * 64 * 64
    dataset[0]
    shown = cache("ls")
    assert "21 of 21" in shown.stdout
    assert "in use" in shown.stdout
    assert "1 stores" in shown.stderr
    assert max(len(line) for line in shown.stdout.splitlines()) <= 100
    assert cache("ls", "--format", "quiet").stdout.split() == [fact["key"]]


def test_cache_rm_keeps_a_store_in_use(dataset: D3MDataset) -> None:
    dataset[0]
    kept = cache("rm", dataset.root[:8])
    assert kept.returncode == 1
    assert "in use" in kept.stdout
    dataset.close()
    assert cache("rm", dataset.root[:8]).returncode == 0
    assert list_stores(Path(os.environ["D3PACK_HOME"])) == []


@pytest.mark.heavy
def test_cache_rm_refuses_unknown_stores(dataset: D3MDataset) -> None:
    for args, code in ((("rm",), 2), (("rm", "--all", "x"), 2), (("rm", "zz"), 5), (("rm", ""), 5)):
        done = cache(*args)
        assert done.returncode == code, args
        assert len(done.stderr.splitlines()) == 1
    assert cache("rm", "--all").returncode == 0
    assert json.loads(cache("ls", "--format", "json").stdout) == []


def test_cache_verify_drops_damaged_images(
    dataset: D3MDataset, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    (entry,) = list_stores(Path(os.environ["D3PACK_HOME"]))
    assert cache("verify").returncode == 0
    with open(entry.path / "pixels", "r+b") as file:
        file.seek(4 * dataset.images.identity.row + 100)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    done = cache("verify", entry.path.name[:6], "--format", "json")
    assert done.returncode == 1
    assert json.loads(done.stdout)[0]["bad"] == [4]
    again = cache("verify")
    assert again.returncode == 0
    assert "20 images, 0 bad" in again.stdout
    assert torch.equal(dataset[4][0], expected[4])


def test_cache_dir_names_another_cache(dataset: D3MDataset, tmp_path: Path) -> None:
    gone = cache("ls", "--cache-dir", str(tmp_path / "x"))
    assert gone.returncode == 5
    assert "there is no folder" in gone.stderr
    home = os.environ["D3PACK_HOME"]
    assert len(json.loads(cache("ls", "--cache-dir", home, "--format", "json").stdout)) == 1


def test_cache_does_not_load_torch() -> None:
    check = (
        "import sys; sys.argv = ['d3pack', 'cache', 'ls']\n"
        "from d3pack.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


def test_cache_leaves_stores_of_another_user_alone(
    dataset: D3MDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    (entry,) = list_stores(Path(os.environ["D3PACK_HOME"]))
    real = os.open

    def refusing(path: Any, flags: int, *more: Any, **others: Any) -> int:
        if Path(path).parent == entry.path and flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, flags, *more, **others)

    monkeypatch.setattr(os, "open", refusing)
    gone = invoke("cache", "rm", "--all")
    assert gone.exit_code == 1
    assert "in use, left alone" in gone.stdout
    checked = invoke("cache", "verify")
    assert checked.exit_code == 1
    assert "of another user, left alone" in checked.stderr


@pytest.mark.parametrize("text", ["{", '{"format": 99}'])
def test_cache_lists_and_removes_unusable_stores(dataset: D3MDataset, text: str) -> None:
    home = Path(os.environ["D3PACK_HOME"])
    (entry,) = list_stores(home)
    (entry.path / "meta.json").write_text(text)
    photos = home / "images" / "holidays"
    photos.mkdir()
    (photos / "meta.json").touch()
    shown = invoke("cache", "ls")
    assert "not of this version" in shown.stdout
    assert "1 stores" in shown.stderr
    assert invoke("cache", "verify").exit_code == 0
    assert invoke("cache", "rm", "--all").exit_code == 0
    assert [p.name for p in (home / "images").iterdir() if p.is_dir()] == ["holidays"]

"""A backbone inside a pack: garbage is refused when it is written, verified or used."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

import pytest
from cli import invoke
from draft import Draft
from format_packs import VECTORS

import d3pack
from d3pack.decode import unpack_backbone
from d3pack.format import carried_files
from d3pack.testing import raises_code

CARRIED = VECTORS / "valid" / "backbone-carried.d3m"


def header(text: str) -> Callable[[Draft], None]:
    """The weights begin with another safetensors header of the same length, or a longer one."""

    def edit(draft: Draft) -> None:
        shared, params = draft.blobs["backbone.shared"], draft.params("backbone")
        start = shared.index(b'{"matrix"') - 8
        size = struct.unpack_from("<Q", shared, start)[0]
        new = text.encode().ljust(size)
        draft.blobs["backbone.shared"] = (
            shared[:start] + struct.pack("<Q", len(new)) + new + shared[start + 8 + size :]
        )
        params["parts"][0] += len(new) - size
        params["shared"] = len(draft.blobs["backbone.shared"])

    return edit


def table(change: Callable[[list[Any]], Any]) -> Callable[[Draft], None]:
    return lambda draft: change(draft.params("backbone")["files"])


def parts(*counts: Any) -> Callable[[Draft], None]:
    return lambda draft: draft.params("backbone").update(parts=list(counts))


def flipped(draft: Draft) -> None:
    draft.poke("backbone.shared", draft.params("backbone")["parts"][0] + 3, b"\x55")


def rows(draft: Draft) -> None:
    """The section has a row for each class besides."""
    draft.params("backbone")["row"] = 2
    draft.rows["backbone"] = ["backbone.rows"]
    draft.blobs["backbone.rows"] = bytes(2 * draft.manifest["classes"])


BAD: dict[str, tuple[Callable[[Draft], Any], str]] = {
    "list": (header("[]"), "E_CODEC"),
    "number": (header("5"), "E_CODEC"),
    "deep": (header("[" * 100_000), "E_CODEC"),
    "infinity": (
        header('{"a":{"dtype":"F16","shape":[Infinity],"data_offsets":[0,4]}}'),
        "E_CODEC",
    ),
    "backwards": (table(lambda files: files[0].__setitem__(2, -5)), "E_CODEC"),
    "bomb": (
        table(lambda files: files.extend([[f"x{i}", "bytes", (-1) ** i * 20] for i in range(40)])),
        "E_CODEC",
    ),
    "how": (table(lambda files: files[0].__setitem__(1, "zip")), "E_CODEC"),
    "unsorted": (table(lambda files: files.reverse()), "E_CODEC"),
    "fewer": (table(lambda files: files.pop()), "E_CODEC"),
    "value": (lambda draft: draft.manifest["optional"].update(backbone=5), "E_CODEC"),
    "codec": (lambda draft: draft.section("backbone").__setitem__(1, "zip"), "E_CODEC"),
    "parts": (parts(1, 2, 3), "E_CODEC"),
    "parts-two": (parts(1, 2), "E_CODEC"),
    "parts-minus": (parts(-2, 400, 0), "E_CODEC"),
    "parts-real": (parts(1.0, 2, 3), "E_CODEC"),
    "rows": (rows, "E_CODEC"),
    "flipped": (flipped, "E_BACKBONE_CHANGED"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_carried_backbone_is_refused_when_it_is_used(
    name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit, code = BAD[name]
    draft = Draft(CARRIED.read_bytes())
    edit(draft)
    path = tmp_path / "bad.d3m"
    path.write_bytes(draft.seal().bytes())
    pack = d3pack.read(path)  # whoever does not know the feature reads on
    with raises_code(code):
        carried_files(pack)
    with raises_code(code):
        d3pack.pack_bytes(pack)
    monkeypatch.setenv("D3PACK_HOME", str(tmp_path / "home"))
    with raises_code(code):
        unpack_backbone(pack)
    done = invoke("verify", str(path), "--format", "json")
    assert json.loads(done.stdout)[0]["code"] == code


def test_carried_backbone_without_its_section_is_refused(tmp_path: Any) -> None:
    draft = Draft((VECTORS / "valid" / "smallest.d3m").read_bytes())
    draft.manifest["optional"] = {"backbone": {}}
    with raises_code("E_CODEC"):
        carried_files(d3pack.read(draft.seal().bytes()))


def test_damaged_copy_of_a_carried_backbone_is_replaced(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D3PACK_HOME", str(tmp_path))
    pack = d3pack.read(CARRIED)
    folder = unpack_backbone(pack)
    assert folder is not None
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert unpack_backbone(pack) == folder
    assert weights.read_bytes() == whole

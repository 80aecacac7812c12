"""A backbone inside a pack: garbage is refused when it is written, verified or used."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
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
IN_FOUR = VECTORS / "valid" / "backbone-carried-i4.d3m"


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


def stored(number: int, how: Any) -> Callable[[Draft], None]:
    """Store a tensor of the weights in another way."""
    return lambda draft: draft.params("backbone")["files"][1][1].__setitem__(number, how)


def spare(draft: Draft) -> None:
    """The nibble after the last of 135 is not 0."""
    at = draft.params("backbone")["parts"][0] + 135 // 2
    last = draft.blobs["backbone.shared"][at]
    draft.poke("backbone.shared", at, bytes([last | 0x30]))


def growing(draft: Draft) -> None:
    """Four hundred tensors, all but one of them copies; sizes and recipe agree."""
    shared, params = draft.blobs["backbone.shared"], draft.params("backbone")
    size = 4000  # values of a tensor
    offsets = ((i * size * 2, (i + 1) * size * 2) for i in range(400))
    text = ",".join(
        f'"{i}":{{"dtype":"F16","shape":[1,{size}],"data_offsets":[{a},{b}]}}'
        for i, (a, b) in enumerate(offsets)
    ).join("{}")
    config = shared[: shared.index(b'{"odd"') - 8]
    plain = config + struct.pack("<Q", len(text)) + text.encode()
    groups = -(-size // 64)
    whole = plain + bytes(size // 2) + b"\0\x3c" * groups
    params["parts"] = [len(plain), size // 2, groups]
    params["files"][1][1:] = [[4, *[[0]] * 399], len(text) + 8 + 400 * size * 2]
    params["shared"], draft.blobs["backbone.shared"] = len(whole), whole
    total = sum(entry[2] for entry in params["files"])
    draft.manifest["recipe"]["backbone"]["bytes"] = total
    assert total > 64 * len(whole)


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
BAD_IN_FOUR: dict[str, tuple[Callable[[Draft], Any], str]] = {
    "as-i8": (table(lambda files: files[1].__setitem__(1, "i8")), "E_CODEC"),
    "as-i4": (table(lambda files: files[1].__setitem__(1, "i4")), "E_CODEC"),
    "as-bytes": (table(lambda files: files[1].__setitem__(1, "bytes")), "E_CODEC"),
    "spare": (spare, "E_CODEC"),
    "bits": (stored(0, 5), "E_CODEC"),
    "bits-real": (stored(0, 4.0), "E_CODEC"),
    "bits-true": (stored(1, True), "E_CODEC"),
    "bits-none": (stored(0, None), "E_CODEC"),
    "bits-vector": (stored(1, 4), "E_CODEC"),
    "bits-more": (table(lambda files: files[1][1].append(16)), "E_CODEC"),
    "bits-fewer": (table(lambda files: files[1][1].pop()), "E_CODEC"),
    "copy-later": (stored(0, [3]), "E_CODEC"),
    "copy-itself": (stored(3, [3]), "E_CODEC"),
    "copy-before": (stored(3, [-4]), "E_CODEC"),
    "copy-real": (stored(3, [0.0]), "E_CODEC"),
    "copy-false": (stored(3, [False]), "E_CODEC"),
    "copy-empty": (stored(3, []), "E_CODEC"),
    "copy-two": (stored(3, [0, 0]), "E_CODEC"),
    "copy-text": (stored(3, "0"), "E_CODEC"),
    "copy-size": (stored(3, [1]), "E_CODEC"),
    "copy-stored": (stored(3, 4), "E_CODEC"),
    "growing": (growing, "E_CODEC"),
    "flipped": (flipped, "E_BACKBONE_CHANGED"),
}


@pytest.mark.parametrize(
    ("pack", "case"),
    [(CARRIED, case) for case in BAD.values()] + [(IN_FOUR, case) for case in BAD_IN_FOUR.values()],
    ids=[*BAD, *(f"i4-{name}" for name in BAD_IN_FOUR)],
)
def test_wrong_carried_backbone_is_refused_when_it_is_used(
    pack: Path,
    case: tuple[Callable[[Draft], Any], str],
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    edit, code = case
    draft = Draft(pack.read_bytes())
    edit(draft)
    path = tmp_path / "bad.d3m"
    path.write_bytes(draft.seal().bytes())
    opened = d3pack.read(path)  # a reader that does not know the feature reads on
    with raises_code(code):
        carried_files(opened)
    with raises_code(code):
        d3pack.pack_bytes(opened)
    monkeypatch.setenv("D3PACK_HOME", str(tmp_path / "home"))
    with raises_code(code):
        unpack_backbone(opened)
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

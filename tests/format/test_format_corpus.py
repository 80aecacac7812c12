"""The conformance corpus: both readers, the writer, stock safetensors, and its own generator."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import reader
from format_packs import VALID, VECTORS
from places import ROOT
from safetensors import safe_open

import d3pack
from d3pack import read
from d3pack.errors import CODES, InvalidPackError
from d3pack.format.codecs import decode_files

INDEX = json.loads((VECTORS / "index.json").read_text())


def ours(data: bytes) -> str:
    try:
        d3pack.read(data)
    except InvalidPackError as error:
        return error.code
    return "valid"


def theirs(data: bytes) -> str:
    try:
        reader.read(data)
    except reader.Refused as error:
        return str(error.code)
    return "valid"


def test_corpus_has_the_promised_size_and_a_complete_index() -> None:
    assert len(INDEX["valid"]) >= 15
    assert len(INDEX["invalid"]) >= 60
    for kind in ("valid", "invalid"):
        assert {path.stem for path in (VECTORS / kind).iterdir()} == set(INDEX[kind])


@pytest.mark.parametrize("path", VALID, ids=lambda path: path.stem)
def test_valid_files_are_read_and_written_back(path: Path) -> None:
    data = path.read_bytes()
    pack = d3pack.read(path)
    assert pack.root == INDEX["valid"][path.stem]["root"]
    assert len(data) == INDEX["valid"][path.stem]["bytes"] == pack.ledger().total
    assert d3pack.pack_bytes(pack) == data, "read and written again, the bytes are others"
    got = reader.read(data)
    assert got["names"] == list(pack.classes)
    with safe_open(path, "numpy") as file:
        assert sorted(file.keys()) == ["rows", "shared"]
        shared, rows = (file.get_tensor(name) for name in ("shared", "rows"))
    assert shared.tobytes() + rows.tobytes() == data[-shared.size - rows.size :]
    assert len(rows) == len(pack.classes)
    for name, coded in pack.sections().items():
        for tensor, array in coded.tensors.items():
            assert array.ravel().tolist() == list(got["arrays"][f"{name}.{tensor}"])


@pytest.mark.parametrize("name", INDEX["invalid"])
def test_invalid_files_are_refused_with_their_code(name: str) -> None:
    data = (VECTORS / "invalid" / f"{name}.d3m").read_bytes()
    assert ours(data) == INDEX["invalid"][name]["code"]
    assert theirs(data) == INDEX["invalid"][name]["code"]


def test_every_code_has_an_invalid_file() -> None:
    rules = {code for code, (name, _) in CODES.items() if name == "InvalidPackError"}
    assert rules - {InvalidPackError.code} == {e["code"] for e in INDEX["invalid"].values()}


def test_corpus_generator_writes_the_same_bytes(tmp_path: Path) -> None:
    script = ROOT / "spec" / "make_vectors.py"
    subprocess.run([sys.executable, script, tmp_path], check=True, stdout=subprocess.DEVNULL)
    old = {p.relative_to(VECTORS): p.read_bytes() for p in VECTORS.rglob("*.*") if p.is_file()}
    new = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*.*") if p.is_file()}
    assert old == new


def test_messages_are_one_line_with_the_code() -> None:
    for name in INDEX["invalid"]:
        with pytest.raises(InvalidPackError) as caught:
            d3pack.read(VECTORS / "invalid" / f"{name}.d3m")
        text = str(caught.value)
        assert text.startswith(f"[{caught.value.code}] ")
        assert len(text) < 700, name


def test_second_reader_needs_only_the_standard_library() -> None:
    source = (ROOT / "spec" / "reader.py").read_text()
    assert len(source.splitlines()) < 320
    imports = {
        line.split()[1] for line in source.splitlines() if line.startswith(("import", "from"))
    }
    assert imports <= set(sys.stdlib_module_names)
    for path, code in ((VALID[0], 0), (VECTORS / "invalid" / "trailing-byte.d3m", 1)):
        got = subprocess.run(
            [sys.executable, "-I", ROOT / "spec" / "reader.py", path],
            capture_output=True,
            text=True,
        )
        assert got.returncode == code, got.stderr
    assert got.stderr.startswith("E_TRAILING")


@pytest.mark.parametrize("name", ["backbone-carried", "backbone-carried-i4"])
def test_carried_backbone_is_restored_as_the_specification_says(name: str) -> None:
    """Section 8a value by value, with `struct` for the arithmetic of half precision."""
    pack = read(VECTORS / "valid" / f"{name}.d3m")
    section = pack.extensions["backbone"]
    shared = section.tensors["shared"].tobytes()
    first, second, third = section.params["parts"]
    plain, codes = io.BytesIO(shared[:first]), io.BytesIO(shared[first : first + second])
    scales = iter(struct.unpack_from(f"<{third}e", shared, first + second))
    assert first + second + 2 * third == len(shared)

    def matrix(bits: int, count: int, rows: int) -> bytes:
        if bits == 8:
            whole, share = [*struct.unpack(f"<{count}b", codes.read(count))], count // rows
        else:
            pairs = [divmod(byte, 16) for byte in codes.read((count + 1) // 2)]
            whole, share = [x - 8 for high, low in pairs for x in (low, high)][:count], 64
        parts = [whole[i : i + share] for i in range(0, count, share)]
        values = [code * scale for part, scale in zip(parts, scales) for code in part]  # noqa: B905
        return struct.pack(f"<{count}e", *values)

    found = {}
    for path, how, size in section.params["files"]:
        if how == "bytes":
            found[path] = plain.read(size)
            continue
        start = plain.read(8)
        header = plain.read(struct.unpack("<Q", start)[0])
        tensors = sorted(json.loads(header).values(), key=lambda entry: entry["data_offsets"])
        out = [start, header]
        for number, entry in enumerate(tensors):
            first, last = entry["data_offsets"]
            is_matrix = entry["dtype"] == "F16" and len(entry["shape"]) > 1
            bits: Any = how[number] if how != "i8" else 8 if is_matrix else 16
            if bits not in (4, 8, 16):
                out.append(out[2 + bits[0]])
            elif bits == 16:
                out.append(plain.read(last - first))
            else:
                out.append(matrix(bits, (last - first) // 2, entry["shape"][0]))
        found[path] = b"".join(out)
    assert not plain.read()
    assert not codes.read()
    assert not list(scales)
    files = {path: [len(data), hashlib.sha256(data).hexdigest()] for path, data in found.items()}
    text = json.dumps(files, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(text.encode("ascii")).hexdigest() == pack.recipe.backbone.lock
    assert sum(map(len, found.values())) == pack.recipe.backbone.nbytes
    assert found == decode_files(section)

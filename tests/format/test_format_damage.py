"""Damage and malice: bit flips, cuts, fuzzing, hostile JSON. Nothing but D3MError comes out."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import fuzz
import pytest
from draft import Draft
from format_packs import VECTORS
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import d3pack
from d3pack.errors import D3MError, InvalidPackError, NotFoundError, UsageError
from d3pack.testing import raises_code

SMALL = VECTORS / "valid" / "smallest.d3m"
PACKS = [
    VECTORS / "valid" / f"{name}.d3m" for name in ("smallest", "prompts-i8", "labels-topk", "codes")
]


def refused(data: bytes) -> bool:
    try:
        d3pack.read(data)
    except InvalidPackError:
        return True
    return False


def flipped(data: bytes, bit: int) -> bytes:
    out = bytearray(data)
    out[bit // 8] ^= 1 << bit % 8
    return bytes(out)


def test_every_changed_bit_of_the_smallest_pack_is_refused() -> None:
    data = SMALL.read_bytes()
    passed = [bit for bit in range(8 * len(data)) if not refused(flipped(data, bit))]
    assert passed == []


@pytest.mark.parametrize("path", PACKS, ids=lambda path: path.stem)
def test_changed_bytes_and_truncated_files_are_refused(path: Path) -> None:
    data = path.read_bytes()
    rng = random.Random(3)
    for at in range(len(data)):
        assert refused(flipped(data, 8 * at + rng.randrange(8))), at
        assert refused(data[:at]), at


@pytest.mark.slow
@pytest.mark.parametrize("path", PACKS, ids=lambda path: path.stem)
def test_every_changed_bit_is_refused(path: Path) -> None:
    data = path.read_bytes()
    passed = [bit for bit in range(8 * len(data)) if not refused(flipped(data, bit))]
    assert passed == []


@pytest.mark.parametrize("section", [None, "codes"])
def test_short_fuzzing_finds_no_difference_between_readers(
    section: str | None, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    result = fuzz.run(1500, seed=11, share=0.5, both=True, section=section)
    assert result["broken_promises"] == []
    assert len(result["codes"]) >= 12, "the mutants do not reach deep enough"


def test_fuzzer_counts_the_damage_that_a_reader_accepts(monkeypatch: Any) -> None:
    data = SMALL.read_bytes()
    assert fuzz.damage([data], both=False) == {
        "bits": 8 * len(data),
        "cuts": len(data),
        "accepted": 0,
    }
    lax = {data[:-1], flipped(data, 9)}
    monkeypatch.setattr(fuzz, "verdict", lambda found: "valid" if found in lax else "E_HASH")
    assert fuzz.damage([data], both=False)["accepted"] == 2


def test_fuzzer_makes_no_rows_for_millions_of_classes() -> None:
    draft = Draft((VECTORS / "valid" / "codes-bare.d3m").read_bytes())
    draft.manifest["classes"] = 10**7
    assert max(len(fuzz.sealed(draft, random.Random(seed))) for seed in range(300)) < 10**5


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_are_refused(data: bytes) -> None:
    assert refused(data)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["row", "shared", "params", "shape", "x"]), inner)
    ),
    max_leaves=12,
)
FIELDS = sorted(Draft(SMALL.read_bytes()).manifest)


@pytest.mark.heavy
@settings(max_examples=300, deadline=None)
@given(st.sampled_from(FIELDS), json_values)
def test_both_readers_agree_on_random_json_in_a_field(name: str, value: Any) -> None:
    draft = Draft(SMALL.read_bytes())
    draft.manifest[name] = value
    if name != "root":
        draft.reroot()
    try:
        data = draft.bytes()
    except (AttributeError, KeyError, TypeError, ValueError):
        assume(False)  # sections that cannot be laid out make no file
    assert fuzz.verdict(data) == fuzz.second_verdict(data)


def test_header_with_wrong_sizes_is_refused_before_allocation() -> None:
    draft = Draft(SMALL.read_bytes())
    draft.manifest["classes"], draft.manifest["images_per_class"] = 2**20, 2**12
    draft.manifest["sections"].append(["labels", "dense", {}])
    draft.reroot()
    with raises_code("E_LIMIT"):
        d3pack.read(draft.bytes())


def test_hash_error_names_section_offset_and_both_hashes() -> None:
    data = bytearray(SMALL.read_bytes())
    data[-4] ^= 1
    with raises_code("E_HASH", match="section 'leaves' at byte 1 of `shared`") as caught:
        d3pack.read(bytes(data))
    words = str(caught.value).replace(",", " ").replace(";", " ").split()
    assert len([word for word in words if len(word) == 32]) == 2


def test_leaf_error_names_the_class() -> None:
    data = bytearray((VECTORS / "valid" / "prompts-i8.d3m").read_bytes())
    data[-1] ^= 1
    with raises_code("E_LEAF", match="class 3 "):
        d3pack.read(bytes(data))


def test_file_of_wrong_length_is_refused_before_it_takes_memory(tmp_path: Path) -> None:
    whole = SMALL.read_bytes()
    for name, size, data in (("zeros", 2**40, b""), ("long", 2**40, whole)):
        path = tmp_path / name
        path.write_bytes(data)
        os.truncate(path, size)  # a hole: no bytes on the disk
        with pytest.raises(InvalidPackError) as caught:
            d3pack.read(path)
        assert caught.value.code == ("E_TRAILING" if data else "E_HEADER")
    short = tmp_path / "short"
    short.write_bytes(whole[:-1])
    with pytest.raises(InvalidPackError, match="E_TRUNCATED"):
        d3pack.read(short)


@pytest.mark.linux
def test_refused_path_leaves_no_file_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with pytest.raises(UsageError):
            d3pack.read(tmp_path)
    assert len(os.listdir("/proc/self/fd")) <= before


def test_paths_without_a_file_are_not_found(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for path in (tmp_path / "no", SMALL / "x", loop, "\0"):
        with pytest.raises(NotFoundError):
            d3pack.read(path)


@pytest.mark.posix
def test_folders_pipes_and_devices_are_wrong_calls(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (tmp_path, fifo, Path("/dev/zero")):
        with pytest.raises(UsageError, match="is not a regular file"):
            d3pack.read(path)


def test_pack_is_independent_of_the_bytes_it_was_read_from() -> None:
    data = bytearray(SMALL.read_bytes())
    pack = d3pack.read(data)
    data[-2:] = b"\0\0"
    assert pack.prompts is not None
    assert pack.prompts.tensors["values"].ravel().tolist() == [0.5]
    assert d3pack.pack_bytes(pack) == SMALL.read_bytes()


def test_other_file_types_raise_d3m_errors() -> None:
    for junk in (b"", b"PK\x03\x04" * 10, b"\x89PNG\r\n\x1a\n" * 9, b"{}", SMALL.read_bytes()[8:]):
        with pytest.raises(D3MError):
            d3pack.read(junk)

"""Codecs: what comes back, how near it is, and that the recorded error is the true one."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from format_packs import make
from hypothesis import given, settings
from hypothesis import strategies as st

import d3pack
from d3pack.errors import UsageError
from d3pack.format.codecs import (
    PROMPT_CODECS,
    _bits,
    decode_adapter,
    decode_labels,
    decode_picks,
    decode_prompts,
    encode_adapter,
    encode_labels,
    encode_picks,
    encode_prompts,
    prompts,
)
from d3pack.format.codecs.picks import check_pick_values, first_picks
from d3pack.format.coded import Coded
from d3pack.testing import raises_code

RNG = np.random.default_rng(5)
VALUES = (RNG.standard_t(4, (7, 2, 3, 100)) * 0.03).astype(np.float32)


@pytest.mark.parametrize(
    ("codec", "rms", "bytes_a_vector"),
    [("f16", 3e-4, 200), ("i8", 0.02, 102), ("i4", 0.12, 58), ("pq", 0.5, 27)],
)
def test_decoded_prompts_are_within_the_error_of_the_codec(
    codec: str, rms: float, bytes_a_vector: int
) -> None:
    coded = encode_prompts(VALUES, codec)
    got = decode_prompts(coded)
    assert got.dtype == np.float32
    assert got.shape == VALUES.shape
    power = (VALUES.astype(np.float64) ** 2).sum()
    error = np.sqrt(((got - VALUES.astype(np.float64)) ** 2).sum() / power)
    assert error < rms
    assert coded.figures["error"]["rms"] == pytest.approx(error, rel=1e-3)
    assert coded.figures["error"]["worst"] >= coded.figures["error"]["rms"] * 0.99
    per_class = sum(t.nbytes for n, t in coded.tensors.items() if n not in coded.shared)
    assert per_class == 7 * 2 * 3 * bytes_a_vector


@pytest.mark.parametrize("codec", ["i4", "pq"])
def test_a_group_that_is_wider_than_a_vector_takes_no_memory(codec: str) -> None:
    """A file of kilobytes would otherwise be decoded by way of gigabytes."""
    narrow = encode_prompts(VALUES[:1, :, :, :3].repeat(100, 2), codec)
    tensors, params = dict(narrow.tensors), {**narrow.params, "group": 65536}
    if codec == "pq":
        params = {**narrow.params, "dim": 65536}
        tensors["codebook"] = np.pad(tensors["codebook"], ((0, 0), (0, 65536 - 4)))
    coded = replace(narrow, tensors=tensors, params=params)
    tracemalloc.start()
    values = decode_prompts(coded)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(values, decode_prompts(narrow))
    assert peak < 1 << 20


def test_smaller_codecs_have_larger_errors() -> None:
    coded = [encode_prompts(VALUES, codec) for codec in ("f16", "i8", "i4", "pq")]
    errors = [one.figures["error"]["rms"] for one in coded]
    assert errors == sorted(errors)
    weights = [one.nbytes - shared_bytes(one) for one in coded]
    assert weights == sorted(weights, reverse=True)


def shared_bytes(coded: Coded) -> int:
    return sum(coded.tensors[name].nbytes for name in coded.shared)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["f16", "i8", "i4", "pq"]),
    st.integers(1, 3), st.integers(1, 2), st.integers(1, 3), st.integers(1, 70),
    st.integers(-20, 12), st.integers(0, 2**31),
)  # fmt: skip
def test_prompts_of_any_shape_and_scale_decode_within_the_error(
    codec: str, c: int, m: int, k: int, width: int, power: int, seed: int
) -> None:
    values = np.random.default_rng(seed).normal(size=(c, m, k, width)) * 2.0**power
    coded = encode_prompts(values, codec)
    got = decode_prompts(coded)
    assert got.shape == values.shape
    assert np.isfinite(got).all()
    step = {"f16": 2**-9, "i8": 1 / 100, "i4": 0.3, "pq": 8.0}[codec]
    peak = np.abs(values).max(axis=3, keepdims=True)
    # Below 2**-14 a float16 scale loses bits: the floor is absolute.
    assert (np.abs(got - values) <= peak * step + 2.0**-14).all()


def test_codec_is_added_by_a_class_and_a_line_of_the_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Float32(prompts.Float16):
        def encode(self, values: Any) -> Any:
            return {"values": values.view(np.uint8)}, {}  # the format has no tensors of float32

        def decode(self, coded: Any) -> Any:
            return coded.tensors["values"].view(np.float32)

        def layout(self, spec: Any, shape: Any, at: str) -> Any:
            return {"values": ("U8", (*shape[:-1], 4 * shape[-1]))}

    monkeypatch.setattr(prompts, "Float32", Float32, raising=False)
    monkeypatch.setitem(PROMPT_CODECS, "f32", "prompts:Float32")
    coded = encode_prompts(VALUES, "f32")
    assert (decode_prompts(coded) == VALUES).all()
    pack = replace(make(7, 2), prompts=coded)
    assert d3pack.read(d3pack.pack_bytes(pack)) == pack
    with raises_code("E_CODEC", match="known: f16, i8, i4, pq, f32"):
        encode_prompts(VALUES, "f64")


def test_zero_and_constant_vectors_decode() -> None:
    values = np.zeros((2, 1, 2, 40), np.float32)
    values[1, 0, 1] = -0.5
    for codec in ("f16", "i8", "i4", "pq"):
        assert np.abs(decode_prompts(encode_prompts(values, codec)) - values).max() < 0.01, codec


def test_decoding_multiplies_once_in_float32() -> None:
    coded = encode_prompts(VALUES, "i8")
    exact = coded.tensors["codes"].astype(np.float64) * coded.tensors["scales"][..., None].astype(
        np.float64
    )
    assert (decode_prompts(coded).astype(np.float64) == exact).all()
    book = encode_prompts(VALUES, "pq")
    wide = book.tensors["codebook"].astype(np.float64)[book.tensors["codes"]].reshape(7, 2, 3, -1)
    exact = wide * book.tensors["scales"].astype(np.float64)[..., None]
    assert (decode_prompts(book).astype(np.float64) == exact[..., :100]).all()


def test_invalid_prompts_are_refused() -> None:
    for wrong in (np.zeros((2, 3)), np.zeros((0, 1, 1, 4)), np.full((1, 1, 1, 2), np.nan)):
        with pytest.raises(UsageError):
            encode_prompts(wrong)
    with pytest.raises(UsageError, match="float16"):
        encode_prompts(np.full((1, 1, 1, 2), 1e6))
    with raises_code("E_CODEC"):
        encode_prompts(VALUES, "f8")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=7), st.integers(1, 9), st.integers(0, 99))
def test_packed_bits_unpack_to_the_same_records(widths: list[int], repeat: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    records = np.stack([rng.integers(0, 2**w, (3, repeat)) for w in widths], axis=2)
    packed = _bits.pack(records.astype(np.uint32), tuple(widths))
    assert packed.shape == (3, _bits.row_bytes(tuple(widths), repeat))
    assert (_bits.unpack(packed, tuple(widths), repeat) == records).all()
    assert _bits.spare_is_zero(packed, tuple(widths), repeat)
    # The layout itself: least significant bit first, field after field.
    first, at = 0, 0
    for record in records[0]:
        for field, width in zip(record.tolist(), widths, strict=True):
            first |= field << at
            at += width
    assert int.from_bytes(packed[0].tobytes(), "little") == first


def beliefs(classes: int, images: int, peak: float = 0.2) -> Any:
    return RNG.dirichlet(np.full(classes, peak), (classes, images))


@pytest.mark.parametrize("bits", [5, 7, 8, 12])
def test_top_k_labels_keep_the_largest_and_the_mass(bits: int) -> None:
    probs = beliefs(30, 9)
    coded = encode_labels(probs, k=6, bits=bits)
    got = decode_labels(coded)
    assert np.abs(got.sum(axis=2) - 1).max() < 1e-6
    order = np.argsort(-probs, axis=2, kind="stable")[..., :6]
    want = np.take_along_axis(probs, order, 2)
    kept = want.sum(axis=2)
    assert coded.figures["kept"]["mean"] == pytest.approx(kept.mean(), rel=1e-3)
    assert coded.figures["kept"]["min"] == pytest.approx(kept.min(), rel=1e-3)
    off = np.abs(np.take_along_axis(got, order, 2) - want)
    assert off.max() < {5: 0.13, 7: 0.035, 8: 0.02, 12: 0.002}[bits]
    assert coded.figures["error"]["max"] == pytest.approx(np.abs(got - probs).max(), rel=1e-3)
    tail = 1 - np.take_along_axis(got, order, 2).sum(axis=2)
    assert np.abs(tail - (1 - kept)).max() < {5: 0.1, 7: 0.03, 8: 0.02, 12: 0.002}[bits]


def test_labels_of_one_class_decode_as_those_of_all() -> None:
    for codec in ("topk", "dense"):
        coded = encode_labels(beliefs(12, 5), codec)
        whole = decode_labels(coded)
        for c in (0, 7, 11):
            assert (decode_labels(coded, c) == whole[c]).all()
        assert whole.dtype == np.float32


def test_equal_labels_have_equal_bytes() -> None:
    """Encoding what was decoded gives the same bytes: ties are ordered by class."""
    probs = np.full((4, 3, 4), 0.25)
    for k, bits in ((1, 8), (2, 6), (4, 12)):
        coded = encode_labels(probs, k=k, bits=bits)
        again = encode_labels(decode_labels(coded), k=k, bits=bits)
        assert (again.tensors["bits"] == coded.tensors["bits"]).all()


def test_ten_of_a_thousand_classes_take_22_bytes() -> None:
    rows = RNG.dirichlet(np.full(1000, 0.01), (2, 50))
    coded = encode_labels(rows, k=10, bits=7)
    assert coded.nbytes == 2 * 1063  # 50 * (10 * 10 + 10 * 7) bits
    assert coded.nbytes / 100 < 22


def test_invalid_labels_are_refused() -> None:
    good = beliefs(3, 2)
    for wrong in (good[0], good * 2, -good, np.full((3, 2, 3), np.nan), good[:, :0]):
        with pytest.raises(UsageError):
            encode_labels(wrong)
    for options in ({"k": 0}, {"bits": 1}, {"bits": 13}, {"codec": "best"}):
        with pytest.raises(UsageError):
            encode_labels(good, **options)


@pytest.mark.parametrize("codec", ["f16", "i8"])
def test_decoded_adapters_are_within_the_error_of_the_codec(codec: str) -> None:
    tensors = {
        "b.delta": RNG.normal(size=5),
        "a.lora_a": RNG.normal(size=(3, 2, 4)),
        "s": np.ones(1),
    }
    coded = encode_adapter(tensors, codec)
    got = decode_adapter(coded)
    assert list(got) == ["a.lora_a", "b.delta", "s"]
    for name, want in tensors.items():
        assert got[name].shape == want.shape
        assert np.abs(got[name] - want).max() <= np.abs(want).max() / (
            100 if codec == "i8" else 1000
        )
    assert 0 < coded.figures["error"]["rms"] < 0.01
    assert coded.shared == frozenset(coded.tensors)


def test_invalid_adapters_are_refused() -> None:
    for wrong in ({}, {"a": np.zeros(0)}, {"a": np.array([1e6])}, {"a": np.array([np.inf])}):
        with pytest.raises(UsageError):
            encode_adapter(wrong)
    with pytest.raises(UsageError):
        encode_adapter({"a": np.ones(2)}, "f32")


@given(
    st.integers(1, 4), st.integers(1, 40), st.integers(1, 60), st.integers(1, 9), st.integers(0, 99)
)
def test_decoded_picks_are_the_same(
    classes: int, images: int, lanes: int, spare: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    depth = -(-images // lanes) + spare
    codes = np.stack([np.stack([rng.permutation(depth) for _ in range(lanes)], 1).ravel()[:images]
                      for _ in range(classes)])  # fmt: skip
    index = np.arange(images) % lanes + lanes * codes
    coded = encode_picks(index, lanes)
    assert (decode_picks(coded) == index).all()
    rows, columns = rng.integers(0, classes, 5), rng.integers(0, images, 5)
    assert (
        make(classes, images, picks=coded).counters(rows, columns)[1] == index[rows, columns]
    ).all()
    bits = max(1, int(codes.max()).bit_length())
    assert coded.nbytes == classes * -(-images * bits // 8)
    k = int(rng.integers(1, images + 1))
    part = first_picks(coded, k)
    assert (decode_picks(part) == index[:, :k]).all()
    check_pick_values(part, ("",) * classes)  # nothing is left over after the last one
    assert (decode_picks(coded.take(rows)) == index[rows]).all()


def test_picks_of_five_candidates_each_take_three_bits() -> None:
    index = np.arange(200) + 200 * RNG.integers(0, 5, (10, 200))
    assert encode_picks(index, 200).nbytes == 750
    assert encode_picks(index).nbytes == 2500


@pytest.mark.parametrize("chunk", [1, 4, 2**20])
def test_repeated_candidate_is_found_in_every_chunk(chunk: int) -> None:
    coded = encode_picks([[0, 1], [2, 3], [1, 1]])
    with raises_code("E_PICKS", match=r"class 2 \('c'\)"):
        check_pick_values(coded, ("a", "b", "c"), chunk)


def test_invalid_picks_are_refused() -> None:
    for wrong in (np.zeros(3, int), np.zeros((2, 3)), np.full((2, 3), -1), np.zeros((0, 3), int)):
        with pytest.raises(UsageError, match="natural numbers"):
            encode_picks(wrong)
    with pytest.raises(UsageError, match="of its image's lane"):
        encode_picks([[0, 2]], 2)
    with pytest.raises(UsageError, match="65536 candidates"):
        encode_picks([[2**16]])


def test_take_selects_rows_but_not_of_shared_tensors() -> None:
    coded = encode_prompts(VALUES, "pq")
    part = coded.take(np.array([4, 0]))
    assert (part.tensors["codebook"] == coded.tensors["codebook"]).all()
    assert (decode_prompts(part) == decode_prompts(coded)[[4, 0]]).all()
    assert isinstance(part, Coded)

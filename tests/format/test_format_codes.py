"""The section `codes`: choices in few bits, in one spelling."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from format_packs import make, stored

from d3pack.format import Codes, Coding, Pack, decode_codes, encode_codes, pack_bytes, read
from d3pack.format.codecs import codes_at, encode_picks
from d3pack.format.codecs.codes import KEYS, _ranks, _sets, level_bits
from d3pack.format.coded import Coded
from d3pack.testing import raises_code

SHAPES = [(8, (1,) * 5), (3, (2, 8, 0, 1)), (12, (4, 0, 1)), (14, (40,)), (1, (2, 1))]


def choices(coding: Coding, classes: int = 5, count: int = 3, seed: int = 0) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)

    def level(atoms: int) -> Any:
        sets = [
            np.sort(rng.choice(coding.entries, atoms, replace=False))
            for _ in range(classes * count)
        ]
        return np.array(sets, np.int64).reshape(classes, count, atoms)

    atoms = np.concatenate([level(m) for m in coding.atoms], axis=-1)
    return atoms, rng.choice([-1, 1], atoms.shape).astype(np.int8)


def coding_of(bits: int = 8, atoms: tuple[int, ...] = (1, 2), **changes: Any) -> Coding:
    sigmas = (*(float(s) for s in range(len(atoms), 0, -1)), 0.0)
    return Coding(sigmas, atoms, bits, **changes)


def with_codes(images: int = 6, coded: int = 4, count: int = 3, **changes: Any) -> Pack:
    coding = coding_of(**changes)
    codes = encode_codes(Codes(coding, coded, *choices(coding, count=count)))
    return make(images=images, codes=codes)


@pytest.mark.parametrize(("bits", "atoms"), SHAPES)
def test_codes_come_back(bits: int, atoms: tuple[int, ...]) -> None:
    coding = coding_of(bits, atoms, eta=0.5, guidance=2.0)
    chosen, signs = choices(coding)
    coded = encode_codes(Codes(coding, 7, chosen, signs))
    assert coded.tensors["bits"].shape == (5, math.ceil(3 * sum(coding.widths) / 8))
    found = decode_codes(coded)
    assert (found.coding, found.images) == (coding, 7)
    assert np.array_equal(found.atoms, chosen)
    assert np.array_equal(found.signs, signs)
    assert np.array_equal(decode_codes(coded, [3, 1]).atoms, chosen[[3, 1]])
    classes, numbers = np.array([4, 0, 4]), np.array([2, 1, 0])
    single = codes_at(coded, classes, numbers)
    assert np.array_equal(single[0], chosen[classes, numbers])
    assert np.array_equal(single[1], signs[classes, numbers])


@pytest.mark.parametrize(("entries", "count"), [(6, 1), (6, 2), (7, 3), (5, 5)])
def test_ranks_count_all_sets(entries: int, count: int) -> None:
    sets = np.array(list(itertools.combinations(range(entries), count)))
    ranks = _ranks(sets)
    assert sorted(ranks) == list(range(math.comb(entries, count)))
    assert np.array_equal(_sets(list(ranks), entries, count), sets)


def slow_set(rank: int, entries: int, count: int) -> list[int]:
    """The set of a rank, by the definition: each atom is the largest whose binomial fits."""
    atoms = []
    for k in range(count, 0, -1):
        atom = max(n for n in range(entries) if math.comb(n, k) <= rank)
        rank -= math.comb(atom, k)
        atoms.append(atom)
    return atoms[::-1]


@pytest.mark.parametrize(
    ("bits", "count"),
    [(3, 7), (8, 2), (8, 30), (8, 128), (8, 250), (8, 256), (10, 45), (11, 4), (12, 2)],
)
def test_sets_are_those_of_the_definition(bits: int, count: int) -> None:
    entries, rng = 1 << bits, np.random.default_rng(bits * count)
    most = math.comb(entries, count)
    ranks = [int(rng.random() * 2**53) * most >> 53 for _ in range(3)]
    ranks += [int(math.exp(math.log(most) * rng.random())) for _ in range(3)]  # of any length
    ranks = [min(rank, most - 1) for rank in [*ranks, 0, 1, most // 2, most - 2, most - 1]]
    ranks = [max(rank, 0) for rank in ranks]
    found = _sets(ranks, entries, count)
    assert found.tolist() == [slow_set(rank, entries, count) for rank in ranks]
    assert list(_ranks(found)) == ranks


@pytest.mark.parametrize("count", [2, 45, 300])
def test_sets_of_large_codebooks_come_back(count: int) -> None:
    entries, rng = 1 << 14, np.random.default_rng(count)
    low, high = np.arange(count), np.arange(entries - count, entries)
    mixed = np.sort(np.concatenate([low[: count // 2], high[count // 2 :]]))
    sets = [np.sort(rng.choice(entries, count, replace=False)) for _ in range(4)]
    sets += [np.sort(rng.choice(2 * count, count, replace=False)) for _ in range(4)]
    expected = np.array([*sets, low, high, mixed, low + 7, low * 2])
    assert np.array_equal(_sets(list(_ranks(expected)), entries, count), expected)


def test_bits_of_a_level_are_computed() -> None:
    assert level_bits(256, 1) == 9
    assert level_bits(4096, 1) == 13
    assert level_bits(256, 4) == 28 + 4  # C(256, 4) = 174,792,640
    assert level_bits(256, 0) == 0
    assert coding_of(8, (1,) * 15).nbytes == 16.875


@pytest.mark.parametrize("atoms", [[[0, 256, 3]], [[-1, 2, 3]], [[0, 3, 2]], [[0, 3, 3]]])
def test_atoms_that_no_code_can_hold_are_refused(atoms: Any) -> None:
    codes = Codes(coding_of(), 1, np.array([atoms]), np.ones((1, 1, 3), np.int8))
    with raises_code("E_USAGE"):
        encode_codes(codes)


def test_first_images_keep_their_codes() -> None:
    pack = with_codes()
    assert pack.codes is not None
    atoms = decode_codes(pack.codes).atoms
    part = read(pack_bytes(pack.first(2)))
    assert part.codes is not None
    assert part.coded_images == 2
    assert np.array_equal(decode_codes(part.codes).atoms, atoms[:, :2])
    longer = pack.first(5)
    assert longer.codes is not None
    assert longer.coded_images == 4
    assert np.array_equal(decode_codes(longer.codes).atoms, atoms)


def test_selected_classes_keep_their_codes() -> None:
    pack = with_codes()
    part = read(pack_bytes(pack.select([4, 1])))
    assert pack.codes is not None
    assert part.codes is not None
    assert np.array_equal(decode_codes(part.codes).atoms, decode_codes(pack.codes, [4, 1]).atoms)


def test_seeded_images_count_behind_those_of_codes() -> None:
    pack = with_codes()
    classes, images = pack.counters([2, 2, 2], [0, 3, 5])
    assert classes.tolist() == [2, 2, 2]
    assert images.tolist() == [0, 3, 1]
    picked = replace(pack, picks=encode_picks(np.tile([6, 9], (5, 1))))
    assert picked.counters([2, 2, 2], [3, 4, 5])[1].tolist() == [3, 6, 9]
    assert read(pack_bytes(picked)).first(5).picks is not None
    assert picked.first(4).picks is None


def test_images_use_the_mode_of_their_code() -> None:
    pack = with_codes(images=8)
    assert pack.prompts is not None
    modes = pack.prompts.params["shape"][0]
    assert pack.modes([0, 2, 3, 4, 7]).tolist() == [m % modes for m in (0, 2, 0, 0, 3)]


def test_picks_of_a_pack_without_seeds_are_refused() -> None:
    pack = with_codes(images=4)
    with raises_code("E_CODEC"):
        pack_bytes(replace(pack, picks=encode_picks(np.zeros((5, 1), int))))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bits", 0),
        ("bits", 17),
        ("codes", 0),
        ("codes", 5),
        ("images", 7),
        ("images", 0),
        ("eta", -1.0),
        ("eta", 1),
        ("eta", -0.0),
        ("eta", 0.0),
        ("guidance", 1e4),
        ("guidance", -0.0),
        ("prompts", 1),
        ("sigmas", [1.0, 2.0, 0.0]),
        ("sigmas", [2.0, 1.0]),
        ("sigmas", 3),
        ("atoms", [1]),
        ("atoms", [0, 0]),
        ("atoms", [1, 257]),
        ("atoms", [1, True]),
        ("more", 1),
    ],
)
def test_other_parameters_are_refused(name: str, value: Any) -> None:
    codes = with_codes().codes
    assert codes is not None
    wrong = Coded(codes.codec, codes.tensors, {**codes.params, name: value})
    with raises_code("E_CODEC"):
        pack_bytes(make(images=6, codes=wrong))


@pytest.mark.parametrize("name", sorted(KEYS))
def test_parameters_are_complete_in_memory(name: str) -> None:
    codes = stored(with_codes().codes)
    rest = {key: value for key, value in codes.params.items() if key != name}
    with raises_code("E_CODEC", match=name):
        pack_bytes(make(images=6, codes=Coded(codes.codec, codes.tensors, rest)))


def test_parameters_without_effect_are_refused() -> None:
    codes = encode_codes(Codes(coding_of(prompts=False), 4, *choices(coding_of())))
    assert not decode_codes(codes).coding.prompts
    pack_bytes(make(images=6, codes=codes))
    guided = Coded(codes.codec, codes.tensors, {**codes.params, "guidance": 2.0})
    with raises_code("E_CODEC", match="guidance"):
        pack_bytes(make(images=6, codes=guided))
    first = coding_of(atoms=(2, 0), eta=0.0)
    pack_bytes(make(images=6, codes=encode_codes(Codes(first, 4, *choices(first)))))


@pytest.mark.parametrize(
    ("changes", "coded", "count", "written"),
    [
        ({"atoms": (1, 1)}, 4, 4, {}),
        ({"atoms": (1, 1)}, 4, 3, {"images": 4}),
        ({"atoms": (1, 2)}, 4, 4, {"atoms": [1, 2]}),
        ({"atoms": (1, 1), "bits": 9}, 4, 4, {"bits": 9}),
        ({"atoms": (1, 1), "eta": 0.5}, 4, 4, {"eta": 0.5}),
        ({"atoms": (1, 1), "guidance": 2.0}, 4, 4, {"guidance": 2.0}),
        ({"atoms": (1, 1), "prompts": False}, 4, 4, {"prompts": False}),
    ],
)
def test_defaults_are_left_out(
    changes: dict[str, Any], coded: int, count: int, written: dict[str, Any]
) -> None:
    coding = coding_of(**changes)
    codes = Codes(coding, coded, *choices(coding, count=count))
    pack = make(images=6, codes=encode_codes(codes))
    data = pack_bytes(pack)
    text = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["d3m"]
    (params,) = (params for name, _, params, *_ in json.loads(text)["sections"] if name == "codes")
    assert params == {"codes": count, "sigmas": [2.0, 1.0, 0.0], **written}
    found = read(data)
    assert found == pack
    assert stored(found.codes).params == stored(pack.codes).params
    assert decode_codes(stored(found.codes)).coding == coding


def test_rank_of_no_set_is_refused() -> None:
    pack = with_codes()
    assert pack.codes is not None
    bits = np.array(pack.codes.tensors["bits"])
    bits[2, 1:3] = 0xFF  # two of 256 atoms have 32,640 sets, in 15 bits
    bits[2, 3] |= 0x03
    with raises_code("E_CODES", match="class 2"):
        pack_bytes(replace(pack, codes=Coded("noise", {"bits": bits}, pack.codes.params)))


def test_bits_behind_the_last_code_are_refused() -> None:
    pack = with_codes()
    assert pack.codes is not None
    bits = np.array(pack.codes.tensors["bits"])
    bits[0, -1] |= 0x80  # 3 codes of 26 bits leave two bits
    with raises_code("E_CODES", match="not zero"):
        pack_bytes(replace(pack, codes=Coded("noise", {"bits": bits}, pack.codes.params)))


def test_every_flipped_bit_is_refused() -> None:
    data = bytearray(pack_bytes(with_codes()))
    for place in range(len(data) - 200, len(data)):
        for bit in range(8):
            data[place] ^= 1 << bit
            with pytest.raises(Exception, match="E_"):
                read(bytes(data))
            data[place] ^= 1 << bit

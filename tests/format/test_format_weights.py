"""Weights of images and picked sets: values, parts, and what cannot be stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cli import invoke
from format_packs import make, stored

import d3pack
from d3pack.errors import InvalidPackError, UsageError
from d3pack.format import Pack, decode_picks, decode_weights, encode_sets, encode_weights
from d3pack.format.ranges import class_ranges, read_class_ranges
from d3pack.format.reader import read_header

WEIGHTS = np.random.default_rng(3).uniform(0.2, 3, (5, 6))


def weighted(weights: npt.NDArray[Any] = WEIGHTS) -> Pack:
    return make(weights=encode_weights(weights))


def part(pack: Pack, rows: list[int]) -> Pack:
    """Return classes of a pack as they come by range requests."""
    data = d3pack.pack_bytes(pack)
    header = read_header(data)
    blobs = [data[start:stop] for start, stop in class_ranges(header, rows)]
    return read_class_ranges(header, rows, blobs)


def test_weights_are_kept_within_two_percent_for_a_byte_each() -> None:
    pack = d3pack.read(d3pack.pack_bytes(weighted()))
    kept = decode_weights(stored(pack.weights))
    assert kept.dtype == np.float32
    assert np.abs(kept / WEIGHTS - 1).max() < 0.0222
    assert pack.ledger().sections["weights"] == WEIGHTS.size


def test_least_and_most_weight() -> None:
    coded = stored(encode_weights(np.array([[1e-9, 1e9, 1.0, 2.0, 0.5]])))
    assert decode_weights(coded).tolist() == [[2**-8, np.float32(2 ** (127 / 16)), 1, 2, 0.5]]


def test_equal_weights_are_none() -> None:
    assert encode_weights(np.full((2, 3), 1.01)) is None
    assert encode_weights(np.full((2, 3), 1.05)) is not None


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
def test_weights_are_positive_numbers(value: float) -> None:
    with pytest.raises(UsageError, match="positive"):
        encode_weights(np.array([[1.0, value]]))


def test_writer_refuses_weights_of_one() -> None:
    coded = stored(weighted().weights)
    ones = type(coded)(coded.codec, {"codes": np.full((5, 6), 128, np.uint8)})
    with pytest.raises(InvalidPackError) as caught:
        d3pack.pack_bytes(make(weights=ones))
    assert caught.value.code == "E_WEIGHTS"


def test_parts_keep_their_weights() -> None:
    pack, whole = weighted(), decode_weights(stored(weighted().weights))
    assert (decode_weights(stored(pack.select([3, 1]).weights)) == whole[[3, 1]]).all()
    assert (decode_weights(stored(pack.first(2).weights)) == whole[:, :2]).all()
    assert part(pack, [3, 1]) == pack.select([3, 1])


def test_parts_whose_weights_are_all_one_have_none() -> None:
    weights = np.ones((5, 6))
    weights[0, 4] = 2
    pack = weighted(weights)
    for cut in (pack.select([1, 2]), pack.first(3), part(pack, [1, 2])):
        assert cut.weights is None
        assert d3pack.read(d3pack.pack_bytes(cut)) == cut
    assert pack.select([0, 2]).weights is not None


def test_picked_sets_are_candidates_of_one_stride() -> None:
    coded = encode_sets(np.array([2, 0, 1]), 3, 4)
    assert decode_picks(coded).tolist() == [[8, 9, 10], [0, 1, 2], [4, 5, 6]]
    assert coded.nbytes == 3


def test_first_images_of_picked_sets_are_the_same() -> None:
    pack = make(picks=encode_sets(np.array([5, 0, 3, 2, 7]), 6, 6))
    rows, columns = np.divmod(np.arange(10), 2)
    for cut in (pack.first(2), d3pack.read(d3pack.pack_bytes(pack.first(2)))):
        for ours, theirs in zip(
            cut.counters(rows, columns), pack.counters(rows, columns), strict=True
        ):
            assert (ours == theirs).all()
    assert decode_picks(stored(pack.select([4, 2]).picks))[:, 0].tolist() == [42, 18]
    assert pack.ledger().sections["picks"] == 5


@pytest.mark.parametrize(
    ("sets", "images", "stride"), [([2**24], 1, 1), ([1], 3, 2), ([1], 3, 2**32), ([-1], 1, 1)]
)
def test_sets_that_do_not_fit_are_refused(sets: list[int], images: int, stride: int) -> None:
    with pytest.raises(UsageError):
        encode_sets(np.array(sets), images, stride)


def test_info_names_weights_and_sets(tmp_path: Path) -> None:
    path = tmp_path / "a.d3m"
    pack = make(weights=encode_weights(WEIGHTS), picks=encode_sets(np.array([5, 0, 3, 2, 7]), 6, 6))
    d3pack.write(pack, path)
    said = invoke("info", str(path)).stdout
    assert "weights     log, one for each image" in said
    assert "curated, 3 bits a class" in said

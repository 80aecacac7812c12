"""The order of an epoch: a permutation, exactly once over any ranks, resumable at any step."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d3pack.dataset.order import BatchOrder, Permutation
from d3pack.errors import UsageError


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 16, 17, 1000, 4097, 65536])
def test_permutation_has_every_number_once(size: int) -> None:
    got = Permutation(size, seed=3, epoch=0)(np.arange(size))
    assert sorted(got.tolist()) == list(range(size))


def test_permutation_is_a_function_of_each_position() -> None:
    order = Permutation(50_000, seed=9, epoch=4)
    whole = order(np.arange(50_000))
    some = np.array([49_999, 0, 77, 77, 12_345])
    np.testing.assert_array_equal(order(some), whole[some])


def test_permutation_is_the_same_in_every_release() -> None:
    """A saved state refers to an order, which must not change."""
    ten = Permutation(10, seed=0, epoch=0)(np.arange(10))
    assert ten.tolist() == [4, 1, 2, 7, 5, 0, 3, 6, 8, 9]
    some = Permutation(10**6, seed=1, epoch=2)(np.array([0, 1, 999_999]))
    assert some.tolist() == [982083, 655684, 419832]


def test_permutation_differs_by_seed_and_epoch() -> None:
    seen = {
        tuple(Permutation(64, seed, epoch)(np.arange(64)).tolist())
        for seed in (-1, 0, 1, 2**40, 2**63)
        for epoch in range(20)
    }
    assert len(seen) == 100


@pytest.mark.parametrize("size", [6, 100])
def test_permutation_is_uniform(size: int) -> None:
    """Chi-square over 4000 epochs, per position; the sum of all tables is within five sigma."""
    trials = 4000
    counts = np.zeros((size, size))
    for epoch in range(trials):
        counts[np.arange(size), Permutation(size, 7, epoch)(np.arange(size))] += 1
    expected = trials / size
    chi = ((counts - expected) ** 2 / expected).sum()
    freedom = (size - 1) ** 2
    assert abs(chi - freedom) < 5 * np.sqrt(2 * freedom)


def test_permutation_separates_neighbours() -> None:
    order = Permutation(10_000, 0, 0)(np.arange(10_000)).astype(float)
    for lag in (1, 2, 128):
        assert abs(np.corrcoef(order[:-lag], order[lag:])[0, 1]) < 0.05


def test_permutation_takes_constant_time() -> None:
    """O(1): a million images are not permuted to find one."""
    start = time.perf_counter()
    for epoch in range(200):
        Permutation(10**9, 0, epoch)(np.array([999_999_999]))
    assert time.perf_counter() - start < 2.0


def takes(order: BatchOrder, epoch: int = 0, consumed: int = 0) -> list[list[int]]:
    return [indices.tolist() for indices, _ in order.walk(epoch, consumed)]


@settings(max_examples=200, deadline=None)
@given(
    size=st.integers(1, 120),
    batch=st.integers(1, 40),
    world=st.integers(1, 7),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
)
def test_ranks_together_take_every_image_once(
    size: int, batch: int, world: int, shuffle: bool, drop_last: bool
) -> None:
    if size < world:
        with pytest.raises(UsageError, match="cannot be divided"):
            BatchOrder(size, batch, world=world, shuffle=True)
        return
    ranks = [
        BatchOrder(size, batch, shuffle=shuffle, rank=r, world=world, drop_last=drop_last)
        for r in range(world)
    ]
    steps = [takes(order) for order in ranks]
    assert len({len(each) for each in steps}) == 1, "else ranks would wait for each other for ever"
    assert all(len(each) == len(order) for each, order in zip(steps, ranks, strict=True))
    flat = [index for each in steps for batch_ in each for index in batch_]
    assert len(flat) == len(set(flat))
    assert len(flat) == (size // (batch * world) * batch * world if drop_last else size)
    sizes = [[len(each[step]) for each in steps] for step in range(len(steps[0]))]
    assert all(max(row) - min(row) <= 1 and min(row) >= 1 for row in sizes)
    assert max((max(row) for row in sizes), default=0) <= batch + 1
    if world == 1:
        assert all(row[0] <= batch for row in sizes)
        assert all(row[0] == batch for row in sizes[:-1])


@settings(max_examples=100, deadline=None)
@given(data=st.data(), size=st.integers(8, 200))
def test_resume_on_other_ranks_takes_the_rest_once(data: st.DataObject, size: int) -> None:
    """Any sequence of (ranks, batch size, steps), each resumed from the state before, as JSON."""
    state: str | None = None
    taken: list[int] = []
    for _ in range(20):
        world, batch = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 16))
        ranks = [
            BatchOrder(size, batch, seed=5, rank=r, world=world, shuffle=True) for r in range(world)
        ]
        for order in ranks:
            if state:
                order.load_state_dict(json.loads(state))
        if ranks[0].epoch > 0:
            break
        for batches in zip(*(iter(order) for order in ranks), strict=True):
            taken += [index for each in batches for index in each]
            if data.draw(st.booleans()):
                break
        states = {json.dumps(order.state_dict(), sort_keys=True) for order in ranks}
        assert len(states) == 1
        state = states.pop()
    else:
        pytest.skip("never got through the epoch")
    assert sorted(taken) == list(range(size))


def test_state_keeps_its_order() -> None:
    first = BatchOrder(100, 10, seed=1, identity="a", shuffle=True)
    batches = iter(first)
    head = [next(batches) for _ in range(3)]
    other = BatchOrder(100, 10, seed=99, shuffle=False, identity="a")
    other.load_state_dict(first.state_dict())
    assert head + list(other) == takes(BatchOrder(100, 10, seed=1, shuffle=True))


def test_each_iteration_is_an_epoch() -> None:
    order = BatchOrder(10, 4, seed=2, shuffle=True)
    assert list(order) == takes(order, 0)
    assert (order.epoch, order.consumed) == (1, 0)
    left = iter(order)
    assert next(left) == takes(order, 1)[0]
    assert list(order) == takes(order, 2), "an epoch that was left is not resumed"


def test_set_epoch_keeps_the_place_within_the_epoch() -> None:
    order = BatchOrder(10, 4, shuffle=True)
    order.load_state_dict(order.state_dict() | {"epoch": 3, "consumed": 4})
    order.set_epoch(3)
    assert list(order) == takes(order, 3, 4)
    order.set_epoch(9)
    assert list(order) == takes(order, 9)


def test_set_epoch_repeats_an_epoch_left_after_its_last_batch() -> None:
    order = BatchOrder(10, 4, shuffle=True)
    order.set_epoch(0)
    for _ in order:
        if order.consumed == 10:
            break
    order.set_epoch(0)
    assert list(order) == takes(order, 0)
    with pytest.raises(UsageError, match="expected 0 or more"):
        order.set_epoch(-3)


def test_state_after_the_last_batch_is_the_next_epoch() -> None:
    order = BatchOrder(8, 4, shuffle=True)
    batches = iter(order)
    next(batches), next(batches)
    assert order.state_dict()["epoch"] == 1
    assert order.state_dict()["consumed"] == 0


def test_state_after_batches_does_not_count_those_taken_ahead() -> None:
    order = BatchOrder(21, 4, seed=5, world=2, shuffle=True)
    order.load_state_dict(order.state_dict() | {"epoch": 2, "consumed": 3})
    for taken_ahead in (2, 3):
        batches = iter(order)
        for _ in range(taken_ahead):
            next(batches)
        epoch = order.epoch
        state = order.state_after(1)
        assert (state["epoch"], state["consumed"]) == (epoch, 11 if epoch == 2 else 8)
        assert order.state_after(taken_ahead) == order.state_dict()
    assert list(order) == takes(order, 4), "the state is only read"
    assert order.state_after(3)["epoch"] == 5, "the epoch is over, and the order is in the next one"
    assert order.state_after(0) == order.state_dict() | {"epoch": 4}


def test_rest_that_new_ranks_drop_is_the_next_epoch() -> None:
    order = BatchOrder(10, 4, drop_last=True, shuffle=True)
    order.load_state_dict(BatchOrder(10, 8, shuffle=True).state_dict() | {"consumed": 8})
    assert list(order) == takes(order, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"pack": "another"},
        {"images": 11},
        {"state": 2},
        {"epoch": -1},
        {"consumed": 11},
        {"consumed": "x"},
        {"seed": None},
    ],
)
def test_foreign_or_invalid_state_is_refused(change: dict[str, object]) -> None:
    order = BatchOrder(10, 4, identity="this", shuffle=True)
    with pytest.raises(UsageError):
        order.load_state_dict(order.state_dict() | change)
    assert (order.epoch, order.consumed) == (0, 0)


def test_state_without_its_fields_is_refused() -> None:
    order = BatchOrder(10, 4, shuffle=True)
    state = order.state_dict()
    del state["consumed"]
    with pytest.raises(UsageError, match="invalid loader state"):
        order.load_state_dict(state)
    with pytest.raises(UsageError, match="invalid loader state: expected a mapping, not list"):
        order.load_state_dict([1])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("batch", "rank", "world"),
    [(0, 0, 1), (-1, 0, 1), (2.5, 0, 1), ("4", 0, 1), (1, 1, 1), (1, -1, 2), (1, 0, 0)],
)
def test_invalid_batch_size_or_rank_is_refused(batch: Any, rank: int, world: int) -> None:
    with pytest.raises(UsageError):
        BatchOrder(10, batch, rank=rank, world=world, shuffle=True)

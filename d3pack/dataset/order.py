"""The order of an epoch: a keyed permutation, and who takes which part of it.

Position p of epoch e is image `Permutation(n, seed, e)(p)`: a pure function, so that resuming in
the middle of an epoch, on any number of ranks and at any batch size, costs and repeats nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from d3pack.errors import UsageError

Ints = npt.NDArray[np.int64]
_Words = npt.NDArray[np.uint64]

_MASK = (1 << 64) - 1
_ROUNDS = 8
_BLOCK = 8192  # positions permuted at once: numpy is slow on small arrays
_FACTOR, _UPPER = np.uint64(0x9E3779B97F4A7C15), np.uint64(32)
_STATE = 1  # version of the state dict


def _mixed(value: int) -> int:
    """SplitMix64's finaliser: spreads every input bit over 64 output bits."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


class Permutation:
    """A keyed permutation of range(size), size < 2**63: a Feistel network, walked to the inside.

    The network permutes the next power of two, less than twice the size, so a position takes fewer
    than two walks on average.
    """

    def __init__(self, size: int, seed: int, epoch: int) -> None:
        bits = max(2, (size - 1).bit_length())
        self.size = size
        self._low_bits = np.uint64(bits // 2)
        self._low = np.uint64((1 << (bits // 2)) - 1)
        self._high = np.uint64((1 << (bits - bits // 2)) - 1)
        key = _mixed(_mixed(seed & _MASK) ^ ((epoch + 1) * 0x9E3779B97F4A7C15 & _MASK))
        self._keys = [
            np.uint64(_mixed(key + (r + 1) * 0x9E3779B97F4A7C15 & _MASK)) for r in range(_ROUNDS)
        ]

    def _network(self, words: _Words) -> _Words:
        low, high = words & self._low, words >> self._low_bits
        for number, key in enumerate(self._keys):
            # The upper half of a product depends on every bit of its factors.
            if number % 2:
                high ^= (low + key) * _FACTOR >> _UPPER & self._high
            else:
                low ^= (high + key) * _FACTOR >> _UPPER & self._low
        return high << self._low_bits | low

    def __call__(self, positions: Ints) -> Ints:
        words = self._network(positions.astype(np.uint64))
        outside = np.flatnonzero(words >= self.size)
        while outside.size:
            words[outside] = self._network(words[outside])
            outside = outside[words[outside] >= self.size]
        return words.astype(np.int64)


class BatchOrder:
    """Batches of indices, exactly once an epoch over all ranks; a batch sampler with a state.

    The state counts what all ranks together have taken, so it may be loaded on another number of
    ranks or at another batch size. All ranks take the same number of steps: the rest at the end of
    an epoch is shared out evenly; one smaller than the number of ranks joins the step before it.

    Each `iter()` is an epoch: the first one begins where a loaded state stands, one that was left
    half-way is not gone back to.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = False,
        identity: str = "",
    ) -> None:
        if not isinstance(batch_size, int | np.integer) or batch_size < 1:
            raise UsageError(f"batch_size is {batch_size}", hint="give 1 or more")
        if not 0 <= rank < world:
            raise UsageError(
                f"rank {rank} of {world} ranks", hint="ranks count from 0 to world - 1"
            )
        if size < world:
            raise UsageError(
                f"{size} images cannot be shared by {world} ranks", hint="use fewer ranks"
            )
        self.size = size
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world = world
        self.drop_last = drop_last
        self.identity = identity
        self.epoch = 0
        self.consumed = 0
        self._started = False

    def __len__(self) -> int:
        """Steps in a whole epoch, the same on every rank."""
        full, rest = divmod(self.size, self.batch_size * self.world)
        joins = full > 0 and rest < self.world
        return full if self.drop_last or joins else full + 1

    def _taken_next(self, consumed: int) -> int:
        """How many images all ranks together take in the step that starts at `consumed`."""
        whole, left = self.batch_size * self.world, self.size - consumed
        if left < whole:
            return 0 if self.drop_last else left
        return left if left - whole < self.world and not self.drop_last else whole

    def walk(self, epoch: int, consumed: int) -> Iterator[tuple[Ints, int]]:
        """This rank's batches from a point on, each with the count consumed once it is done."""
        order = Permutation(self.size, self.seed, epoch)
        block: list[Ints] = []
        done: list[int] = []
        while taken := self._taken_next(consumed):
            share, extra = divmod(taken, self.world)
            start = consumed + self.rank * share + min(self.rank, extra)
            block.append(np.arange(start, start + share + (self.rank < extra), dtype=np.int64))
            consumed += taken
            done.append(consumed)
            if len(block) * self.batch_size >= _BLOCK or not self._taken_next(consumed):
                indices = np.concatenate(block)
                ends = np.cumsum([len(positions) for positions in block])
                parts = np.split(order(indices) if self.shuffle else indices, ends[:-1])
                yield from zip(parts, done, strict=True)
                block, done = [], []

    def begin(self) -> tuple[int, int]:
        """Start an iteration: the epoch and the count consumed at which it begins."""
        if self._started:
            self.epoch, self.consumed = self.epoch + 1, 0
        self._settle()
        self._started = True
        return self.epoch, self.consumed

    def finish(self) -> None:
        """The epoch is over; the next iteration begins the one after it."""
        self.epoch, self.consumed, self._started = self.epoch + 1, 0, False

    def __iter__(self) -> Iterator[list[int]]:
        for indices, consumed in self.walk(*self.begin()):
            self.consumed = consumed
            yield indices.tolist()
        self.finish()

    def set_epoch(self, epoch: int) -> None:
        """Begin the next iteration at an epoch; where it stands in that epoch already, it stays."""
        if epoch < 0:
            raise UsageError(f"epoch {epoch}", hint="epochs count from 0")
        # One that was left at its last batch is asked for once more, from its beginning.
        over = self._started and not self._taken_next(self.consumed)
        if epoch != self.epoch or over:
            self.epoch, self.consumed = epoch, 0
        self._started = False

    def _settle(self) -> None:
        if not self._taken_next(self.consumed):
            self.epoch, self.consumed = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Where the epoch stands, as JSON values; the same on every rank."""
        over = not self._taken_next(self.consumed)
        return {
            "state": _STATE,
            "pack": self.identity,
            "images": self.size,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "epoch": self.epoch + over,
            "consumed": 0 if over else self.consumed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state stands, in its order; refuses the state of another pack."""
        check_state(state, identity=self.identity, images=self.size)
        try:
            epoch, consumed = int(state["epoch"]), int(state["consumed"])
            seed, shuffle = int(state["seed"]), bool(state["shuffle"])
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"not a loader state: {error!r}") from error
        if epoch < 0 or not 0 <= consumed <= self.size:
            raise UsageError(f"not a loader state: epoch {epoch}, consumed {consumed}")
        self.epoch, self.consumed, self.seed, self.shuffle = epoch, consumed, seed, shuffle
        self._started = False


def check_state(state: Mapping[str, Any], *, identity: str, images: int) -> None:
    """Refuse a state that belongs to something else."""
    if not isinstance(state, Mapping):
        raise UsageError(f"not a loader state: {type(state).__name__}")
    if state.get("state") != _STATE:
        raise UsageError(f"not a loader state of version {_STATE}: {state.get('state')!r}")
    if state.get("pack") != identity or state.get("images") != images:
        raise UsageError(
            f"this state belongs to pack {str(state.get('pack'))[:16]} with "
            f"{state.get('images')} images, not to {identity[:16]} with {images}",
            hint="resume with the pack and the selection it was saved with",
        )

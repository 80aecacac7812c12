"""The order of an epoch: a keyed permutation, divided among ranks and batches.

Position p of epoch e is image `Permutation(n, seed, e)(p)`: a pure function. A training can resume
in the middle of an epoch, on any number of ranks and at any batch size, without repeating work.
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


def _mix(value: int) -> int:
    """Return the SplitMix64 finaliser of a value: every input bit changes all 64 output bits."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


class Permutation:
    """A keyed permutation of range(size), size < 2**63: a Feistel network with cycle walking.

    The network permutes the next power of two. It is applied again to results outside the range,
    on average less than once a position, as the power is less than twice the size.
    """

    def __init__(self, size: int, seed: int, epoch: int) -> None:
        bits = max(2, (size - 1).bit_length())
        self.size = size
        self._low_bits = np.uint64(bits // 2)
        self._low = np.uint64((1 << (bits // 2)) - 1)
        self._high = np.uint64((1 << (bits - bits // 2)) - 1)
        key = _mix(_mix(seed & _MASK) ^ ((epoch + 1) * 0x9E3779B97F4A7C15 & _MASK))
        self._keys = [
            np.uint64(_mix(key + (r + 1) * 0x9E3779B97F4A7C15 & _MASK)) for r in range(_ROUNDS)
        ]

    def _network(self, words: _Words) -> _Words:
        low, high = words & self._low, words >> self._low_bits
        for number, key in enumerate(self._keys):
            # the upper half of a product depends on every bit of its factors
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
    """A batch sampler with a state: every index once an epoch, over all ranks together.

    The state counts the indices that all ranks together have taken, so it can be loaded with
    another number of ranks or another batch size. All ranks take the same number of steps: the
    last indices of an epoch are divided evenly; if there are fewer of them than ranks, they join
    the step before.

    Each `iter()` is an epoch. The first one begins at the loaded state; an epoch that was left
    early is not resumed by the next `iter()`.

    Args:
        size: number of indices.
        batch_size: indices that a rank takes in a step.
        shuffle: whether to permute the indices, differently in each epoch.
        seed: seed of the permutation.
        rank: number of this process, from 0.
        world: number of processes.
        drop_last: whether to leave out the last indices where they do not fill a step.
        identity: name of what the indices belong to; a state is only loaded under the same name.

    Raises:
        UsageError: the batch size is not a positive integer, the rank is not below `world`, or
            there are fewer indices than ranks.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = False,
        identity: str = "",
    ) -> None:
        if not isinstance(batch_size, int | np.integer) or batch_size < 1:
            raise UsageError(
                f"invalid batch_size {batch_size!r}: expected an integer of at least 1"
            )
        if not 0 <= rank < world:
            raise UsageError(f"invalid rank {rank} with world={world}: expected 0 to world - 1")
        if size < world:
            raise UsageError(
                f"{size} images cannot be divided among {world} ranks", hint="use fewer ranks"
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
        self._begun = (0, 0)

    def __len__(self) -> int:
        """Return the steps of a complete epoch, the same on every rank."""
        full, rest = divmod(self.size, self.batch_size * self.world)
        joins = full > 0 and rest < self.world
        return full if self.drop_last or joins else full + 1

    def _step_size(self, consumed: int) -> int:
        """Return how many images all ranks together take in the step that starts at `consumed`."""
        full, left = self.batch_size * self.world, self.size - consumed
        if left < full:
            return 0 if self.drop_last else left
        return left if left - full < self.world and not self.drop_last else full

    def walk(self, epoch: int, consumed: int) -> Iterator[tuple[Ints, int]]:
        """Yield this rank's batches from a point on, each with the images consumed after it."""
        order = Permutation(self.size, self.seed, epoch)
        block: list[Ints] = []
        done: list[int] = []
        while step := self._step_size(consumed):
            share, extra = divmod(step, self.world)
            start = consumed + self.rank * share + min(self.rank, extra)
            block.append(np.arange(start, start + share + (self.rank < extra), dtype=np.int64))
            consumed += step
            done.append(consumed)
            if len(block) * self.batch_size >= _BLOCK or not self._step_size(consumed):
                indices = np.concatenate(block)
                ends = np.cumsum([len(positions) for positions in block])
                parts = np.split(order(indices) if self.shuffle else indices, ends[:-1])
                yield from zip(parts, done, strict=True)
                block, done = [], []

    def begin(self) -> tuple[int, int]:
        """Start an iteration; return the epoch and the images consumed where it begins."""
        if self._started:
            self.epoch, self.consumed = self.epoch + 1, 0
        self._settle()
        self._started = True
        self._begun = self.epoch, self.consumed
        return self._begun

    def finish(self) -> None:
        """End the epoch: the next iteration begins the one after it."""
        self.epoch, self.consumed, self._started = self.epoch + 1, 0, False

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the batches of one epoch."""
        for indices, consumed in self.walk(*self.begin()):
            self.consumed = consumed
            yield indices.tolist()
        self.finish()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration; the position within the current epoch is kept."""
        if epoch < 0:
            raise UsageError(f"invalid epoch {epoch}: expected 0 or more")
        # an epoch that was left after its last batch begins again
        over = self._started and not self._step_size(self.consumed)
        if epoch != self.epoch or over:
            self.epoch, self.consumed = epoch, 0
        self._started = False

    def _settle(self) -> None:
        """Move on to the next epoch when nothing is left of this one."""
        if not self._step_size(self.consumed):
            self.epoch, self.consumed = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the epoch as JSON values, the same on every rank."""
        return self._state(self.epoch, self.consumed)

    def state_after(self, batches: int) -> dict[str, Any]:
        """Return the state after the first batches of the latest iteration.

        For a DataLoader with workers, which takes batches before it hands them out: the training
        loop counts those that it was given. Any number of workers can go on from such a state.
        """
        epoch, consumed = self._begun
        for _ in range(batches):
            consumed += self._step_size(consumed)
        return self._state(epoch, consumed)

    def _state(self, epoch: int, consumed: int) -> dict[str, Any]:
        over = not self._step_size(consumed)
        return {
            "state": _STATE,
            "pack": self.identity,
            "images": self.size,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "epoch": epoch + over,
            "consumed": 0 if over else consumed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state, in the order that it names.

        Raises:
            UsageError: the state is not valid, or belongs to another pack or selection.
        """
        check_state(state, identity=self.identity, images=self.size)
        try:
            epoch, consumed = int(state["epoch"]), int(state["consumed"])
            seed, shuffle = int(state["seed"]), bool(state["shuffle"])
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"invalid loader state: {error!r}") from error
        if epoch < 0 or not 0 <= consumed <= self.size:
            raise UsageError(f"invalid loader state: epoch {epoch}, consumed {consumed}")
        self.epoch, self.consumed, self.seed, self.shuffle = epoch, consumed, seed, shuffle
        self._started = False


def check_state(state: Mapping[str, Any], *, identity: str, images: int) -> None:
    """Raise `UsageError` unless a state belongs to these images."""
    if not isinstance(state, Mapping):
        raise UsageError(f"invalid loader state: expected a mapping, not {type(state).__name__}")
    if state.get("state") != _STATE:
        raise UsageError(
            f"invalid loader state: expected version {_STATE}, not {state.get('state')!r}"
        )
    if state.get("pack") != identity or state.get("images") != images:
        raise UsageError(
            f"this state belongs to pack {str(state.get('pack'))[:16]} with "
            f"{state.get('images')} images, not to {identity[:16]} with {images}",
            hint="resume with the pack and the selection it was saved with",
        )

"""Values as a codec stored them: what every section of a pack is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from d3pack.format.canonical import FrozenDict, freeze, to_plain

Array = npt.NDArray[Any]
EMPTY: Mapping[str, Any] = FrozenDict()


def frozen(array: Array) -> Array:
    """The array, read-only, little-endian, contiguous; copied only if one could still write."""
    array = np.asarray(array)
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    array = np.ascontiguousarray(array) if array.ndim else array
    if array.flags.writeable or not _immutable(array):
        # bytes own it: the flag of an array that owns its memory could be set back
        return np.ndarray(array.shape, array.dtype, array.tobytes())
    return array


def _immutable(array: Array) -> bool:
    base: Any = array
    while isinstance(base, np.ndarray):
        if base.flags.writeable:
            return False
        base = base.base
    return isinstance(base, bytes)


@dataclass(frozen=True, slots=True, eq=False)
class Coded:
    """The bytes of the file, not their meaning (see `d3pack.format.codecs`)."""

    codec: str
    tensors: Mapping[str, Array]  # first axis is the class axis, but for those named in `shared`
    params: Mapping[str, Any] = field(default_factory=lambda: EMPTY)  # shape, errors, bits, k, ...
    shared: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        tensors = {name: frozen(array) for name, array in self.tensors.items()}
        object.__setattr__(self, "tensors", FrozenDict(tensors))
        object.__setattr__(self, "params", freeze(to_plain(self.params)))
        object.__setattr__(self, "shared", frozenset(self.shared))

    def __reduce__(self) -> tuple[Any, ...]:
        return Coded, (self.codec, dict(self.tensors), self.params, self.shared)

    def take(self, rows: Array) -> Coded:
        """The same values for some classes, in the given order."""
        tensors = {
            name: array if name in self.shared else array[rows]
            for name, array in self.tensors.items()
        }
        return Coded(self.codec, tensors, self.params, self.shared)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(array.nbytes for array in self.tensors.values())

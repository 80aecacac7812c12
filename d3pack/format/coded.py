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
# dtypes of the format, and NumPy's spelling of them
DTYPES = {"U8": "|u1", "I8": "|i1", "U32": "<u4", "F16": "<f2"}


def freeze_array(array: Array) -> Array:
    """Return the array read-only, little-endian and contiguous.

    It is copied unless nobody can write to it: an array that owns its memory could be made
    writeable again, so the memory must be that of a `bytes` object.
    """
    array = np.asarray(array)
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    array = np.ascontiguousarray(array) if array.ndim else array
    if _is_immutable(array):
        return array
    return np.ndarray(array.shape, array.dtype, array.tobytes())


def _is_immutable(array: Array) -> bool:
    base: Any = array
    while isinstance(base, np.ndarray):
        if base.flags.writeable:
            return False
        base = base.base
    return isinstance(base, bytes)


@dataclass(frozen=True, slots=True, eq=False)
class Coded:
    """A section as it is stored; `d3pack.format.codecs` makes and decodes it."""

    codec: str
    tensors: Mapping[str, Array]  # the first axis is the class, but for those named in `shared`
    params: Mapping[str, Any] = field(default_factory=lambda: EMPTY)  # shape, bits, k, ...
    shared: frozenset[str] = frozenset()
    figures: Mapping[str, Any] = field(default_factory=lambda: EMPTY)  # measured, never stored

    def __post_init__(self) -> None:
        tensors = {name: freeze_array(array) for name, array in self.tensors.items()}
        object.__setattr__(self, "tensors", FrozenDict(tensors))
        object.__setattr__(self, "params", freeze(to_plain(self.params)))
        object.__setattr__(self, "figures", freeze(to_plain(self.figures)))
        object.__setattr__(self, "shared", frozenset(self.shared))

    def __reduce__(self) -> tuple[Any, ...]:
        return Coded, (self.codec, dict(self.tensors), self.params, self.shared, self.figures)

    def take(self, rows: Array) -> Coded:
        """Return the same values for some classes, in the given order."""
        tensors = {
            name: array if name in self.shared else array[rows]
            for name, array in self.tensors.items()
        }
        return Coded(self.codec, tensors, self.params, self.shared, self.figures)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(array.nbytes for array in self.tensors.values())

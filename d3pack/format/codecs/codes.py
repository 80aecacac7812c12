"""Codes: single images, each as choices among the noise of the format.

A code belongs to a stochastic sampler. For every level it says which entries ("atoms") of that
level's codebook are added, and with which sign, in place of fresh noise. A codebook costs no bytes:
its entries are noise of the format, with their number in the counter. The m atoms of a level are a
set, so they are stored as the rank of that set, followed by m signs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from d3pack.errors import InvalidPackError, UsageError
from d3pack.format.codecs import _checks
from d3pack.format.codecs._checks import Layout, SectionSpec, Tensor
from d3pack.format.coded import Array, Coded
from d3pack.format.recipe import MAX_ETA, MAX_FRESH, check_sigmas, is_real

CODEC = "noise"
MAX_BITS = 16
MAX_ATOMS = 1024  # of a level
KEYS = {"atoms", "bits", "codes", "eta", "guidance", "images", "prompts", "sigmas"}
DEFAULTS = {"bits": 8, "eta": 1.0, "guidance": 1.0, "prompts": True}  # those of a `Coding`


@dataclass(frozen=True, slots=True)
class Coding:
    """How images are made of codes: what all codes of a pack have in common."""

    sigmas: tuple[float, ...]  # descending, the last one 0
    atoms: tuple[int, ...]  # of each level but the last; 0: fresh noise
    bits: int = 8  # a codebook has 2**bits entries
    eta: float = 1.0  # share of noise in a step; 1: ancestral sampling
    guidance: float = 1.0
    prompts: bool = True  # under the prompt of the class, or under none

    @property
    def entries(self) -> int:
        """Entries of a codebook."""
        return 1 << self.bits

    @property
    def widths(self) -> tuple[int, ...]:
        """Bits of each level of a code."""
        return tuple(level_bits(self.entries, count) for count in self.atoms)

    @property
    def nbytes(self) -> float:
        """Bytes of a code."""
        return sum(self.widths) / 8


@dataclass(frozen=True, slots=True, eq=False)
class Codes:
    """Decoded codes. Image j of a class, j < images, is made of code j mod M.

    `atoms` and `signs` are (classes, M, sum of `coding.atoms`), level after level; the atoms of a
    level ascend.
    """

    coding: Coding
    images: int
    atoms: Array  # int64, entries of the codebooks
    signs: Array  # int8, -1 or 1


def level_bits(entries: int, atoms: int) -> int:
    """Return the bits of the choice of so many atoms, with signs."""
    return (math.comb(entries, atoms) - 1).bit_length() + atoms


def encode_codes(codes: Codes) -> Coded:
    """Store codes.

    Raises:
        UsageError: the atoms of a level do not ascend, or are no entries of the codebook.
    """
    coding, atoms, signs = codes.coding, np.asarray(codes.atoms), np.asarray(codes.signs)
    classes, count, total = atoms.shape
    if (
        total != sum(coding.atoms)
        or signs.shape != atoms.shape
        or not np.isin(signs, (-1, 1)).all()
    ):
        raise UsageError("codes are atoms and signs (classes, codes, atoms of all levels)")
    fields: list[Array] = []
    for first, m, width in _levels(coding):
        chosen, sign = atoms[..., first : first + m], signs[..., first : first + m]
        if not m:
            continue
        ascending = (np.diff(chosen, axis=-1) > 0).all()
        if not ascending or chosen.min() < 0 or chosen.max() >= coding.entries:
            raise UsageError(f"atoms of a level must ascend, from 0 to {coding.entries - 1}")
        ranks = _ranks(chosen.reshape(-1, m))
        fields += [sign.reshape(-1, m) < 0, _to_bits(ranks, width - m)]
    bits = np.concatenate(fields, axis=1)
    data = np.packbits(bits.reshape(classes, -1), axis=1, bitorder="little")
    params = {
        "atoms": list(coding.atoms),
        "bits": coding.bits,
        "codes": count,
        "eta": coding.eta,
        "guidance": coding.guidance,
        "images": codes.images,
        "prompts": coding.prompts,
        "sigmas": list(coding.sigmas),
    }
    return Coded(CODEC, {"bits": data}, params)


def coding_of(coded: Coded) -> Coding:
    """Return what the codes of a section have in common."""
    params = coded.params
    names = ("sigmas", "atoms", "bits", "eta", "guidance", "prompts")
    return Coding(**{name: params[name] for name in names})


def decode_codes(coded: Coded, rows: Sequence[int] | Array | None = None) -> Codes:
    """Return the codes of some classes, or of all."""
    count = coded.params["codes"]
    classes = np.arange(len(coded.tensors["bits"])) if rows is None else np.asarray(rows)
    numbers = np.tile(np.arange(count), len(classes))
    values = codes_at(coded, np.repeat(classes, count), numbers)
    atoms, signs = (part.reshape(len(classes), count, -1) for part in values)
    return Codes(coding_of(coded), coded.params["images"], atoms, signs)


def codes_at(coded: Coded, classes: Array, numbers: Array) -> tuple[Array, Array]:
    """Return atoms and signs (N, atoms of all levels) of code numbers[j] of classes[j]."""
    coding, stored = coding_of(coded), coded.tensors["bits"]
    total = sum(coding.widths)
    bits = np.stack(
        [
            _cut(stored[c], number * total, total)
            for c, number in zip(classes.tolist(), numbers.tolist(), strict=True)
        ]
    )
    atoms, signs = [], []
    at = 0
    for _, m, width in _levels(coding):
        if not m:
            continue
        signs.append(1 - 2 * bits[:, at : at + m].astype(np.int8))
        ranks = _from_bits(bits[:, at + m : at + width])
        atoms.append(_sets(ranks, coding.entries, m))
        at += width
    return np.concatenate(atoms, axis=1), np.concatenate(signs, axis=1)


def _cut(row: Array, start: int, width: int) -> Array:
    """Return bits of a row of bytes."""
    first, skipped = divmod(start, 8)
    stop = -(-(start + width) // 8)
    return np.unpackbits(row[first:stop], bitorder="little")[skipped : skipped + width]


def first_codes(coded: Coded, images: int) -> Coded:
    """Return the codes of the first images of every class."""
    count, total = min(images, coded.params["codes"]), sum(coding_of(coded).widths)
    bits = np.unpackbits(coded.tensors["bits"], axis=1, count=count * total, bitorder="little")
    params = {**coded.params, "codes": count, "images": min(images, coded.params["images"])}
    return Coded(CODEC, {"bits": np.packbits(bits, axis=1, bitorder="little")}, params)


def code_defaults(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the default of each parameter that may be left out.

    For a malformed section the values mean nothing, but nothing is raised.
    """
    sigmas = params.get("sigmas")
    steps = len(sigmas) - 1 if isinstance(sigmas, (list, tuple)) else 0
    return {**DEFAULTS, "atoms": [1] * steps, "images": params.get("codes")}


def layout_codes(spec: SectionSpec, classes: int, images: int, at: str = "codes") -> Layout:
    """Return the tensor of codes; codec and parameters are checked."""
    _checks.check_codec(spec, CODEC, at)
    _checks.check_keys(spec.params, at, KEYS)
    bits = _checks.check_integer(spec.params, "bits", at, 1, MAX_BITS)
    count = _checks.check_integer(spec.params, "codes", at, 1, images)
    _checks.check_integer(spec.params, "images", at, count, images)
    _check_sampling(spec.params, at)
    _check_atoms(spec.params, at, 1 << bits)
    width = sum(level_bits(1 << bits, atoms) for atoms in spec.params["atoms"])
    return {"bits": Tensor("U8", (classes, (count * width + 7) // 8))}


def _check_sampling(params: Mapping[str, Any], at: str) -> None:
    sigmas = params["sigmas"]
    if not isinstance(sigmas, (list, tuple)) or not all(type(s) is float for s in sigmas):
        raise _codec_error(f"{at}.params.sigmas: not an array of reals")
    check_sigmas(sigmas, f"{at}.params.sigmas", "E_CODEC")
    if len(sigmas) > MAX_FRESH + 1:
        raise _codec_error(f"{at}.params.sigmas: there is noise for {MAX_FRESH} steps")
    for name, low, high in (("eta", 0.0, MAX_ETA), ("guidance", -1000.0, 1000.0)):
        value = params[name]
        if not is_real(value) or not low <= value <= high:
            raise _codec_error(f"{at}.params.{name}: {value!r:.80} is not a real, {low} to {high}")
    if type(params["prompts"]) is not bool:
        raise _codec_error(f"{at}.params.prompts: {params['prompts']!r:.80} is not true or false")
    if not params["prompts"] and params["guidance"] != 1.0:
        raise _codec_error(f"{at}.params.guidance: must be 1.0, without prompts it has no effect")


def _check_atoms(params: Mapping[str, Any], at: str, entries: int) -> None:
    atoms, most = params["atoms"], min(MAX_ATOMS, entries)
    if not isinstance(atoms, (list, tuple)) or len(atoms) != len(params["sigmas"]) - 1:
        raise _codec_error(f"{at}.params.atoms: must have a number for each step")
    if not all(type(count) is int and 0 <= count <= most for count in atoms) or not any(atoms):
        raise _codec_error(f"{at}.params.atoms: not integers from 0 to {most}, one above 0")
    if params["eta"] == 0.0 and any(atoms[1:]):
        raise _codec_error(f"{at}.params.atoms: with eta 0.0 only the first level takes noise")


def check_code_values(coded: Coded, classes: tuple[str, ...]) -> None:
    """Refuse ranks of no set, and bits without a meaning."""
    coding, count = coding_of(coded), coded.params["codes"]
    total, data = sum(coding.widths), coded.tensors["bits"]
    used = count * total % 8
    if used and (data[:, -1] >> used).any():
        raise InvalidPackError("bits after the last code of a class are not zero", code="E_CODES")
    starts = [0, *accumulate(coding.widths)]
    checked = [
        (starts[i] + m, starts[i + 1], math.comb(coding.entries, m))
        for i, (_, m, _) in enumerate(_levels(coding))
        if math.comb(coding.entries, m).bit_count() > 1  # otherwise every value is a rank
    ]
    for row in range(len(data) if checked else 0):
        stream = np.unpackbits(data[row], count=count * total, bitorder="little")
        bits = stream.reshape(count, total)
        for start, stop, sets in checked:
            if any(rank >= sets for rank in _from_bits(bits[:, start:stop])):
                raise InvalidPackError(
                    f"a code of class {row} ({classes[row]!r}) has atoms that do not exist",
                    code="E_CODES",
                )


def _codec_error(message: str) -> InvalidPackError:
    return InvalidPackError(message, code="E_CODEC")


def _levels(coding: Coding) -> list[tuple[int, int, int]]:
    """Return (place of the first atom, atoms, bits) of each level."""
    firsts = [0, *accumulate(coding.atoms)]
    return list(zip(firsts, coding.atoms, coding.widths, strict=False))


def _ranks(sets: Array) -> Array:
    """Return the rank of each ascending set: C(a1, 1) + C(a2, 2) + ..."""
    if sets.shape[1] == 1:
        return sets[:, 0].astype(object)
    ranks = [sum(map(math.comb, atoms, range(1, len(atoms) + 1))) for atoms in sets.tolist()]
    return np.array(ranks, object)


def _sets(ranks: Sequence[int], entries: int, count: int) -> Array:
    """Return the sets of these ranks, ascending: the reverse of `_ranks`."""
    if count == 1:
        return np.array(ranks, np.int64)[:, None]
    first = math.comb(entries, count)
    sets = [_set(rank, entries, count, first) for rank in ranks]
    return np.array(sets, np.int64).reshape(len(ranks), count)


def _set(rank: int, n: int, count: int, binomial: int) -> list[int]:
    """Return the set of a rank below `binomial`, which is C(n, count).

    The largest atom comes first. Atom k is the largest n with C(n, k) <= rank; it is estimated, as
    C(n, k) grows almost like (n - (k - 1) / 2) ** k, and corrected with exact integers.
    """
    atoms = list(range(count))
    for k in range(count, 0, -1):
        if not rank:
            break  # the others are the smallest
        middle = (k - 1) / 2
        ratio = 2 ** ((math.log2(rank) - math.log2(binomial)) / k)
        guess = max(k, min(n - 1, int(middle + (n - middle) * ratio)))
        binomial, n = _lower(binomial, n, k, guess), guess
        while binomial > rank:
            binomial, n = binomial * (n - k) // n, n - 1
        rank -= binomial
        binomial = binomial * k // (n - k + 1)  # C(n, k - 1) = C(n + 1, k) - C(n, k)
        while rank >= binomial:
            rank -= binomial
            n += 1
            binomial = binomial * n // (n - k + 1)
        atoms[k - 1] = n
    return atoms


def _lower(binomial: int, n: int, k: int, m: int) -> int:
    """Return C(m, k), of C(n, k) if that is near."""
    steps = n - m
    if steps >= k:
        return math.comb(m, k)
    return binomial * math.perm(n - k, steps) // math.perm(n, steps)


def _to_bits(values: Array, width: int) -> Array:
    """Return integers as rows of bits, least significant first."""
    size = -(-width // 8)
    data = b"".join(int(value).to_bytes(size, "little") for value in values)
    rows = np.frombuffer(data, np.uint8).reshape(len(values), size)
    return np.unpackbits(rows, axis=1, count=width, bitorder="little")


def _from_bits(bits: Array) -> list[int]:
    """Return the integers of rows of bits: the reverse of `_to_bits`."""
    rows = np.packbits(bits, axis=1, bitorder="little")
    return [int.from_bytes(row.tobytes(), "little") for row in rows]

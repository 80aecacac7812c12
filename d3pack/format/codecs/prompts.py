"""Prompt codecs: float32 (C classes, m modes, k vectors, D values) in fewer bytes.

Scales and codebooks are float16, so that scale times code is exact in float32 on every machine.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from d3pack.errors import InvalidPackError, UsageError
from d3pack.format.codecs import _checks
from d3pack.format.codecs._checks import Layout, SectionSpec, Tensor
from d3pack.format.codecs.table import PROMPT_CODECS, find_codec
from d3pack.format.coded import Array, Coded

MAX_MODES = 4096
MAX_VECTORS = 1024
MAX_WIDTH = 65536
GROUP = 32
CODEBOOK = 256

Shape = tuple[int, int, int, int]  # classes, modes, vectors, width
Tensors = dict[str, tuple[str, tuple[int, ...]]]  # dtype and shape by name


class PromptCodec(Protocol):
    """How one codec stores prompts."""

    params: frozenset[str]  # parameters besides `shape`
    shared: frozenset[str]  # tensors that all classes share

    def encode(self, values: Array, **options: Any) -> tuple[dict[str, Array], dict[str, Any]]:
        """Return the tensors and the parameters of float32 (C, m, k, D)."""
        ...

    def decode(self, coded: Coded) -> Array:
        """Return float32 (C, m, k, D)."""
        ...

    def layout(self, spec: SectionSpec, shape: Shape, at: str) -> Tensors:
        """Check the codec's own parameters; return dtype and shape of the tensors."""
        ...

    def valid_codes(self, coded: Coded) -> Array:
        """Return which items of the integer tensor `codes` have a meaning."""
        ...


def encode_prompts(values: Array, codec: str = "f16", **options: Any) -> Coded:
    """Store prompts; the relative error is measured: `figures["error"]` of the result.

    Args:
        values: (classes, modes, vectors, D).
        codec: one of `PROMPT_CODECS`.
        options: of the codec; `pq` takes dim, the number of values that share a code.

    Raises:
        UsageError: the values are not finite, too large, or of another shape.
        InvalidPackError: the codec is unknown (E_CODEC).
    """
    values = np.ascontiguousarray(values, dtype=np.float32)
    if values.ndim != 4 or 0 in values.shape:
        raise UsageError(f"prompts have shape {values.shape}, must be (classes, modes, vectors, D)")
    if not np.isfinite(values).all():
        raise UsageError("prompts hold NaN or infinity", hint="use a lower learning rate")
    method = _find(codec)
    tensors, extra = method.encode(values, **options)
    params = {"shape": list(values.shape[1:]), **extra}
    decoded = method.decode(Coded(codec, tensors, params, method.shared))
    return Coded(codec, tensors, params, method.shared, {"error": _error(decoded, values)})


def encode_unconditional(values: Array, codec: str = "i8") -> Coded:
    """Store the vectors of no class, (vectors, D), which all classes share."""
    coded = encode_prompts(np.asarray(values)[None, None], codec)
    return replace(coded, shared=frozenset(coded.tensors))


def decode_prompts(coded: Coded) -> Array:
    """Return the values, float32 (C, m, k, D): the same bits on every machine."""
    return _find(coded.codec).decode(coded)


def layout_prompts(spec: SectionSpec, classes: int, images: int, at: str = "prompts") -> Layout:
    """Return the tensors of prompts; codec and parameters are checked."""
    method = _find(spec.codec, at)
    _checks.check_keys(spec.params, at, {"shape"} | method.params)
    limits = (MAX_MODES, MAX_VECTORS, MAX_WIDTH)
    modes, vectors, width = _checks.check_shape(spec.params, at, limits)
    tensors = method.layout(spec, (classes, modes, vectors, width), at)
    return {name: Tensor(*form, name in method.shared) for name, form in tensors.items()}


def check_prompt_values(coded: Coded, classes: tuple[str, ...], at: str = "prompts") -> None:
    """Refuse NaN, infinity and codes without a meaning, naming the class."""
    for name, array in coded.tensors.items():
        if array.dtype.kind == "f":
            valid = _checks.finite_rows(array)
        else:
            codes = _find(coded.codec).valid_codes(coded).reshape(array.shape[0], -1)
            valid = np.asarray(codes.all(axis=1))
        if not valid.all():
            row = int(np.argmin(valid))
            if name in coded.shared:
                owner = "the codebook" if name == "codebook" else "no class"
            else:
                owner = f"class {row} ({classes[row]!r})"
            raise InvalidPackError(
                f"{at}.{name}: a value of {owner} is not a finite number", code="E_PROMPT"
            )


def _find(codec: str, at: str = "prompts") -> PromptCodec:
    method: PromptCodec = find_codec(PROMPT_CODECS, codec, at)
    return method


def _error(decoded: Array, values: Array) -> dict[str, float]:
    """Return the relative error of all values, and of the worst vector."""
    error = ((decoded.astype(np.float64) - values) ** 2).sum(axis=3)
    power = (values.astype(np.float64) ** 2).sum(axis=3)
    vectors = np.sqrt((error / np.maximum(power, 1e-300))[power > 0])
    return {
        "rms": _checks.figure(float(np.sqrt(error.sum() / max(float(power.sum()), 1e-300)))),
        "worst": _checks.figure(float(vectors.max(initial=0.0))),
    }


class Float16:
    """Two bytes a value."""

    params: frozenset[str] = frozenset()
    shared: frozenset[str] = frozenset()

    def encode(self, values: Array) -> tuple[dict[str, Array], dict[str, Any]]:
        return {"values": _half(values)}, {}

    def decode(self, coded: Coded) -> Array:
        return coded.tensors["values"].astype(np.float32)

    def layout(self, spec: SectionSpec, shape: Shape, at: str) -> Tensors:
        return {"values": ("F16", shape)}

    def valid_codes(self, coded: Coded) -> Array:
        return np.isfinite(coded.tensors["values"])


class Int8:
    """A byte a value and a scale for every vector."""

    params: frozenset[str] = frozenset()
    shared: frozenset[str] = frozenset()

    def encode(self, values: Array) -> tuple[dict[str, Array], dict[str, Any]]:
        scales = _half(np.abs(values).max(axis=3) / 127)
        codes = np.clip(np.rint(values / _divisors(scales)), -127, 127).astype(np.int8)
        return {"codes": codes, "scales": scales}, {}

    def decode(self, coded: Coded) -> Array:
        scales = coded.tensors["scales"].astype(np.float32)
        values: Array = coded.tensors["codes"].astype(np.float32) * scales[..., None]
        return values

    def layout(self, spec: SectionSpec, shape: Shape, at: str) -> Tensors:
        return {"codes": ("I8", shape), "scales": ("F16", shape[:3])}

    def valid_codes(self, coded: Coded) -> Array:
        return np.asarray(coded.tensors["codes"] != -128)  # two's complement has one value too many


class Int4:
    """Half a byte a value and a scale for every group of values."""

    params = frozenset({"group"})
    shared: frozenset[str] = frozenset()

    def encode(self, values: Array) -> tuple[dict[str, Array], dict[str, Any]]:
        *front, width = values.shape
        groups = -(-width // GROUP)
        padded = np.zeros((*front, groups * GROUP), dtype=np.float32)
        padded[..., :width] = values
        blocks = padded.reshape(*front, groups, GROUP)
        scales = _best_scales(blocks)
        codes = (np.clip(np.rint(blocks / _divisors(scales)), -8, 7) + 8).astype(np.uint8)
        codes = codes.reshape(*front, -1)[..., : width + width % 2]
        if width % 2:
            codes[..., -1] = 0
        packed = codes[..., 0::2] | codes[..., 1::2] << 4
        return {"codes": packed, "scales": scales}, {"group": GROUP}

    def decode(self, coded: Coded) -> Array:
        width, group = coded.params["shape"][2], coded.params["group"]
        packed = coded.tensors["codes"]
        codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
        scales = coded.tensors["scales"].astype(np.float32)
        scales = scales.repeat(min(group, width), axis=-1)[..., :width]  # a group may be wider
        values: Array = (codes[..., :width].astype(np.float32) - np.float32(8)) * scales
        return values

    def layout(self, spec: SectionSpec, shape: Shape, at: str) -> Tensors:
        *front, width = shape
        group = _checks.check_integer(spec.params, "group", at, 1, MAX_WIDTH)
        return {
            "codes": ("U8", (*front, -(-width // 2))),
            "scales": ("F16", (*front, -(-width // group))),
        }

    def valid_codes(self, coded: Coded) -> Array:
        codes = coded.tensors["codes"]
        valid = np.ones(codes.shape, dtype=bool)
        if coded.params["shape"][2] % 2:
            valid[..., -1] = codes[..., -1] >> 4 == 0
        return valid


def _best_scales(blocks: Array) -> Array:
    """Return the scale of each group (..., values) with the least squared error among a few.

    The end of the range with the larger magnitude gets the code -8. Shrinking the range a little
    clips one value and makes the steps finer for all others.
    """
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)[..., 0]
    least = np.full(largest.shape, np.inf, dtype=np.float32)
    scales = np.zeros(largest.shape, dtype=np.float16)
    for shrink in np.linspace(0.7, 1.05, 15, dtype=np.float32):
        for sign in (-1, 1):
            trial = _half(sign * largest / 8 * shrink)
            divisors = _divisors(trial)
            codes = np.clip(np.rint(blocks / divisors), -8, 7)
            error = ((codes * divisors - blocks) ** 2).sum(-1)
            better = error < least
            least = np.where(better, error, least)
            scales = np.where(better, trial, scales)
    return scales


class ProductQuantizer:
    """A byte for every `dim` values, an entry of a codebook that all classes share."""

    params = frozenset({"dim", "entries"})
    shared = frozenset({"codebook"})

    def encode(self, values: Array, dim: int = 4) -> tuple[dict[str, Array], dict[str, Any]]:
        if not 1 <= dim <= MAX_WIDTH:
            raise UsageError(f"invalid dim {dim}: expected 1 to {MAX_WIDTH}")
        *front, width = values.shape
        scales = _half(np.sqrt((values.astype(np.float64) ** 2).mean(axis=3)).astype(np.float32))
        parts = -(-width // dim)
        padded = np.zeros((*front, parts * dim), dtype=np.float32)
        padded[..., :width] = values / _divisors(scales)
        points = padded.reshape(-1, dim)
        codebook = _half(_kmeans(points, CODEBOOK))
        codes = _nearest(points, codebook.astype(np.float32)).reshape(*front, parts)
        tensors = {"codebook": codebook, "codes": codes.astype(np.uint8), "scales": scales}
        return tensors, {"dim": dim, "entries": len(codebook)}

    def decode(self, coded: Coded) -> Array:
        width, codes = coded.params["shape"][2], coded.tensors["codes"]
        codebook = coded.tensors["codebook"][:, :width].astype(np.float32)  # it may be wider
        rows = codebook[codes].reshape(*codes.shape[:-1], -1)[..., :width]
        values: Array = rows * coded.tensors["scales"].astype(np.float32)[..., None]
        return values

    def layout(self, spec: SectionSpec, shape: Shape, at: str) -> Tensors:
        *front, width = shape
        dim = _checks.check_integer(spec.params, "dim", at, 1, MAX_WIDTH)
        entries = _checks.check_integer(spec.params, "entries", at, 1, CODEBOOK)
        return {
            "codebook": ("F16", (entries, dim)),
            "codes": ("U8", (*front, -(-width // dim))),
            "scales": ("F16", tuple(front)),
        }

    def valid_codes(self, coded: Coded) -> Array:
        return np.asarray(coded.tensors["codes"] < coded.tensors["codebook"].shape[0])


def _kmeans(points: Array, entries: int, rounds: int = 25, sample: int = 32768) -> Array:
    rng = np.random.default_rng(0)
    if len(points) > sample:
        points = points[rng.choice(len(points), sample, replace=False)]
    unique = np.unique(points, axis=0)
    centres = unique[rng.permutation(len(unique))[:entries]].astype(np.float32)
    for _ in range(rounds):
        nearest = _nearest(points, centres)
        count = np.bincount(nearest, minlength=len(centres))
        for axis in range(points.shape[1]):
            total = np.bincount(nearest, weights=points[:, axis], minlength=len(centres))
            centres[:, axis] = np.where(count > 0, total / np.maximum(count, 1), centres[:, axis])
    return centres


def _nearest(points: Array, centres: Array, chunk: int = 16384) -> Array:
    bias = (centres**2).sum(axis=1) / 2
    return np.concatenate([
        (points[i : i + chunk] @ centres.T - bias).argmax(axis=1)
        for i in range(0, len(points), chunk)
    ])  # fmt: skip


def _half(values: Array) -> Array:
    if np.abs(values).max(initial=0.0) > 65504:
        raise UsageError("a value is beyond float16 (65504)", hint="the prompts have diverged")
    return values.astype(np.float16)


def _divisors(scales: Array) -> Array:
    """Return float32 (..., 1) to divide by: the scales, and 1 where a scale is zero."""
    return np.where(scales == 0, np.float16(1), scales).astype(np.float32)[..., None]

"""Prompt codecs: float32 (C classes, m modes, k vectors, D values) in fewer bytes.

`f16` two bytes a value; `i8` one byte and a scale for every vector; `i4` half a byte and a scale
for every group of 32 values; `pq` a byte for every `dim` values, out of a codebook that all classes
share. Scales and codebooks are float16, so that scale times code is exact in float32 everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from d3pack.errors import InvalidPackError, UsageError
from d3pack.format.codecs import params as p
from d3pack.format.coded import Array, Coded

MAX_MODES = 4096
MAX_VECTORS = 1024
MAX_WIDTH = 65536
GROUP = 32
CODEBOOK = 256


class PromptCodec(NamedTuple):
    """How one codec writes, reads and checks."""

    encode: Callable[..., tuple[dict[str, Array], dict[str, Any]]]
    decode: Callable[[Coded], Array]
    layout: Callable[[p.Form, tuple[int, int, int, int], str], p.Layout]
    extra: set[str]
    shared: frozenset[str] = frozenset()


def encode_prompts(values: Array, codec: str = "f16", **options: Any) -> Coded:
    """Store prompts; the relative error is measured and goes into the manifest."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    if values.ndim != 4 or 0 in values.shape:
        raise UsageError(f"prompts have shape {values.shape}, must be (classes, modes, vectors, D)")
    if not np.isfinite(values).all():
        raise UsageError(
            "prompts hold NaN or infinity", hint="the inversion diverged: lower its rate"
        )
    entry = _entry(codec, "prompts")
    tensors, extra = entry.encode(values, **options)
    params = {"shape": list(values.shape[1:]), **extra}
    return Coded(
        codec,
        tensors,
        {**params, "error": _error(entry, codec, tensors, params, values)},
        entry.shared,
    )


def decode_prompts(coded: Coded) -> Array:
    """The values as every reader sees them: float32 (C, m, k, D), equal bits everywhere."""
    return _entry(coded.codec, "prompts").decode(coded)


def check_prompts(form: p.Form, classes: int, at: str = "prompts") -> None:
    """Refuse another layout than the codec's."""
    entry = _entry(form.codec, at)
    p.keys(form.params, at, {"shape", "error"} | entry.extra)
    shape = form.params["shape"]
    limits = (MAX_MODES, MAX_VECTORS, MAX_WIDTH)
    if not (isinstance(shape, (list, tuple)) and len(shape) == 3) or not all(
        type(side) is int and 1 <= side <= limit for side, limit in zip(shape, limits, strict=True)
    ):
        raise InvalidPackError(
            f"{at}.params.shape: must be [modes, vectors, D], at most {list(limits)}",
            code="E_CODEC",
        )
    p.figures(form.params, "error", at, {"rms", "worst"})
    m, k, width = shape
    p.tensors(form, at, entry.layout(form, (classes, m, k, width), at), entry.shared)


def check_prompt_values(coded: Coded, classes: tuple[str, ...]) -> None:
    """Refuse NaN, infinity and codes without a meaning, naming the class."""
    for name, array in coded.tensors.items():
        good = p.finite_rows(array) if array.dtype.kind == "f" else _codes_ok(coded, name, array)
        if not good.all():
            row = int(np.argmin(good))
            who = "the codebook" if name in coded.shared else f"class {row} ({classes[row]!r})"
            raise InvalidPackError(
                f"prompts.{name}: a value of {who} is not a finite number", code="E_PROMPT"
            )


def _codes_ok(coded: Coded, name: str, array: Array) -> Array:
    fine: Any = np.ones(array.shape, dtype=bool)
    if coded.codec == "i8":
        fine = array != -128  # two's complement has one value too many
    elif coded.codec == "pq":
        fine = array < coded.tensors["codebook"].shape[0]
    elif coded.codec == "i4" and coded.params["shape"][2] % 2:
        fine = array[..., -1] >> 4 == 0
    rows: Array = fine.reshape(array.shape[0], -1).all(axis=1)
    return rows


def _entry(codec: str, at: str) -> PromptCodec:
    entry = CODECS.get(codec)
    if entry is None:
        raise InvalidPackError(
            f"{at}: unknown codec {codec!r:.80}", code="E_CODEC", hint=f"known: {', '.join(CODECS)}"
        )
    return entry


def _error(
    entry: PromptCodec, codec: str, tensors: dict[str, Array], params: dict[str, Any], values: Array
) -> dict[str, float]:
    got = entry.decode(Coded(codec, tensors, params, entry.shared)).astype(np.float64)
    off = ((got - values) ** 2).sum(axis=3)
    power = (values.astype(np.float64) ** 2).sum(axis=3)
    worst = np.sqrt((off / np.maximum(power, 1e-300))[power > 0])
    return {
        "rms": p.figure(float(np.sqrt(off.sum() / max(float(power.sum()), 1e-300)))),
        "worst": p.figure(float(worst.max(initial=0.0))),
    }


def _half(values: Array) -> Array:
    if np.abs(values).max(initial=0.0) > 65504:
        raise UsageError("a value is beyond float16 (65504)", hint="the prompts have diverged")
    return values.astype(np.float16)


def _safe(scales: Array) -> Array:
    """Scales to divide by: where all values are zero, any will do."""
    wide = scales.astype(np.float32)
    return np.where(wide > 0, wide, np.float32(1))


def _f16_encode(values: Array) -> tuple[dict[str, Array], dict[str, Any]]:
    return {"values": _half(values)}, {}


def _i8_encode(values: Array) -> tuple[dict[str, Array], dict[str, Any]]:
    scales = _half(np.abs(values).max(axis=3) / 127)
    codes = np.clip(np.rint(values / _safe(scales)[..., None]), -127, 127).astype(np.int8)
    return {"codes": codes, "scales": scales}, {}


def _i8_decode(coded: Coded) -> Array:
    scales = coded.tensors["scales"].astype(np.float32)
    out: Array = coded.tensors["codes"].astype(np.float32) * scales[..., None]
    return out


def _i4_encode(values: Array) -> tuple[dict[str, Array], dict[str, Any]]:
    *front, width = values.shape
    groups = -(-width // GROUP)
    padded = np.zeros((*front, groups * GROUP), dtype=np.float32)
    padded[..., :width] = values
    blocks = padded.reshape(*front, groups, GROUP)
    # The end of the range with the larger magnitude gets the code -8; then shrinking the range a
    # little trades clipping of one value against finer steps for all: keep the best of a few.
    peak = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)[..., 0]
    best = np.full(peak.shape, np.inf, dtype=np.float32)
    scales = np.zeros(peak.shape, dtype=np.float16)
    for shrink in np.linspace(0.7, 1.05, 15, dtype=np.float32):
        for sign in (-1, 1):
            trial = _half(sign * peak / 8 * shrink)
            wide = np.where(trial == 0, np.float16(1), trial).astype(np.float32)[..., None]
            codes = np.clip(np.rint(blocks / wide), -8, 7)
            off = ((codes * wide - blocks) ** 2).sum(-1)
            better = off < best
            best = np.where(better, off, best)
            scales = np.where(better, trial, scales)
    wide = np.where(scales == 0, np.float16(1), scales).astype(np.float32)[..., None]
    codes = (np.clip(np.rint(blocks / wide), -8, 7) + 8).astype(np.uint8)
    codes = codes.reshape(*front, -1)[..., : width + width % 2]
    if width % 2:
        codes[..., -1] = 0
    return {"codes": codes[..., 0::2] | codes[..., 1::2] << 4, "scales": scales}, {"group": GROUP}


def _i4_decode(coded: Coded) -> Array:
    width, group = coded.params["shape"][2], coded.params["group"]
    packed = coded.tensors["codes"]
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
    scales = coded.tensors["scales"].astype(np.float32).repeat(group, axis=-1)[..., :width]
    out: Array = (codes[..., :width].astype(np.float32) - np.float32(8)) * scales
    return out


def _i4_layout(form: p.Form, dims: tuple[int, int, int, int], at: str) -> p.Layout:
    c, m, k, width = dims
    group = p.integer(form.params, "group", at, 1, MAX_WIDTH)
    return {
        "codes": ("U8", (c, m, k, -(-width // 2))),
        "scales": ("F16", (c, m, k, -(-width // group))),
    }


def _pq_encode(values: Array, dim: int = 4) -> tuple[dict[str, Array], dict[str, Any]]:
    if not 1 <= dim <= MAX_WIDTH:
        raise UsageError(f"parts of {dim} values", hint=f"dim is 1 to {MAX_WIDTH}")
    *front, width = values.shape
    scales = _half(np.sqrt((values.astype(np.float64) ** 2).mean(axis=3)).astype(np.float32))
    parts = -(-width // dim)
    padded = np.zeros((*front, parts * dim), dtype=np.float32)
    padded[..., :width] = values / _safe(scales)[..., None]
    points = padded.reshape(-1, dim)
    codebook = _half(_kmeans(points, CODEBOOK))
    codes = _nearest(points, codebook.astype(np.float32)).reshape(*front, parts)
    return {"codebook": codebook, "codes": codes.astype(np.uint8), "scales": scales}, {"dim": dim}


def _pq_decode(coded: Coded) -> Array:
    codebook = coded.tensors["codebook"].astype(np.float32)
    codes = coded.tensors["codes"]
    values = codebook[codes].reshape(*codes.shape[:-1], -1)[..., : coded.params["shape"][2]]
    out: Array = values * coded.tensors["scales"].astype(np.float32)[..., None]
    return out


def _pq_layout(form: p.Form, dims: tuple[int, int, int, int], at: str) -> p.Layout:
    c, m, k, width = dims
    dim = p.integer(form.params, "dim", at, 1, MAX_WIDTH)
    _, book = form.tensors.get("codebook", ("", (1,)))
    entries = book[0]
    if not 1 <= entries <= CODEBOOK:
        raise InvalidPackError(
            f"{at}.codebook: {entries} entries, must be 1 to {CODEBOOK}", code="E_CODEC"
        )
    return {
        "codebook": ("F16", (entries, dim)),
        "codes": ("U8", (c, m, k, -(-width // dim))),
        "scales": ("F16", (c, m, k)),
    }


def _kmeans(points: Array, entries: int, rounds: int = 25, sample: int = 32768) -> Array:
    rng = np.random.default_rng(0)
    if len(points) > sample:
        points = points[rng.choice(len(points), sample, replace=False)]
    unique = np.unique(points, axis=0)
    centres = unique[rng.permutation(len(unique))[:entries]].astype(np.float32)
    for _ in range(rounds):
        near = _nearest(points, centres)
        count = np.bincount(near, minlength=len(centres))
        for axis in range(points.shape[1]):
            total = np.bincount(near, weights=points[:, axis], minlength=len(centres))
            centres[:, axis] = np.where(count > 0, total / np.maximum(count, 1), centres[:, axis])
    return centres


def _nearest(points: Array, centres: Array, chunk: int = 16384) -> Array:
    bias = (centres**2).sum(axis=1) / 2
    near = [
        (points[i : i + chunk] @ centres.T - bias).argmax(axis=1)
        for i in range(0, len(points), chunk)
    ]
    return np.concatenate(near)


CODECS: dict[str, PromptCodec] = {
    "f16": PromptCodec(
        _f16_encode,
        lambda coded: coded.tensors["values"].astype(np.float32),
        lambda form, dims, at: {"values": ("F16", dims)},
        set(),
    ),
    "i8": PromptCodec(
        _i8_encode,
        _i8_decode,
        lambda form, dims, at: {"codes": ("I8", dims), "scales": ("F16", dims[:3])},
        set(),
    ),
    "i4": PromptCodec(_i4_encode, _i4_decode, _i4_layout, {"group"}),
    "pq": PromptCodec(_pq_encode, _pq_decode, _pq_layout, {"dim"}, frozenset({"codebook"})),
}

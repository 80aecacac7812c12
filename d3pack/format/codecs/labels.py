"""Soft-label codecs: a distribution over the classes for every image.

Decoded labels are float32 and sum to one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from d3pack.errors import InvalidPackError, UsageError
from d3pack.format.codecs import _bits, _checks
from d3pack.format.codecs._checks import Layout, SectionSpec, Tensor
from d3pack.format.codecs.table import LABEL_CODECS, find_codec
from d3pack.format.coded import Array, Coded

MASS_TOLERANCE = 2.0**-8  # more than rounding to float16 can add to a sum
MAX_BITS, MAX_OCTAVES = 12, 64
OCTAVES = 16  # the smallest ratio kept is 2**-16
CHUNK = 2**20  # bytes of labels to decode at a time


class LabelCodec(Protocol):
    """How one codec stores labels."""

    params: frozenset[str]  # parameters
    tensor: str  # the name of its only tensor

    def encode(self, labels: Array, params: Mapping[str, Any]) -> tuple[Array, Array | None]:
        """Return the row of a class from float64 (images, classes), and the mass it keeps."""
        ...

    def decode(self, coded: Coded) -> Array:
        """Return float32 (rows, images, classes)."""
        ...

    def layout(self, spec: SectionSpec, classes: int, images: int, at: str) -> Layout:
        """Check the codec's own parameters; return the tensor that they ask for."""
        ...

    def cut(self, data: Array, params: Mapping[str, Any], start: int, stop: int) -> Array:
        """Return the rows of images `start` to `stop`; `start` is a multiple of 8."""
        ...

    def find_invalid(self, coded: Coded) -> tuple[Array, str]:
        """Return which rows break a rule, and the rule."""
        ...


def encode_labels(probs: Array, codec: str = "topk", k: int = 10, bits: int = 8) -> Coded:
    """Store probabilities; the mass kept and the error are measured: `figures` of the result.

    Args:
        probs: (rows, images, classes); each distribution sums to one within 0.01.
        codec: one of `LABEL_CODECS`.
        k: classes of an image whose probabilities `topk` keeps.
        bits: of a probability in `topk`.

    Raises:
        UsageError: `probs` are not distributions, or an argument is out of bounds.
    """
    probs = np.asarray(probs)
    if probs.ndim != 3 or 0 in probs.shape:
        raise UsageError(f"labels have shape {probs.shape}, must be (classes, images, classes)")
    if codec not in LABEL_CODECS:
        raise UsageError(f"unknown label codec {codec!r}", hint=f"known: {', '.join(LABEL_CODECS)}")
    if not (2 <= bits <= MAX_BITS and k >= 1):
        raise UsageError(
            f"top-k labels with k={k}, bits={bits}", hint=f"k >= 1, bits 2 to {MAX_BITS}"
        )
    _, images, classes = probs.shape
    params: dict[str, Any] = {"classes": classes, "images": images}
    if codec == "topk":
        params |= {"k": min(k, classes), "bits": bits, "octaves": OCTAVES}
    return _encode(map(_distributions, probs), codec, params)


def _encode(rows: Iterable[Array], codec: str, params: dict[str, Any]) -> Coded:
    """Store distributions (images, classes), one class at a time to bound the memory."""
    method = _find(codec)
    masses: list[Array] = []
    parts: list[Array] = []
    errors: list[tuple[float, float]] = []
    for labels in rows:
        data, mass = method.encode(labels, params)
        parts.append(data)
        if mass is not None:
            masses.append(mass)
        error = np.abs(decode_labels(Coded(codec, {method.tensor: data}, params), 0) - labels)
        errors.append((float(error.mean()), float(error.max())))
    means, maxima = np.array(errors).T
    figures = {"error": _figures(mean=means.mean(), max=maxima.max())}
    if masses:
        mass = np.concatenate(masses)
        figures |= {"kept": _figures(mean=mass.mean(), min=mass.min())}
    return Coded(codec, {method.tensor: np.concatenate(parts)}, params, figures=figures)


def decode_labels(coded: Coded, class_index: int | None = None) -> Array:
    """Return labels as float32: of one class (images, classes), or (rows, images, classes)."""
    if class_index is not None:
        row: Array = decode_labels(coded.take(np.array([class_index])))[0]
        return row
    return _find(coded.codec).decode(coded)


def layout_labels(spec: SectionSpec, classes: int, images: int, at: str = "labels") -> Layout:
    """Return the tensor of labels; codec and parameters are checked."""
    method = _find(spec.codec, at)
    _checks.check_keys(spec.params, at, method.params)
    return method.layout(spec, classes, images, at)


def check_label_values(coded: Coded, classes: tuple[str, ...]) -> None:
    """Refuse labels that are not distributions, naming the class."""
    method = _find(coded.codec)
    for start, part in _pieces(coded, len(classes)):
        invalid, rule = method.find_invalid(part)
        if invalid.any():
            row = start + int(np.argmax(invalid))
            raise InvalidPackError(
                f"labels of class {row} ({classes[row]!r}): {rule}", code="E_LABEL"
            )


def restrict_labels(coded: Coded, rows: Array, keep: Array) -> Coded:
    """Return the labels in the given rows, over the label classes `keep` alone.

    Probabilities of other classes are dropped and the rest is scaled to one: what the teacher
    believes given that the image shows one of these classes. An image with nothing left gets its
    own class, `keep[i]` for `rows[i]`. The mass that stayed is recorded.
    """
    masses: list[Array] = []

    def restricted(row: int, own_class: int) -> Array:
        part: Array = decode_labels(coded, row).astype(np.float64)[:, keep]
        masses.append(part.sum(axis=1))
        part[masses[-1] <= 0] = keep == own_class
        part /= part.sum(axis=1, keepdims=True)
        return part

    names = ("images", "k", "bits", "octaves")
    params = {name: coded.params[name] for name in names if name in coded.params}
    params["classes"] = len(keep)
    if "k" in params:
        params["k"] = min(params["k"], len(keep))
    cut = _encode(map(restricted, rows.tolist(), keep.tolist()), coded.codec, params)
    mass = np.concatenate(masses)
    before = coded.figures.get("error", {})  # not known of a pack that was read
    error = cut.figures["error"].items()
    figures = {
        **cut.figures,
        "error": {name: max(value, before.get(name, 0.0)) for name, value in error},
        "restricted": _figures(mean=mass.mean(), min=mass.min(), empty=(mass <= 0).mean()),
    }
    return Coded(cut.codec, cut.tensors, cut.params, figures=figures)


def first_labels(coded: Coded, images: int) -> Coded:
    """Return the labels of the first images of every class; the figures stay those of all."""
    method = _find(coded.codec)
    data = method.cut(coded.tensors[method.tensor], coded.params, 0, images)
    params = {**coded.params, "images": images}
    return Coded(coded.codec, {method.tensor: data}, params, figures=coded.figures)


def _find(codec: str, at: str = "labels") -> LabelCodec:
    method: LabelCodec = find_codec(LABEL_CODECS, codec, at)
    return method


def _figures(**values: Any) -> dict[str, float]:
    return {name: _checks.figure(float(value)) for name, value in values.items()}


def _distributions(probs: Array) -> Array:
    """Return the labels of a class as float64 that sum to one."""
    wide = probs.astype(np.float64)
    mass = wide.sum(axis=1, keepdims=True)
    if not (np.isfinite(mass).all() and (wide >= 0).all() and (abs(mass - 1) < 0.01).all()):
        raise UsageError("labels of a class are not distributions", hint="give probabilities")
    labels: Array = wide / mass + 0.0  # + 0.0 turns -0.0 into 0.0
    return labels


def _pieces(coded: Coded, rows: int) -> Iterator[tuple[int, Coded]]:
    """Yield the labels in parts that are small when decoded, with the first class of each."""
    method = _find(coded.codec)
    images, row_bytes = coded.params["images"], coded.nbytes // rows
    row_step = max(1, CHUNK // row_bytes)
    image_step = max(8, images * CHUNK // row_bytes // 8 * 8)
    for row in range(0, rows, row_step):
        data = coded.tensors[method.tensor][row : row + row_step]
        for image in range(0, images, image_step):
            count = min(image_step, images - image)
            part = method.cut(data, coded.params, image, image + count)
            yield row, Coded(coded.codec, {method.tensor: part}, {**coded.params, "images": count})


class Dense:
    """All probabilities as float16."""

    params: frozenset[str] = frozenset()
    tensor = "probs"

    def encode(self, labels: Array, params: Mapping[str, Any]) -> tuple[Array, Array | None]:
        return labels.astype(np.float16)[None], None

    def decode(self, coded: Coded) -> Array:
        wide = coded.tensors["probs"].astype(np.float64)
        labels: Array = (wide / wide.sum(axis=2, keepdims=True)).astype(np.float32)
        return labels

    def layout(self, spec: SectionSpec, classes: int, images: int, at: str) -> Layout:
        return {"probs": Tensor("F16", (classes, images, classes))}

    def cut(self, data: Array, params: Mapping[str, Any], start: int, stop: int) -> Array:
        return data[:, start:stop]

    def find_invalid(self, coded: Coded) -> tuple[Array, str]:
        probs = coded.tensors["probs"]
        invalid = ~_checks.finite_rows(probs) | np.signbit(probs).any(axis=(1, 2))
        if invalid.any():
            return invalid, "a probability is negative or not a number"
        off = np.abs(probs.sum(axis=2, dtype=np.float64) - 1.0) > MASS_TOLERANCE
        return off.any(axis=1), f"the sum is not 1 within {MASS_TOLERANCE}"


class TopK:
    """The k largest probabilities of an image, as ratios to the largest in logarithmic steps.

    The mass of all other classes is one more code, and is spread over them evenly.
    """

    params = frozenset({"k", "bits", "octaves"})
    tensor = "bits"

    def encode(self, labels: Array, params: Mapping[str, Any]) -> tuple[Array, Array | None]:
        k, classes = params["k"], params["classes"]
        order = np.argsort(-labels, axis=1, kind="stable")[:, :k]
        top = np.take_along_axis(labels, order, axis=1)
        kept = top.sum(axis=1)
        tail = np.maximum(0.0, 1.0 - kept) if k < classes else np.zeros_like(kept)
        ratios = np.column_stack([top[:, 1:] / top[:, :1], tail])
        codes = _ratio_codes(ratios, params["bits"], params["octaves"])
        codes[:, -1] = np.maximum(codes[:, -1], 1)  # code 0 would leave no mass for the top
        # classes of equal code stand in their own order, so that a label has one spelling
        ranks = np.column_stack([np.zeros(len(codes), dtype=np.uint32), codes[:, :-1]])
        by = np.lexsort((order, ranks), axis=1)
        order = np.take_along_axis(order, by, axis=1)
        codes[:, :-1] = np.take_along_axis(ranks, by, axis=1)[:, 1:]
        records = np.concatenate([order.astype(np.uint32), codes], axis=1)[None]
        return _bits.pack(records, _widths(params, classes)), kept

    def decode(self, coded: Coded) -> Array:
        index, codes = _fields(coded)
        classes, k = coded.params["classes"], coded.params["k"]
        ratios = _ratio_table(coded.params["bits"], coded.params["octaves"])
        first = np.ones_like(index[..., :1], dtype=np.float64)
        top = np.concatenate([first, ratios[codes[..., :-1]]], 2)
        tail = ratios[codes[..., -1:]]
        total = np.zeros_like(tail)
        for rank in range(k):  # in this order: a sum of reals depends on it
            total += top[..., rank : rank + 1]
        labels = np.zeros((*index.shape[:2], classes), dtype=np.float64)
        if classes > k:
            labels += tail / (classes - k)
        np.put_along_axis(labels, index.astype(np.int64), (1.0 - tail) * top / total, axis=2)
        return labels.astype(np.float32)

    def layout(self, spec: SectionSpec, classes: int, images: int, at: str) -> Layout:
        _checks.check_integer(spec.params, "k", at, 1, classes)
        _checks.check_integer(spec.params, "bits", at, 2, MAX_BITS)
        _checks.check_integer(spec.params, "octaves", at, 1, MAX_OCTAVES)
        row = _bits.row_bytes(_widths(spec.params, classes), images)
        return {"bits": Tensor("U8", (classes, row))}

    def cut(self, data: Array, params: Mapping[str, Any], start: int, stop: int) -> Array:
        width = sum(_widths(params, params["classes"]))
        first, last = start * width // 8, -(-stop * width // 8)  # eight records fill whole bytes
        part = data[:, first:last]
        if stop < params["images"] and stop * width % 8:  # bits of the next record
            part = part.copy()
            part[:, -1] &= (1 << stop * width % 8) - 1
        return part

    def find_invalid(self, coded: Coded) -> tuple[Array, str]:
        params = coded.params
        index, codes = _fields(coded)
        last = 2 ** params["bits"] - 1
        ranks = np.concatenate([np.zeros_like(codes[..., :1]), codes[..., :-1]], axis=2)
        key = ranks.astype(np.int64) * 2**32 + index  # ascending: sorted by code, then by class
        tail = codes[..., -1]
        wrong_tail = tail != last if params["k"] == params["classes"] else tail == 0
        ordered = np.sort(index, axis=2)
        checks: tuple[tuple[Any, str], ...] = (
            ((index >= params["classes"]).any(axis=(1, 2)), "a class index beyond the classes"),
            ((ordered[..., 1:] == ordered[..., :-1]).any(axis=(1, 2)), "a class twice"),
            ((key[..., 1:] <= key[..., :-1]).any(axis=(1, 2)), "not sorted by probability"),
            (wrong_tail.any(axis=1), "the mass of the other classes is wrong"),
        )
        for invalid, rule in checks:
            if invalid.any():
                return invalid, rule
        widths = _widths(params, params["classes"])
        spare = _bits.spare_is_zero(coded.tensors["bits"], widths, params["images"])
        return np.full(len(index), not spare), "spare bits are not zero"


def _widths(params: Mapping[str, Any], classes: int) -> tuple[int, ...]:
    """Return the bits of each field of a record: k class indices, then k codes."""
    index, k = max(1, (classes - 1).bit_length()), int(params["k"])
    return (index,) * k + (int(params["bits"]),) * k


def _fields(coded: Coded) -> tuple[Array, Array]:
    """Return the class indices and the codes, each (rows, images, k)."""
    params = coded.params
    widths = _widths(params, params["classes"])
    fields = _bits.unpack(coded.tensors["bits"], widths, params["images"])
    return fields[..., : params["k"]], fields[..., params["k"] :]


def _ratio_table(bits: int, octaves: int) -> Array:
    """Return the ratio of each code: powers of two in even steps, and zero for the last code."""
    last = 2**bits - 1
    return np.array([2.0 ** (-(code * octaves) / (last - 1)) for code in range(last)] + [0.0])


def _ratio_codes(ratios: Array, bits: int, octaves: int) -> Array:
    """Return the nearest code of each ratio."""
    last = 2**bits - 1
    steps = -np.log2(np.maximum(ratios, 1e-300)) * ((last - 1) / octaves)
    codes = np.clip(np.rint(steps), 0, last - 1)
    nearest: Array = np.where(ratios < 2.0 ** (-octaves - 1), last, codes).astype(np.uint32)
    return nearest

"""Soft-label codecs: a distribution over the classes for every image.

`topk` keeps the k largest probabilities of an image: their classes, their ratio to the largest one
in logarithmic steps, and the mass of all others, which is spread over them evenly. `dense` keeps
all, as float16. Decoded labels are float32 and sum to one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from d3pack.errors import InvalidPackError, UsageError
from d3pack.format.codecs import _bits
from d3pack.format.codecs import params as p
from d3pack.format.coded import Array, Coded

MASS_TOLERANCE = 2.0**-8  # what rounding to float16 can do to a sum, and then some
MAX_BITS, MAX_OCTAVES = 12, 64
OCTAVES = 16  # the smallest ratio kept is 2**-16
CODECS = ("topk", "dense")
CHUNK = 2**20  # bytes of labels to take apart at a time


def encode_labels(probs: Array, codec: str = "topk", k: int = 10, bits: int = 8) -> Coded:
    """Store probabilities (rows, images, classes); kept mass and error go into the manifest."""
    probs = np.asarray(probs)
    if probs.ndim != 3 or 0 in probs.shape:
        raise UsageError(f"labels have shape {probs.shape}, must be (classes, images, classes)")
    if codec not in CODECS:
        raise UsageError(f"unknown label codec {codec!r}", hint=f"known: {', '.join(CODECS)}")
    if not (2 <= bits <= MAX_BITS and k >= 1):
        raise UsageError(
            f"top-k labels with k={k}, bits={bits}", hint=f"k >= 1, bits 2 to {MAX_BITS}"
        )
    _, images, classes = probs.shape
    params: dict[str, Any] = {"classes": classes, "images": images}
    if codec == "topk":
        params |= {"k": min(k, classes), "bits": bits, "octaves": OCTAVES}
    return _encode(map(_distribution, probs), codec, params)


def _encode(rows: Iterable[Array], codec: str, params: dict[str, Any]) -> Coded:
    """Store distributions (images, classes), a class at a time: all of them may not fit."""
    kept: list[Array] = []
    parts: list[Array] = []
    errors: list[tuple[float, float]] = []
    name = "bits" if codec == "topk" else "probs"
    for exact in rows:
        if codec == "topk":
            data, mass = _topk_row(exact, params)
            kept.append(mass)
        else:
            data = exact.astype(np.float16)[None]
        parts.append(data)
        off = np.abs(decode_labels(Coded(codec, {name: data}, params), 0) - exact)
        errors.append((float(off.mean()), float(off.max())))
    mean, most = np.array(errors).T
    figures = {"error": {"mean": p.figure(float(mean.mean())), "max": p.figure(float(most.max()))}}
    if kept:
        whole = np.concatenate(kept)
        figures["kept"] = {
            "mean": p.figure(float(whole.mean())),
            "min": p.figure(float(whole.min())),
        }
    return Coded(codec, {name: np.concatenate(parts)}, {**params, **figures})


def decode_labels(coded: Coded, class_index: int | None = None) -> Array:
    """Labels of one class (images, classes), or of all (rows, images, classes), as float32."""
    if class_index is not None:
        row: Array = decode_labels(coded.take(np.array([class_index])))[0]
        return row
    if coded.codec == "dense":
        wide = coded.tensors["probs"].astype(np.float64)
        dense: Array = (wide / wide.sum(axis=2, keepdims=True)).astype(np.float32)
        return dense
    index, codes = _topk_fields(coded)
    classes, k = coded.params["classes"], coded.params["k"]
    ratio = ratios(coded.params["bits"], coded.params["octaves"])
    top = np.concatenate(
        [np.ones_like(index[..., :1], dtype=np.float64), ratio[codes[..., :-1]]], 2
    )
    tail = ratio[codes[..., -1:]]
    total = np.zeros_like(tail)
    for rank in range(k):  # in this order: a sum of reals depends on it
        total += top[..., rank : rank + 1]
    out = np.zeros((*index.shape[:2], classes), dtype=np.float64)
    if classes > k:
        out += tail / (classes - k)
    np.put_along_axis(out, index.astype(np.int64), (1.0 - tail) * top / total, axis=2)
    return out.astype(np.float32)


def ratios(bits: int, octaves: int) -> Array:
    """What a code means: powers of two in even steps, and zero for the last code."""
    last = 2**bits - 1
    return np.array([2.0 ** (-(code * octaves) / (last - 1)) for code in range(last)] + [0.0])


def check_labels(form: p.Form, classes: int, images: int, at: str = "labels") -> None:
    """Refuse another layout than the codec's."""
    need = {"classes", "images", "error"}
    layout: p.Layout
    if form.codec == "dense":
        p.keys(form.params, at, need, frozenset({"restricted"}))
        layout = {"probs": ("F16", (classes, images, classes))}
    elif form.codec == "topk":
        p.keys(form.params, at, need | {"k", "bits", "octaves", "kept"}, frozenset({"restricted"}))
        p.integer(form.params, "k", at, 1, classes)
        p.integer(form.params, "bits", at, 2, MAX_BITS)
        p.integer(form.params, "octaves", at, 1, MAX_OCTAVES)
        p.figures(form.params, "kept", at, {"mean", "min"})
        layout = {"bits": ("U8", (classes, _bits.row_bytes(_widths(form.params, classes), images)))}
    else:
        raise InvalidPackError(
            f"{at}: unknown codec {form.codec!r:.80}",
            code="E_CODEC",
            hint=f"known: {', '.join(CODECS)}",
        )
    for name, wanted in (("classes", classes), ("images", images)):
        p.integer(form.params, name, at, wanted, wanted)
    p.figures(form.params, "error", at, {"mean", "max"})
    if "restricted" in form.params:
        p.figures(form.params, "restricted", at, {"mean", "min", "empty"})
    p.tensors(form, at, layout)


def check_label_values(coded: Coded, classes: tuple[str, ...]) -> None:
    """Refuse labels that are no distribution, naming the class."""
    for start, part in _pieces(coded, len(classes)):
        bad, why = (_bad_dense if coded.codec == "dense" else _bad_topk)(part)
        if bad.any():
            row = start + int(np.argmax(bad))
            raise InvalidPackError(
                f"labels of class {row} ({classes[row]!r}): {why}", code="E_LABEL"
            )


def restrict_labels(coded: Coded, rows: Array, keep: Array) -> Coded:
    """Labels in the given rows, which are those of the label classes `keep`, over these alone.

    The rest is dropped and what stays scaled to one: the teacher's belief given that the image
    shows one of these classes. An image with nothing left gets its own class. How much mass stayed
    is recorded.
    """
    kept: list[Array] = []

    def belief(row: int, own: int) -> Array:
        part: Array = decode_labels(coded, row).astype(np.float64)[:, keep]
        kept.append(part.sum(axis=1))
        part[kept[-1] <= 0] = keep == own
        part /= part.sum(axis=1, keepdims=True)
        return part

    params = {
        name: coded.params[name] for name in ("images", "bits", "octaves") if name in coded.params
    }
    params["classes"] = len(keep)
    if coded.codec == "topk":
        params["k"] = min(coded.params["k"], len(keep))
    fresh = _encode(map(belief, rows.tolist(), keep.tolist()), coded.codec, params)
    mass = np.concatenate(kept)
    error = {
        name: max(figure, coded.params["error"][name])
        for name, figure in fresh.params["error"].items()
    }
    figures = {
        "mean": p.figure(float(mass.mean())),
        "min": p.figure(float(mass.min())),
        "empty": p.figure(float((mass <= 0).mean())),
    }
    params = {**fresh.params, "error": error, "restricted": figures}
    return Coded(fresh.codec, fresh.tensors, params)


def first_labels(coded: Coded, images: int) -> Coded:
    """Labels of the first images of every class; the recorded figures stay those of all images."""
    params = {**coded.params, "images": images}
    if coded.codec == "dense":
        return Coded("dense", {"probs": coded.tensors["probs"][:, :images]}, params)
    used = images * sum(_widths(params, params["classes"]))
    data = coded.tensors["bits"][:, : (used + 7) // 8].copy()
    if used % 8:
        data[:, -1] &= (1 << used % 8) - 1
    return Coded("topk", {"bits": data}, params)


def _distribution(probs: Array) -> Array:
    wide = probs.astype(np.float64)
    mass = wide.sum(axis=1, keepdims=True)
    if not (np.isfinite(mass).all() and (wide >= 0).all() and (abs(mass - 1) < 0.01).all()):
        raise UsageError("labels of a class are no distribution", hint="give probabilities")
    out: Array = wide / mass + 0.0  # no sign on a zero
    return out


def _widths(params: Any, classes: int) -> tuple[int, ...]:
    index, k = max(1, (classes - 1).bit_length()), int(params["k"])
    return (index,) * k + (int(params["bits"]),) * k


def _topk_row(exact: Array, params: dict[str, Any]) -> tuple[Array, Array]:
    k, bits, classes = params["k"], params["bits"], params["classes"]
    order = np.argsort(-exact, axis=1, kind="stable")[:, :k]
    top = np.take_along_axis(exact, order, axis=1)
    kept = top.sum(axis=1)
    tail = np.maximum(0.0, 1.0 - kept) if k < classes else np.zeros_like(kept)
    codes = _codes(np.column_stack([top[:, 1:] / top[:, :1], tail]), bits, params["octaves"])
    # All the mass in the tail would leave none for the top.
    codes[:, -1] = np.maximum(codes[:, -1], 1)
    # Equal codes must be in the order of their classes: one spelling for one label.
    ranks = np.column_stack([np.zeros(len(codes), dtype=np.uint32), codes[:, :-1]])
    by = np.lexsort((order, ranks), axis=1)
    order = np.take_along_axis(order, by, axis=1)
    codes[:, :-1] = np.take_along_axis(ranks, by, axis=1)[:, 1:]
    records = np.concatenate([order.astype(np.uint32), codes], axis=1)[None]
    return _bits.pack(records, _widths(params, classes)), kept


def _codes(ratio: Array, bits: int, octaves: int) -> Array:
    last = 2**bits - 1
    steps = -np.log2(np.maximum(ratio, 1e-300)) * ((last - 1) / octaves)
    codes = np.clip(np.rint(steps), 0, last - 1)
    out: Array = np.where(ratio < 2.0 ** (-octaves - 1), last, codes).astype(np.uint32)
    return out


def _topk_fields(coded: Coded) -> tuple[Array, Array]:
    params = coded.params
    widths = _widths(params, params["classes"])
    fields = _bits.unpack(coded.tensors["bits"], widths, params["images"])
    return fields[..., : params["k"]], fields[..., params["k"] :]


def _pieces(coded: Coded, rows: int) -> Iterator[tuple[int, Coded]]:
    """The labels in parts, with the first class of each: taken apart they are many times larger."""
    images, row_bytes = coded.params["images"], coded.nbytes // rows
    step = max(1, CHUNK // row_bytes)
    # Eight records end at a byte, whatever their width.
    wide = max(8, images * CHUNK // row_bytes // 8 * 8)
    for row in range(0, rows, step):
        part = coded.take(np.arange(row, min(row + step, rows)))
        for image in range(0, images, wide):
            count = min(wide, images - image)
            if coded.codec == "dense":
                tensors = {"probs": part.tensors["probs"][:, image : image + count]}
            else:
                width = sum(_widths(coded.params, coded.params["classes"]))
                start, stop = image * width // 8, -(-(image + count) * width // 8)
                tensors = {"bits": part.tensors["bits"][:, start:stop]}
            yield row, Coded(coded.codec, tensors, {**coded.params, "images": count})


def _bad_topk(coded: Coded) -> tuple[Array, str]:
    params = coded.params
    index, codes = _topk_fields(coded)
    last = 2 ** params["bits"] - 1
    ranks = np.concatenate([np.zeros_like(codes[..., :1]), codes[..., :-1]], axis=2).astype(
        np.int64
    )
    key = ranks * 2**32 + index  # ascending and unequal: sorted by rank, then by class
    tail = codes[..., -1]
    whole = params["k"] == params["classes"]
    ordered = np.sort(index, axis=2)
    checks: tuple[tuple[Any, str], ...] = (
        ((index >= params["classes"]).any(axis=(1, 2)), "a class index beyond the classes"),
        ((ordered[..., 1:] == ordered[..., :-1]).any(axis=(1, 2)), "a class twice"),
        ((key[..., 1:] <= key[..., :-1]).any(axis=(1, 2)), "not sorted by probability"),
        (
            ((tail != last) if whole else (tail == 0)).any(axis=1),
            "the mass of the other classes is off",
        ),
    )
    for bad, why in checks:
        if bad.any():
            return bad, why
    if not _bits.spare_is_zero(
        coded.tensors["bits"], _widths(params, params["classes"]), params["images"]
    ):
        return np.ones(len(index), dtype=bool), "spare bits are not zero"
    return np.zeros(len(index), dtype=bool), ""


def _bad_dense(coded: Coded) -> tuple[Array, str]:
    probs = coded.tensors["probs"]
    bad = ~p.finite_rows(probs) | np.signbit(probs).any(axis=(1, 2))
    if bad.any():
        return bad, "a probability is negative or not a number"
    off = np.abs(probs.sum(axis=2, dtype=np.float64) - 1.0) > MASS_TOLERANCE
    return off.any(axis=1), f"the mass is off by more than {MASS_TOLERANCE}"

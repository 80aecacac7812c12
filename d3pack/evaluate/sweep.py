"""Variants of a pack, and which of them no smaller one equals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from d3pack.decode import unpack_backbone
from d3pack.encode import d3m_settings, encode
from d3pack.errors import InvalidPackError, UsageError
from d3pack.evaluate.baselines import pack_entry
from d3pack.evaluate.bench import Bench
from d3pack.evaluate.entries import Entry
from d3pack.evaluate.settings import EvalSettings
from d3pack.format import Pack, to_plain
from d3pack.format.codecs import decode_labels, decode_prompts, encode_labels, encode_prompts
from d3pack.sources import Source

Encode = Callable[[int], Pack]  # vectors -> a pack, learned anew


@dataclass(frozen=True, slots=True)
class Variant:
    """A pack with one property changed; the first variant of a sweep is the pack itself."""

    axis: str
    value: str
    pack: Pack

    @property
    def title(self) -> str:
        """What readers see."""
        return f"{self.axis} {self.value}"


def parse_sweep(texts: Sequence[str]) -> dict[str, list[str]]:
    """Return the values of each axis: `ipc=1,5,10`, `codec=f16,i4`, ..."""
    axes: dict[str, list[str]] = {}
    for text in texts:
        axis, _, values = text.partition("=")
        if axis not in _AXES:
            expected = ", ".join(f"{axis}={example}" for axis, (_, example) in _AXES.items())
            raise UsageError(f"invalid sweep {text!r}: expected one of {expected}")
        axes[axis] = values.split(",")
        for value in axes[axis]:
            check, example = _AXES[axis]
            if not check(value):
                raise UsageError(f"invalid sweep {text!r}: expected values as in {axis}={example}")
    return axes


def _is_count(value: str) -> bool:
    return value.isdecimal() and int(value) >= 1


def _is_labels(value: str) -> bool:
    return value in {"none", "dense"} or (value.startswith("top") and _is_count(value[3:]))


_AXES: dict[str, tuple[Callable[[str], bool], str]] = {
    "ipc": (_is_count, "1,5,10"),
    "codec": (str.isalnum, "f16,i8,i4"),
    "labels": (_is_labels, "none,top2,dense"),
    "vectors": (_is_count, "1,2,4"),
}


def variants(pack: Pack, axes: Mapping[str, Sequence[str]], learn: Encode) -> list[Variant]:
    """Return the pack itself, then one variant for each value of each axis.

    `learn` makes the pack of a number of vectors; all other values only change what is stored.
    """
    swept = [Variant("pack", "as it is", pack)]
    for axis, values in axes.items():
        for value in values:
            changed = learn(int(value)) if axis == "vectors" else _change(pack, axis, value)
            if changed.root not in {variant.pack.root for variant in swept}:
                swept.append(Variant(axis, value, changed))
    return swept


def _change(pack: Pack, axis: str, value: str) -> Pack:
    if axis == "ipc":
        return pack.first(int(value))
    if axis == "codec":
        if pack.prompts is None:
            raise UsageError(f"invalid sweep codec={value}: the pack has no prompts")
        if value == pack.prompts.codec:
            return pack
        try:
            return replace(pack, prompts=encode_prompts(decode_prompts(pack.prompts), value))
        except InvalidPackError as error:
            raise UsageError(
                f"invalid sweep codec={value}: {error.args[0]}", hint=error.hint
            ) from error
    if value == "none":
        return replace(pack, labels=None)
    if pack.labels is None:
        raise UsageError(f"invalid sweep labels={value}: the pack has no soft labels")
    probs = decode_labels(pack.labels)
    if value == "dense":
        return replace(pack, labels=encode_labels(probs, "dense"))
    return replace(pack, labels=encode_labels(probs, "topk", k=int(value[3:])))


def learner(pack: Pack, source: Source, folder: Path, settings: EvalSettings) -> Encode:
    """Return a function that encodes the source with other vectors, and else as pack records.

    It writes to `folder`; backbone and teacher are those of the settings, where they name them.
    """
    return lambda vectors: _encode_again(pack, vectors, source, folder, settings)


def _encode_again(
    pack: Pack, vectors: int, source: Source, folder: Path, settings: EvalSettings
) -> Pack:
    recorded = pack.provenance.get("options", {})
    if pack.provenance.get("method") != "d3m" or not isinstance(recorded, Mapping):
        raise UsageError(
            f"invalid sweep vectors={vectors}: the pack was not made by method d3m, which learns"
            " vectors"
        )
    record = {name: to_plain(value) for name, value in recorded.items() if name != "budget"}
    try:
        learned = d3m_settings({**record, "vectors": vectors})
    except UsageError as error:
        raise UsageError(f"invalid sweep vectors={vectors}: {error.args[0]}") from error
    backbone = settings.backbone or pack.recipe.backbone.repo or unpack_backbone(pack)
    if backbone is None:
        raise UsageError(
            f"invalid sweep vectors={vectors}: the pack's backbone is published nowhere",
            hint="give its directory as backbone=",
        )
    again = replace(
        learned,
        images_per_class=pack.images_per_class,
        backbone=str(backbone),
        teacher=settings.teacher or "train",
    )
    return encode(source, folder / f"vectors-{vectors}-{pack.root[:12]}.d3m", again)


def sweep_entry(variant: Variant, bench: Bench) -> Entry:
    """Return a variant as an entry; the pack itself is the entry that an evaluation has already."""
    key = "pack" if variant.axis == "pack" else f"sweep-{variant.axis}-{variant.value}"
    return pack_entry(bench, key, variant.title, variant.pack, variant.pack.ledger().total)


def run_sweep(swept: Sequence[Variant], bench: Bench, seeds: int) -> list[dict[str, Any]]:
    """Train students on every variant; `front` marks those that nothing smaller equals."""
    points: list[dict[str, Any]] = []
    for variant in swept:
        result = bench.run(sweep_entry(variant, bench), seeds)
        points.append(
            {
                "axis": variant.axis,
                "value": variant.value,
                "title": variant.title,
                "root": variant.pack.root,
                "bytes": variant.pack.ledger().total,
                "images": len(variant.pack),
                "last": {"mean": result.last.mean, "std": result.last.std},
                "seeds": seeds,
            }
        )
    marks = pareto([(point["bytes"], point["last"]["mean"]) for point in points])
    for point, on_front in zip(points, marks, strict=True):
        point["front"] = on_front
    return points


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Return for each (bytes, accuracy) whether no other is as small, as good, and better."""
    return [
        not any(
            other != point and other[0] <= point[0] and other[1] >= point[1] for other in points
        )
        for point in points
    ]

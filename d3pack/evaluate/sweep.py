"""Variants of a pack along its dials, and which of them no other beats."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from d3pack.errors import UsageError
from d3pack.evaluate import baselines
from d3pack.evaluate.baselines import Arm
from d3pack.evaluate.bench import Bench
from d3pack.evaluate.workdir import Workdir
from d3pack.format import to_plain
from d3pack.format.codecs import decode_labels, decode_prompts, encode_labels, encode_prompts
from d3pack.format.pack import Pack
from d3pack.sources import Source

AXES = ("ipc", "codec", "labels", "vectors")
Encode = Callable[[int], Pack]  # vectors -> a pack, learned anew


@dataclass(frozen=True, slots=True)
class Variant:
    """One setting of one dial."""

    axis: str
    value: str
    pack: Pack

    @property
    def title(self) -> str:
        return f"{self.axis} {self.value}"


def parse(texts: Sequence[str]) -> dict[str, list[str]]:
    """`ipc=1,5,10` and the like, one axis each."""
    found: dict[str, list[str]] = {}
    for text in texts:
        axis, equals, values = text.partition("=")
        if axis not in AXES or not equals or not all(values.split(",")):
            raise UsageError(
                f"--sweep {text!r} says nothing",
                hint="write ipc=1,5,10 or codec=f16,i8,i4 or labels=none,top2,dense"
                " or vectors=1,2,4",
            )
        found[axis] = values.split(",")
    return found


def variants(pack: Pack, axes: Mapping[str, Sequence[str]], encode: Encode | None) -> list[Variant]:
    """The pack itself, then each setting of each axis; cheap dials need no learning."""
    found = [Variant("pack", "as it is", pack)]
    for axis, values in axes.items():
        for value in values:
            made = _variant(pack, axis, value, encode)
            if made.root not in {variant.pack.root for variant in found}:
                found.append(Variant(axis, value, made))
    return found


def learner(
    pack: Pack,
    source: Source,
    workdir: Workdir,
    *,
    backbone: str | Path | None = None,
    teacher: str | None = None,
) -> Encode | None:
    """Encode the source again with another number of vectors and all else as recorded."""
    recorded = pack.provenance.get("options")
    if pack.provenance.get("method") != "d3m" or not isinstance(recorded, Mapping):
        return None
    record = {key: to_plain(value) for key, value in recorded.items() if key != "budget"}

    def encode_again(vectors: int) -> Pack:
        from d3pack.encode import d3m_settings, encode

        settings = replace(
            d3m_settings({**record, "vectors": vectors}),
            images_per_class=pack.images_per_class,
            backbone=str(backbone or pack.recipe.backbone.repo),
            teacher=teacher or "train",
        )
        name = f"vectors-{vectors}-{pack.root[:12]}.d3m"
        return encode(source, workdir.path / name, settings)

    return encode_again


def _variant(pack: Pack, axis: str, value: str, encode: Encode | None) -> Pack:
    if axis == "ipc":
        return pack.first(_whole(axis, value))
    if axis == "codec" and value == pack.prompts.codec:
        return pack
    if axis == "codec":
        return replace(pack, prompts=encode_prompts(decode_prompts(pack.prompts), value))
    if axis == "vectors":
        if encode is None:
            raise UsageError(
                "a sweep over vectors learns prompts anew",
                hint="give real training images, and a pack that the d3m method made",
            )
        return encode(_whole(axis, value))
    if value == "none":
        return replace(pack, labels=None)
    if pack.labels is None:
        raise UsageError("the pack has no soft labels to sweep over", hint="drop labels=")
    probs = decode_labels(pack.labels)
    if value == "dense":
        return replace(pack, labels=encode_labels(probs, "dense"))
    return replace(pack, labels=encode_labels(probs, "topk", k=_whole(axis, value[3:])))


def _whole(axis: str, value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise UsageError(f"--sweep {axis}: {value!r} is no count", hint="whole numbers from 1")
    return int(value)


def arm(variant: Variant, bench: Bench) -> Arm:
    """A variant as a row of a comparison; the pack itself is the row that is there already."""
    key = "pack" if variant.axis == "pack" else f"sweep-{variant.axis}-{variant.value}"
    total = variant.pack.ledger().total
    return baselines.pack_arm(key, variant.title, variant.pack, bench.training_set, total)


def run(found: Sequence[Variant], bench: Bench, seeds: int) -> list[dict[str, Any]]:
    """Students for every variant; `front` marks those that nothing cheaper equals."""
    points: list[dict[str, Any]] = []
    for variant in found:
        result = bench.run(arm(variant, bench), seeds)
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
    """For each (bytes, accuracy): whether no other point is as small and as good, and better."""
    return [
        not any(
            other != point and other[0] <= point[0] and other[1] >= point[1] for other in points
        )
        for point in points
    ]

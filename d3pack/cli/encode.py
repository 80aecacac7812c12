"""`d3pack encode`: real images to a pack."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from d3pack.cli import _out
from d3pack.cli._command import chosen, flags_of
from d3pack.cli._fields import (
    Format,
    format_option,
    overwrite_option,
    pack_output,
    shard_option,
    source_argument,
    without_shard,
    workers_field,
)
from d3pack.encode import EncodeSettings, method_settings
from d3pack.errors import UsageError
from d3pack.system import Shard, Workers, costs, count, nested, option, place

if TYPE_CHECKING:
    from d3pack.sources import Source
    from d3pack.system import ObjectPath

PART = "Do only one share, as 3/8, into a part; `d3pack merge` makes the pack of all parts."
_LISTED = 20  # classes that --dry-run lists
Deciding = Mapping[str, tuple[str, ...]]  # parts of an estimate, and the flags that decide on them
_DECIDE: Deciding = {
    "collages": ("--pool", "--crops"),
    "inversion": ("--cool", "--steps"),
    "guidance": ("--guidance",),
    "one pass": ("--one-pass",),
    "teacher": ("--teacher-samples",),
    "images": ("--ipc", "--candidates"),
    "codes": ("--codes", "--code-tried"),
    "pilots": ("--for-updates", "--no-codes"),
    "train": ("--train-steps", "--time-budget"),
    "sampler": ("--fitted-steps", "--search-images"),
    "tune": ("--train-steps",),
}
_LEFT = 0.1  # share of a budget about which it is worth to speak, where a pack leaves it
_LONG, _SHARE = 30.0, 0.2  # seconds and share of a part about which it is worth to speak


@dataclass(frozen=True, slots=True)
class Encode:
    """Learn a prompt for every class of a source of real images, and write a pack.

    An interrupted run goes on when the same command is given again, and ends with the same bytes.
    What a method takes beside the shared options is shown by --help behind --method NAME.

    Example: d3pack encode imagenet/ --ipc 50 -o imnet.d3m
    """

    source: str = source_argument()
    output: str | None = pack_output(None)
    settings: EncodeSettings = nested(EncodeSettings)
    method_settings: Any = chosen("method", method_settings)
    class_names: Path | None = option(None, "CSV or JSON: folder to name.", group="source")
    split: str = option("train", "Which split of the source.", group="source")
    first_classes: int | None = option(
        None, "Only the first N classes: a trial.", ge=1, group="source"
    )
    on_error: Literal["skip", "fail"] = option(
        "skip", "Bad files: skip (and count) or fail.", group="source"
    )
    dry_run: bool = option(False, "Print classes, plan, time and bytes; do nothing.")
    shard: Shard | None = shard_option(PART)
    wait: bool = option(False, "With --shard: wait for other shards where they are needed.")
    workers: Workers = workers_field()
    restart: bool = option(False, "Discard what an earlier run left.")
    overwrite: bool = overwrite_option()
    format: Format = format_option("How progress is printed; json: events as lines.")

    def run(self, deciding: Deciding | None = None) -> None:
        """Encode, or print what encoding would take.

        Args:
            deciding: flags that decide how long parts take; None: those of this verb.
        """
        from d3pack.encode import check_output, check_unused, check_used
        from d3pack.sources import open_source
        from d3pack.system import resolve_device

        if self.output is None and not self.dry_run:
            raise UsageError("no output", hint="name one with -o out.d3m, or pass --dry-run")
        if self.wait and self.shard is None:
            raise UsageError("--wait is for --shard")
        without_shard(self.workers, self.shard)
        if self.output is not None:
            check_output(self.output)
            if self.shard is None:  # which writes a part
                check_unused(self.output, overwrite=self.overwrite, restart=self.restart)
        if not self.workers.wanted:  # which may be on other machines
            resolve_device(self.settings.device)  # now: to open a large source takes long
        settings = replace(self.settings, method_settings=self.method_settings)
        check_used(settings, settings.method)
        source = open_source(
            self.source,
            class_names=self.class_names,
            split=self.split,
            on_error=self.on_error,
            first=self.first_classes,
        )
        if self.output is None or self.dry_run:
            self._estimate(source, settings, deciding or deciding_flags(settings.method))
        elif self.shard is not None:
            self._encode_shard(source, place(self.output), settings, self.shard)
        else:
            self._encode(source, place(self.output), settings)

    def _estimate(self, source: Source, settings: EncodeSettings, deciding: Deciding) -> None:
        from d3pack.encode import estimate_encode

        estimate = estimate_encode(source, settings)
        lines = estimate.pop("lines")
        if self.format == "json":
            _out.emit(estimate)
            return
        classes, counts = estimate["classes"], estimate["counts"]
        for name, images in zip(classes[:_LISTED], counts, strict=False):
            _out.show(f"{images:8d}  {name}")
        if len(classes) > _LISTED:
            _out.show(f"     ...  and {len(classes) - _LISTED} more classes")
        for line in lines:
            _out.show(line)
        _out.show(costs(estimate["seconds"]))
        for line in shorter(estimate["seconds"], deciding):
            _out.show(line)
        _out.show(f"about {estimate['bytes']:,} bytes")

    def _encode_shard(
        self, source: Source, output: Path | ObjectPath, settings: EncodeSettings, shard: Shard
    ) -> None:
        from d3pack.encode import encode_shard

        _out.if_interrupted("run the same command again and it goes on")
        with _out.progress(self.format) as listener:
            part = encode_shard(
                source,
                output,
                shard,
                settings,
                listeners=[listener],
                restart=self.restart,
                wait=self.wait,
            )
        if self.format == "human":
            _out.show(f"{part}: shard {shard} has finished")
            _out.say(f"when all have: d3pack merge {part.parent} -o {output}")

    def _encode(self, source: Source, output: Path | ObjectPath, settings: EncodeSettings) -> None:
        from d3pack.encode import encode

        _out.if_interrupted(f"run the same command again and it goes on ({output.name}.work)")
        with _out.progress(self.format) as listener:
            pack = encode(
                source,
                output,
                settings,
                listeners=[listener],
                restart=self.restart,
                overwrite=self.overwrite,
                estimate=self.format == "human",
                workers=self.workers,
            )
        if self.format == "human":
            nbytes, classes = output.stat().st_size, len(pack.classes)
            _out.show(f"{output}: {nbytes:,} bytes, {len(pack):,} images of {classes:,} classes")
            if (text := left_over(settings.budget, nbytes)) is not None:
                _out.say(text)
            _out.say(f"{output.name}.work holds sheets and the log, and may be deleted")
            if source.skipped:
                skipped = count(len(source.skipped), "file")
                _out.say(f"skipped {skipped}: {output.name}.work/skipped.txt names them")


def left_over(budget: int | None, nbytes: int) -> str | None:
    """Return a line on what a pack leaves of its budget; None where that is little."""
    if budget is None or nbytes >= budget * (1 - _LEFT):
        return None
    return f"{budget - nbytes:,} bytes of the budget are left: nothing more was worth them"


def deciding_flags(method: str) -> Deciding:
    """Return the flags that decide how long the parts of an encoding by a method take."""
    if method == "codes":  # of all images
        return {"codes": ("--code-tried",)}
    there = {flag.label for flag in flags_of(Encode, ("--method", method))}
    return {part: tuple(flag for flag in flags if flag in there) for part, flags in _DECIDE.items()}


def shorter(seconds: dict[str, float], deciding: Deciding) -> Iterator[str]:
    """Yield what decides about the long parts of an encoding."""
    least = max(_LONG, _SHARE * sum(seconds.values()))
    for name, value in seconds.items():
        if value >= least and (flags := deciding.get(name)):
            yield f"{name} depends on {' and '.join(flags)}"

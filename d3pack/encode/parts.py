"""Parts of an encoding: the directories in which shards keep what they have done."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from d3pack.encode.contract import method_settings
from d3pack.encode.settings import EncodeSettings
from d3pack.errors import NotFoundError, UsageError
from d3pack.sources import Source, open_source
from d3pack.system import Journal, ObjectPath, Shard, from_plain, place, plain, read_facts

Part = Path | ObjectPath
_CALL = "call"  # in the journal: what the shard was asked to do
_OWN = "method_settings"
_WHAT_PARTS_ARE = "parts are what shards of encode write"
_NAME = re.compile(r"[0-9]+-of-([0-9]+)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Call:
    """What a shard was asked to do."""

    shard: Shard
    settings: EncodeSettings
    source: Mapping[str, Any] | None  # arguments of `open_source`

    def open(self) -> Source:
        """Open the source of the shard."""
        if self.source is None:
            raise UsageError(
                "the shards were given a source without an address", hint="name the real images"
            )
        return open_source(**self.source)


def part_of(folder: Part, shard: Shard) -> Part:
    """Return the part of a shard."""
    return folder / f"{shard.number}-of-{shard.count}"


def count_of(folder: Part) -> int | None:
    """Return the number of shards that the newest parts are of, if there are any."""
    parts = parts_in(folder)
    if len({_count(part) for part in parts}) > 1:
        parts.sort(key=_changed)
    return _count(parts[-1]) if parts else None


def _count(part: Part) -> int:
    return int(part.name.partition("-of-")[2])


def _changed(part: Part) -> float:
    if isinstance(part, ObjectPath):
        return (part / "journal.json").modified()
    return part.stat().st_mtime


def remove_parts(folder: Part) -> None:
    """Discard what shards have left."""
    for part in parts_in(folder):
        if isinstance(part, ObjectPath):
            for name in part.tree():
                (part / name).unlink()
        else:
            shutil.rmtree(part)


def parts_in(folder: Part) -> list[Part]:
    """Return the parts that lie in a folder."""
    if not folder.is_dir():
        return []
    named = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted((p for p in named if (p / "journal.json").exists()), key=lambda p: p.name)


def open_parts(parts: Sequence[str | Part]) -> list[Part]:
    """Return the parts that are named, or that lie in folders which are named."""
    return [part for where in map(place, parts) for part in parts_in(where) or [where]]


def record_call(journal: Journal, source: Source, settings: EncodeSettings, shard: Shard) -> None:
    """Keep in the part what `merge` has to know; it never gets into a pack."""
    own = settings.method_settings
    values = {**plain(settings), **({} if own is None else {_OWN: plain(own)})}
    call = {"shard": str(shard), "settings": values, "source": source.opened_by}
    if _CALL not in journal.facts:
        journal.record(_CALL, call)


def read_calls(parts: Sequence[Part]) -> tuple[Call, int]:
    """Return what the shards of these parts were asked to do, and their number.

    Raises:
        NotFoundError: there is no such part.
        UsageError: parts are missing, or are not of one encoding.
    """
    calls = [_read_call(part) for part in parts]
    if not calls:
        raise UsageError("no parts", hint="name the directories that the shards have made")
    counts = {call.shard.count for call in calls}
    if len(counts) > 1:
        raise UsageError(f"parts of {' and '.join(map(str, sorted(counts)))} shards do not fit")
    (count,) = counts
    missing = sorted({*range(1, count + 1)} - {call.shard.number for call in calls})
    if missing:
        names = ", ".join(f"{number}-of-{count}" for number in missing[:8])
        raise UsageError(
            f"{len(missing)} of {count} parts are missing: {names}{', ...' * (len(missing) > 8)}",
            hint="name the parts of all shards",
        )
    return calls[0], count


def _read_call(part: Part) -> Call:
    if not part.is_dir():
        raise NotFoundError(f"there is no part {part}", hint=_WHAT_PARTS_ARE)
    call = read_facts(part).get(_CALL)
    if call is None:
        raise UsageError(f"{part.name} is not a part", hint=_WHAT_PARTS_ARE)
    values = dict(call["settings"])
    own = values.pop(_OWN, None)
    settings = from_plain(EncodeSettings, values)
    if own is not None:
        settings = replace(
            settings, method_settings=from_plain(method_settings(settings.method), own)
        )
    return Call(Shard.parse(call["shard"]), settings, call["source"])

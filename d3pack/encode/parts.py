"""Parts of an encoding: the directories in which shards keep what they have done."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from d3pack.encode.contract import method_settings
from d3pack.encode.settings import EncodeSettings
from d3pack.errors import NotFoundError, UsageError
from d3pack.sources import Source, open_source
from d3pack.system import Journal, Shard, from_plain, plain, read_facts

_CALL = "call"  # in the journal: what the shard was asked to do
_OWN = "method_settings"


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
                "the shards were given a source that is no address", hint="name the source"
            )
        return open_source(**self.source)


def part_of(folder: Path, shard: Shard) -> Path:
    """Return the part of a shard."""
    return folder / f"{shard.number}-of-{shard.count}"


def count_of(folder: Path) -> int | None:
    """Return the number of shards that the newest parts are of, if there are any."""
    parts = sorted(_parts(folder), key=lambda part: part.stat().st_mtime_ns)
    return int(parts[-1].name.partition("-of-")[2]) if parts else None


def remove_parts(folder: Path) -> None:
    """Discard what shards have left."""
    for part in _parts(folder):
        shutil.rmtree(part)


def _parts(folder: Path) -> list[Path]:
    return [path.parent for path in folder.glob("*-of-*/journal.json")]


def record_call(journal: Journal, source: Source, settings: EncodeSettings, shard: Shard) -> None:
    """Keep in the part what `merge` has to know; it never gets into a pack."""
    own = settings.method_settings
    values = {**plain(settings), **({} if own is None else {_OWN: plain(own)})}
    call = {"shard": str(shard), "settings": values, "source": source.opened_by}
    if _CALL not in journal.facts:
        journal.record(_CALL, call)


def read_calls(parts: Sequence[Path]) -> tuple[Call, int]:
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


def _read_call(part: Path) -> Call:
    if not part.is_dir():
        raise NotFoundError(f"there is no part {part}", hint="encode with --shard makes parts")
    call = read_facts(part).get(_CALL)
    if call is None:
        raise UsageError(f"{part.name} is not a part", hint="encode with --shard makes parts")
    values = dict(call["settings"])
    own = values.pop(_OWN, None)
    settings = from_plain(EncodeSettings, values)
    if own is not None:
        settings = replace(
            settings, method_settings=from_plain(method_settings(settings.method), own)
        )
    return Call(Shard.parse(call["shard"]), settings, call["source"])

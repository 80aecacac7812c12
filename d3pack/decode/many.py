"""An export by workers: each keeps a decoder, and writes one share of the files after another."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from d3pack.decode.claim import check_new
from d3pack.decode.decoder import Decoder
from d3pack.decode.export import ExportReport, export_images
from d3pack.decode.settings import ExportSettings
from d3pack.format import Pack
from d3pack.system import Events, Listener, ObjectPath, Shard, Workers, run_work

_WRITTEN = "written"  # the event of a share


def export_by_workers(
    pack: Pack,
    output: Path | ObjectPath,
    workers: Workers,
    settings: ExportSettings | None = None,
    *,
    classes: Sequence[int] | None = None,
    images_per_class: int | None = None,
    decoder: Mapping[str, Any] | None = None,
    listeners: Sequence[Listener] = (),
) -> tuple[ExportReport, dict[str, Any]]:
    """Decode images into a folder on several devices or machines.

    Args:
        pack: what to decode.
        output: as for `export_images`; all machines have to share it.
        workers: where to decode.
        settings: as for `export_images`.
        classes: as for `export_images`.
        images_per_class: as for `export_images`.
        decoder: arguments of each worker's `Decoder`, such as device and path.
        listeners: receive the events of all workers, put together.

    Returns:
        What was done, and what the decoders say of themselves.

    Raises:
        UsageError: as for `export_images`, or there is no such cluster or device.
        NoSpaceError: as for `export_images`.
    """
    classes = range(len(pack.classes)) if classes is None else classes
    count = pack.images_per_class if images_per_class is None else images_per_class
    settings, options = settings or ExportSettings(), dict(decoder or {})
    check_new(output, len(classes) * count)
    decoded = [0]

    def add(event: dict[str, Any]) -> None:
        if event["event"] == _WRITTEN:
            decoded[0] += event["images"]

    shared = _Shared(pack, output, settings, [*classes], count, options)
    began = time.perf_counter()
    describe = run_work(
        shared, workers, [add, *listeners], device=options.get("device"), most=shared.units
    )
    report = ExportReport(len(classes) * count, decoded[0], time.perf_counter() - began)
    return report, describe


@dataclass(slots=True)
class _Shared:
    """An export as workers do it."""

    pack: Pack
    output: Path | ObjectPath
    settings: ExportSettings
    classes: list[int]
    count: int
    options: dict[str, Any]
    _decoder: Decoder | None = None
    _events: Events = field(default_factory=Events)

    @property
    def folder(self) -> Path | None:
        return None if isinstance(self.output, ObjectPath) else self.output

    @property
    def images(self) -> int:
        return len(self.classes) * self.count

    @property
    def units(self) -> int:
        """Groups of images or files, of which each shard needs one."""
        settings = self.settings
        size = self.pack.recipe.group if settings.layout == "folder" else settings.shard_size
        return -(-self.images // size)

    def open(self, listen: Listener) -> None:
        self._decoder, self._events = Decoder(self.pack, **self.options), Events([listen])

    def do(self, shard: Shard | None) -> None:
        decoder, events = self._decoder, self._events
        assert decoder is not None
        with events.stage("decode", self.images, "images", done=0):
            report = export_images(
                decoder,
                self.output,
                self.settings,
                classes=self.classes,
                images_per_class=self.count,
                shard=shard,
                progress=lambda done, total: events.step(done),
            )
        events.emit(_WRITTEN, images=report.decoded)

    def finish(self, count: int) -> dict[str, Any]:
        """Write what is missing, which is nothing, and remove what killed workers left."""
        self.do(None)
        assert self._decoder is not None
        return self._decoder.describe()

"""`d3pack decode`: a pack as image files."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d3pack.cli import _out
from d3pack.cli._fields import (
    Format,
    backbone_option,
    format_option,
    pack_argument,
    shard_option,
    without_shard,
    workers_field,
)
from d3pack.decode import ExportSettings
from d3pack.errors import NotFoundError, UsageError
from d3pack.system import (
    REQUIRED,
    Shard,
    Workers,
    device_option,
    live_view,
    nested,
    option,
    place,
    progress_bar,
    size,
)

if TYPE_CHECKING:
    from d3pack.decode import ExportReport
    from d3pack.format import Pack

_LARGE, _CHUNK = 400_000_000, 1 << 22
_AGAIN = "run the same command again and it goes on"


@dataclass(frozen=True, slots=True)
class Decode:
    """Rebuild the images of a pack. An interrupted call goes on where it stopped.

    Example: d3pack decode imnet.d3m -o imnet/
    """

    pack: str = pack_argument()
    output: str = option(REQUIRED, "Folder to write to, or s3://...", short="-o", metavar="PATH")
    settings: ExportSettings = nested(ExportSettings)
    classes: str | None = option(None, 'Names or numbers: "cat,dog", "0,5", "3-7".')
    images_per_class: int | None = option(
        None, "Images per class: the first, which are the best.", flag="--ipc"
    )
    shard: Shard | None = shard_option()
    workers: Workers = workers_field()
    device: str | None = device_option()
    fast: str | None = option(
        None,
        "Faster, other pixels: a list of bf16, channels_last, fused_attention, compile,"
        " tiny_vae; or all for the first three.",
    )
    tiny_vae: Path | None = option(None, "Folder of a small autoencoder, for --fast.")
    backbone: str | None = backbone_option()
    format: Format = format_option()

    def run(self) -> None:
        """Write the images and say how many there are."""
        from d3pack.decode import select_classes
        from d3pack.hub import load

        pack = load(self.pack)
        classes = select_classes(pack.classes, self.classes)
        most = pack.images_per_class
        count = most if self.images_per_class is None else self.images_per_class
        if not 1 <= count <= most:
            raise UsageError(
                f"invalid --ipc {count}: expected 1 to {most}",
                hint=f"the pack has {most} images per class",
            )
        if self.tiny_vae is not None and not self.tiny_vae.is_dir():
            raise NotFoundError(
                f"there is no directory {self.tiny_vae}", hint="--tiny-vae names one"
            )
        without_shard(self.workers, self.shard)
        if self.settings.layout == "folder" and self.format != "quiet":
            _say_left_out(pack)
        export = self._export_by_workers if self.workers.wanted else self._export
        written, numerics = export(pack, classes, count)
        if self.format == "json":
            _out.emit(
                {
                    "images": written.images,
                    "made": written.decoded,
                    "seconds": round(written.seconds, 3),
                    "images_per_second": round(written.rate, 2),
                    "out": self.output,
                    "root": pack.root,
                    "decoder": numerics,
                }
            )
        elif self.format == "human":
            before = written.images - written.decoded
            kept = f", {before:,} existed already" if before else ""
            share = f" of shard {self.shard}" if self.shard else ""
            rate = f"{written.rate:.1f} a second{kept}"
            text = f"{written.images:,} images{share} in {self.output} ({rate})"
            _out.show(text)

    def _export(
        self, pack: Pack, classes: list[int], count: int
    ) -> tuple[ExportReport, dict[str, Any]]:
        from d3pack.decode import Decoder, export_images

        progress = None if self.format == "quiet" else _checking
        decoder = Decoder(pack, progress=progress, **self._options(pack))
        numerics = decoder.describe()
        if self.format != "quiet":
            _out.say(_sentence(numerics))
            images, (height, width) = len(classes) * count, pack.recipe.size
            raw = size(3 * height * width * images)
            _out.say(f"{images:,} images of {height}x{width}, {raw} as raw pixels")
        _out.if_interrupted(_AGAIN)
        with progress_bar("decoding", quiet=self.format == "quiet") as bar:
            written = export_images(
                decoder,
                place(self.output),
                self.settings,
                classes=classes,
                images_per_class=count,
                shard=self.shard,
                progress=bar,
            )
        return written, numerics

    def _export_by_workers(
        self, pack: Pack, classes: list[int], count: int
    ) -> tuple[ExportReport, dict[str, Any]]:
        from d3pack.decode import export_by_workers

        _out.if_interrupted(_AGAIN)
        with nullcontext() if self.format == "quiet" else live_view() as listener:
            return export_by_workers(
                pack,
                place(self.output),
                self.workers,
                self.settings,
                classes=classes,
                images_per_class=count,
                decoder=self._options(pack),
                listeners=[listener] if listener else [],
            )

    def _options(self, pack: Pack) -> dict[str, Any]:
        """Arguments of the decoder."""
        from d3pack.decode import local_backbone

        exact = self.fast is None and self.tiny_vae is None
        switches = None
        if self.fast is not None and self.fast != "all":
            switches = [part.strip() for part in self.fast.split(",")]
        return {
            "device": self.device,
            "numerics": "exact" if exact else "fast",
            "switches": switches,
            "tiny_vae": self.tiny_vae,
            "path": self.backbone or local_backbone(self.pack, pack),
        }


def _say_left_out(pack: Pack) -> None:
    """Say what the pack has and a tree of folders has no place for."""
    parts = {"soft labels": pack.labels, "weights": pack.weights}
    names = [name for name, part in parts.items() if part is not None]
    if names:
        _out.say(f"folders hold no {' and no '.join(names)}: --to parquet keeps them")


def _sentence(numerics: dict[str, Any]) -> str:
    switches = f" ({', '.join(numerics['switches'])})" if numerics["switches"] else ""
    return (
        f"{numerics['numerics']}{switches} on {numerics['device']}, {numerics['dtype']}, backbone"
        f" {numerics['backbone']}, {numerics['sampler']} {numerics['steps']} steps"
    )


def _checking(path: str, done: int, size: int) -> None:
    """Say that a large file is hashed, which happens once."""
    if size >= _LARGE and (done == size or done <= _CHUNK):
        verb = "checked" if done == size else "checking"
        _out.say(f"{verb} {path}, {size / 1e9:.1f} GB")

"""`d3pack preview`: a pack as a picture or a page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from d3pack.cli import _out
from d3pack.cli._fields import Format, backbone_option, format_option, pack_argument
from d3pack.errors import NotFoundError, UsageError
from d3pack.system import REQUIRED, device_option, option, progress_bar

if TYPE_CHECKING:
    from d3pack.format import Pack

PICTURES, PAGES = {".png", ".webp"}, {".html", ".htm"}


@dataclass(frozen=True, slots=True)
class Preview:
    """Draw a contact sheet, or a page with images, labels, ledger and recipe.

    Example: d3pack preview cifar10.d3m -o page.html
    """

    pack: str = pack_argument()
    output: Path = option(REQUIRED, "A .png or .webp contact sheet, or an .html page.", short="-o")
    most_classes: int = option(20, "Classes shown, at most, spread over the pack.", ge=1)
    images_per_class: int = option(8, "Images per class.", flag="--ipc", ge=1)
    device: str | None = device_option()
    backbone: str | None = backbone_option()
    format: Format = format_option()

    def run(self) -> None:
        """Decode a few images and write the contact sheet or the page."""
        from d3pack.hub import load
        from d3pack.system import replace_file

        kind = self.output.suffix.lower()
        if kind not in PICTURES | PAGES:
            raise UsageError(
                f"invalid --output {self.output.name!r}: expected .png, .webp or .html"
            )
        if not self.output.parent.is_dir():
            raise NotFoundError(f"{self.output.parent} is not a directory", hint="create it first")
        pack = load(self.pack)
        data = self._drawn(pack)
        replace_file(self.output, data)
        if self.format == "json":
            _out.emit({"output": self.output.name, "bytes": len(data), "root": pack.root})
        elif self.format == "human":
            _out.say(f"wrote {self.output} ({len(data):,} bytes)")

    def _drawn(self, pack: Pack) -> bytes:
        """The bytes of the contact sheet or the page."""
        import io

        from d3pack.decode import Decoder, local_backbone, verify_probes
        from d3pack.preview import render_page, render_sheet, sample

        path = self.backbone or local_backbone(self.pack, pack)
        decoder = Decoder(pack, device=self.device, path=path)
        with progress_bar("decoding", quiet=self.format == "quiet") as progress:
            samples = sample(
                pack,
                decoder,
                classes=self.most_classes,
                images=self.images_per_class,
                progress=progress,
            )
        name = self.pack.rsplit("/", 1)[-1]
        kind = self.output.suffix.lower()
        if kind in PICTURES:
            picture = io.BytesIO()
            render_sheet(pack, samples, title=name).save(picture, kind[1:], quality=85)
            return picture.getvalue()
        verdict = "" if pack.probes is None else verify_probes(pack, decoder).verdict
        return render_page(pack, samples, name=name, verdict=verdict).encode()

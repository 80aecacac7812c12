"""`d3pack push`: a pack to the Hugging Face Hub."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from d3pack.cli import _out
from d3pack.cli._fields import Format, format_option
from d3pack.hub import PushSettings
from d3pack.system import argument, nested, option, progress_bar

if TYPE_CHECKING:
    from d3pack.hub import Parcel, Pushed

_TEXTS = (".gitattributes", "README.md", "croissant.json")


@dataclass(frozen=True, slots=True)
class Push:
    """Publish a pack in one commit, with card, preview and metadata; then read it back.

    Example: d3pack push imnet.d3m org/imnet-d3m --licence cc-by-4.0 --dry-run
    """

    pack: Path = argument("The .d3m file to publish.")
    repo: str = argument("Dataset repository: org/name.")
    settings: PushSettings = nested(PushSettings)
    dry_run: bool = option(False, "Show everything that would be sent; send nothing.")
    format: Format = format_option()

    def run(self) -> None:
        """Make every file of the commit, then show or send them."""
        from d3pack.hub import check_login, prepare_push, send_push

        if not self.dry_run:
            check_login()
        quiet = self.format == "quiet" or self.settings.preview != "decode"
        with progress_bar("decoding the preview", quiet=quiet) as progress:
            parcel = prepare_push(self.pack, self.repo, self.settings, progress=progress)
        if self.dry_run:
            self._show(parcel)
        else:
            for note in parcel.notes:
                _out.say(note)
            self._report(send_push(parcel, self.settings), said=len(parcel.notes))

    def _show(self, parcel: Parcel) -> None:
        """Print what would be sent."""
        rows = [
            {"path": path, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for path, data in parcel.files.items()
        ]
        texts = {path: parcel.files[path].decode() for path in _TEXTS}
        if self.format == "json":
            _out.emit(
                {
                    "address": str(parcel.address),
                    "root": parcel.pack.root,
                    "message": parcel.message,
                    "files": rows,
                    "notes": list(parcel.notes),
                    "texts": texts,
                }
            )
        elif self.format == "human":
            for note in parcel.notes:
                _out.say(note)
            _out.show(f"would commit to {parcel.address.repo}: {parcel.message}")
            for row in rows:
                _out.show(f"{row['bytes']:>12,}  {row['sha256']}  {row['path']}")
            for path, text in texts.items():
                for line in ("", f"--- {path}", *text.rstrip().split("\n")):
                    _out.show(line)

    def _report(self, pushed: Pushed, said: int) -> None:
        """Print where the pack is now, and the notes that were not said before."""
        for note in pushed.notes[said:]:
            _out.say(note)
        if self.format == "json":
            _out.emit(
                {
                    "address": str(pushed.address),
                    "commit": pushed.address.revision,
                    "root": pushed.address.root,
                    "url": pushed.web,
                    "files": list(pushed.sent),
                    "notes": list(pushed.notes),
                }
            )
        elif self.format == "quiet":
            _out.show(str(pushed.address))
        else:
            _out.show(f"pushed and read back: {pushed.web}")
            _out.show(f"open with {pushed.address}")

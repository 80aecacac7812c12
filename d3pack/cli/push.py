"""`d3pack push`: a pack to the Hugging Face Hub."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from d3pack.cli import _out
from d3pack.cli._fields import Format, backbone_option, device_option, format_option
from d3pack.system import argument, option, progress_bar, resolve_device

if TYPE_CHECKING:
    from d3pack.hub.push import Parcel, Pushed

_TEXTS = (".gitattributes", "README.md", "croissant.json")


@dataclass(frozen=True, slots=True)
class Push:
    """Publish a pack in one commit, with card, preview and metadata; then read it back.

    Example: d3pack push imnet.d3m org/imnet-d3m --licence cc-by-4.0 --dry-run
    """

    pack: Path = argument("The .d3m file to publish.")
    repo: str = argument("Dataset repository: org/name.")
    private: bool = option(False, "The repository must be, or is made, private.")
    revision: str | None = option(None, "Branch to commit to. [main]")
    pr: bool = option(False, "Open a pull request instead.")
    dry_run: bool = option(False, "Show everything that would be sent; send nothing.")
    licence: str | None = option(None, "Licence of the pack, as cc-by-4.0.")
    source: str | None = option(None, "What the real images were, and their licence.")
    record: Path | None = option(
        None, "evaluation.json of `d3pack eval`. [PACK.eval/]", flag="--eval"
    )
    preview: Literal["decode", "probes", "none"] = option("decode", "Images for the viewer.")
    images: int | None = option(None, "Images of the preview. [40; 12 above 128 pixels]", ge=1)
    name: str | None = option(None, "Name of the file there. [as here]")
    sign: bool = option(False, "Sign it: with --key, else by Sigstore's login.")
    key: Path | None = option(None, "Private key (PEM) to sign with.")
    replace_card: bool = option(False, "Replace a README.md that is not ours.")
    backbone: str | None = backbone_option()
    device: str | None = device_option()
    format: Format = format_option()

    def run(self) -> None:
        """Make every file of the commit, then show or send them."""
        from d3pack.hub import push

        push.check_branch(self.revision, self.pr)
        if not self.dry_run:
            push.check_ready()
        parcel = self._parcel()
        if self.dry_run:
            self._show(parcel)
            return
        pushed = push.send(
            parcel,
            private=self.private,
            revision=self.revision,
            pr=self.pr,
            replace_card=self.replace_card,
        )
        self._report(pushed)

    def _parcel(self) -> Parcel:
        from d3pack.hub import push

        options = push.Options(
            licence=self.licence,
            source=self.source,
            record=self.record,
            preview=self.preview,
            images=self.images,
            backbone=None if self.backbone is None else Path(self.backbone),
            device=str(resolve_device(self.device)),
            sign=self.sign or self.key is not None,
            key=self.key,
            name=self.name,
        )
        quiet = self.format == "quiet" or self.preview != "decode"
        with progress_bar("decoding the preview", quiet=quiet) as progress:
            return push.prepare(self.pack, self.repo, options, progress)

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

    def _report(self, pushed: Pushed) -> None:
        """Print where the pack is now."""
        for note in pushed.notes:
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
            print(pushed.address)
        else:
            _out.show(f"pushed and read back: {pushed.web}")
            _out.show(f"open with {pushed.address}")

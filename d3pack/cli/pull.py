"""`d3pack pull`: a pack from the Hugging Face Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from d3pack.cli import _out
from d3pack.cli._fields import Format, format_option, overwrite_option
from d3pack.errors import UsageError
from d3pack.system import argument, option

if TYPE_CHECKING:
    from d3pack.format import Pack
    from d3pack.hub import Pulled


@dataclass(frozen=True, slots=True)
class Pull:
    """Download a pack from the Hub, verify every hash, and put it here.

    Example: d3pack pull hf://datasets/org/imnet-d3m/imnet.d3m
    """

    address: str = argument("hf://datasets/org/name[@rev]/file.d3m[#sha256=ROOT], org/name.")
    output: Path | None = option(None, "Where to put the pack. [its name, here]", short="-o")
    cache_only: bool = option(False, "Fill the Hub cache, write nothing here.")
    overwrite: bool = overwrite_option("Replace another file.")
    with_backbone: bool = option(False, "Download the backbone as well, by its lock.")
    signed: bool = option(False, "Refuse a pack without a signature.")
    key: Path | None = option(None, "Public key (PEM) that must have signed.")
    identity: str | None = option(None, "Who must have signed, as Sigstore knows them.")
    issuer: str | None = option(None, "Who vouches for that identity (URL).")
    format: Format = format_option()

    def run(self) -> None:
        """Download, verify, write, and print where the pack is."""
        from d3pack import hub
        from d3pack.hub import sign

        trust = sign.Trust(self.key, self.identity, self.issuer)
        pulled = hub.pull(hub.parse(self.address))
        signature = sign.check_remote(pulled.address, pulled.data, trust, required=self.signed)
        path = pulled.path if self.cache_only else self._written(pulled)
        result = {
            "address": str(pulled.address),
            "root": pulled.pack.root,
            "bytes": len(pulled.data),
            "path": str(path),
            "signature": signature,
            "backbone": self._backbone(pulled.pack) if self.with_backbone else None,
        }
        if self.format == "json":
            _out.emit(result)
        elif self.format == "quiet":
            print(result["path"])
        else:
            _out.show(f"{path}  {len(pulled.data):,} bytes, verified")
            _out.show(f"from      {pulled.address}")
            _out.show(f"signature {signature}")

    def _written(self, pulled: Pulled) -> Path:
        """The file that was written; another one stays unless it may be replaced."""
        from d3pack.system import replace_file

        name = str(pulled.address.file).rpartition("/")[2]
        path = self.output or Path(name)
        if path.is_dir():
            path = path / name
        if path.exists() and path.read_bytes() != pulled.data and not self.overwrite:
            raise UsageError(
                f"{path} exists and is another file", hint="give --overwrite or --output"
            )
        replace_file(path, pulled.data)
        return path

    def _backbone(self, pack: Pack) -> str:
        """The folder of the backbone: the listed files and no others, verified."""
        from d3pack.backbones import locate_files, verify_files

        ref = pack.recipe.backbone
        if self.format != "quiet":
            _out.say(
                f"backbone {ref.repo or ref.revision}: {len(ref.files)} files, {ref.nbytes:,} bytes"
            )
        folder = locate_files(ref)
        verify_files(folder, ref)
        return str(folder)

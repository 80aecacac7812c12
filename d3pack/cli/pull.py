"""`d3pack pull`: a pack from the Hugging Face Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from d3pack.cli import _out
from d3pack.cli._fields import Format, format_option, overwrite_option
from d3pack.system import argument, option


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
        from d3pack.hub import Trust, pull

        pulled = pull(
            self.address,
            output=None if self.cache_only else self.output or Path(),
            overwrite=self.overwrite,
            trust=Trust(self.key, self.identity, self.issuer, self.signed),
            with_backbone=self.with_backbone,
        )
        result = {
            "address": str(pulled.address),
            "root": pulled.pack.root,
            "bytes": len(pulled.data),
            "path": str(pulled.path),
            "signature": pulled.signature,
            "backbone": str(pulled.backbone) if pulled.backbone else None,
        }
        if self.format == "json":
            _out.emit(result)
        elif self.format == "quiet":
            print(result["path"])
        else:
            _out.show(f"{pulled.path}  {len(pulled.data):,} bytes, verified")
            _out.show(f"from      {pulled.address}")
            _out.show(f"signature {pulled.signature}")

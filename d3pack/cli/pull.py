"""`d3pack pull`: a pack from the Hugging Face Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from d3pack.cli import _out
from d3pack.cli._fields import Format, format_option, overwrite_option
from d3pack.hub import Trust
from d3pack.system import argument, nested, option


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
    trust: Trust = nested(Trust)
    format: Format = format_option()

    def run(self) -> None:
        """Download, verify, write, and print where the pack is."""
        from d3pack.hub import pull

        pulled = pull(
            self.address,
            output=None if self.cache_only else self.output or Path(),
            overwrite=self.overwrite,
            trust=self.trust,
            with_backbone=self.with_backbone,
        )
        if self.format == "json":
            _out.emit(
                {
                    "address": str(pulled.address),
                    "root": pulled.pack.root,
                    "bytes": len(pulled.data),
                    "path": str(pulled.path),
                    "signature": pulled.signature,
                    "backbone": str(pulled.backbone) if pulled.backbone else None,
                }
            )
        elif self.format == "quiet":
            _out.show(str(pulled.path))
        else:
            _out.show(f"{pulled.path}  {len(pulled.data):,} bytes, verified")
            _out.show(f"from      {pulled.address}")
            _out.show(f"signature {pulled.signature}")

"""`d3pack export-embeddings`: the prompts of a pack for other programs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from d3pack.cli import _out
from d3pack.cli._fields import (
    Format,
    backbone_option,
    format_option,
    overwrite_option,
    pack_argument,
)
from d3pack.system import REQUIRED, option


@dataclass(frozen=True, slots=True)
class ExportEmbeddings:
    """Write a safetensors file for each class, which diffusers, ComfyUI and A1111 load.

    Example: d3pack export-embeddings flowers.d3m -o embeddings/
    """

    pack: str = pack_argument()
    output: Path = option(REQUIRED, "Folder to write to.", short="-o")
    backbone: str | None = backbone_option("Directory of the backbone, for SDXL of other widths.")
    overwrite: bool = overwrite_option("Replace a folder that exists.")
    format: Format = format_option()

    def run(self) -> None:
        """Write the files and a README with the template."""
        from d3pack.encode import export_embeddings
        from d3pack.hub import load

        files = export_embeddings(
            load(self.pack), self.output, backbone=self.backbone, overwrite=self.overwrite
        )
        if self.format == "json":
            _out.emit({"files": [str(file) for file in files]})
        elif self.format == "quiet":
            _out.show(str(self.output))
        else:
            _out.show(f"{len(files):,} files in {self.output}; its README.md has the template")

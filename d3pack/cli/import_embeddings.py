"""`d3pack import-embeddings`: a pack of embedding files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from d3pack.cli import _out
from d3pack.cli._fields import Format, format_option, overwrite_option, pack_output
from d3pack.encode import ImportSettings
from d3pack.errors import UsageError
from d3pack.system import REQUIRED, argument, nested, option, place


@dataclass(frozen=True, slots=True)
class ImportEmbeddings:
    """Make a pack of textual inversions: a class for each .safetensors, .bin or .pt file.

    Example: d3pack import-embeddings toys/ --backbone org/model --template "a {}" -o toys.d3m
    """

    folder: Path = argument("Folder of embedding files of one base model.")
    output: str = pack_output(REQUIRED)
    backbone: str = option(REQUIRED, "Their base model: a directory or org/name.")
    template: str = option(REQUIRED, "Sentence that they were learned in, with one {}.")
    settings: ImportSettings = nested(ImportSettings)
    class_names: Path | None = option(None, "CSV or JSON: file name without ending to name.")
    overwrite: bool = overwrite_option()
    format: Format = format_option()

    def run(self) -> None:
        """Read the files, write the pack, and say what it holds."""
        from d3pack.encode import import_embeddings
        from d3pack.format import write
        from d3pack.sources import read_table

        output = place(self.output)
        if output.exists() and not self.overwrite:
            raise UsageError(f"{output} exists", hint="name another, or set --overwrite")
        names = None if self.class_names is None else read_table(self.class_names)
        pack = import_embeddings(
            self.folder, self.backbone, self.template, self.settings, names=names
        )
        write(pack, output)
        size = output.stat().st_size
        if self.format == "json":
            count = len(pack.classes)
            value = {"root": pack.root, "bytes": size, "path": str(output), "classes": count}
            _out.emit(value)
        elif self.format == "quiet":
            print(pack.root)
        else:
            made = f"{len(pack)} images of {len(pack.classes)} classes"
            _out.show(f"{output}  {size:,} bytes, {made}")

"""Settings of an export. The command reads them for its help, so nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from d3pack.errors import UsageError
from d3pack.system import check, option, require

Layout = Literal["folder", "webdataset", "parquet", "npz"]


@dataclass(frozen=True, slots=True)
class ExportSettings:
    """How decoded images are written."""

    layout: Layout = option(
        "folder",
        "Folders of classes (ImageFolder: no soft labels, no weights), webdataset, parquet or npz.",
        flag="--to",
    )
    image: Literal["png", "webp"] = option("png", "Image format; npz has none.")
    quality: int | None = option(None, "Lossy webp; without it: lossless.", ge=1, le=100)
    shard_size: int = option(1024, "Images of one file: tar, parquet or npz.", ge=1)

    def __post_init__(self) -> None:
        check(self)
        if self.layout == "parquet":
            require("pyarrow", "parquet output")
        if self.quality is not None and self.image != "webp":
            raise UsageError("quality is a setting of webp", hint='set image="webp", too')

"""`d3pack code`: a folder of images to a pack of codes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from d3pack.cli._fields import (
    Format,
    format_option,
    overwrite_option,
    pack_output,
    shard_option,
    source_argument,
    workers_field,
)
from d3pack.cli.encode import PART, Encode
from d3pack.encode import EncodeSettings
from d3pack.system import Shard, Workers, option, same_option


@dataclass(frozen=True, slots=True)
class Code:
    """Write the images of a folder as codes: each as a few bytes of choices among noise.

    Nothing is learned, and all images are kept: those that any method has distilled or chosen.

    Example: d3pack code distilled/ -o distilled.d3m --bytes-per-image 32
    """

    source: str = source_argument()
    output: str | None = pack_output(None)
    bytes_per_image: float = option(
        17.0, "Bytes of each image, at most; two levels take 3.", ge=3, le=5_124
    )
    size: tuple[int, int] | None = same_option(
        EncodeSettings, "size", help="Size of the images in pixels; that of the backbone."
    )
    tried: int | None = same_option(EncodeSettings, "code_tried", flag="--tried")
    colours: bool = same_option(EncodeSettings, "colours")
    backbone: str | None = same_option(EncodeSettings, "backbone")
    device: str | None = same_option(EncodeSettings, "device")
    seed: int = same_option(EncodeSettings, "seed")
    class_names: Path | None = same_option(Encode, "class_names")
    dry_run: bool = same_option(Encode, "dry_run")
    shard: Shard | None = shard_option(PART)
    workers: Workers = workers_field()
    restart: bool = same_option(Encode, "restart")
    overwrite: bool = overwrite_option()
    format: Format = format_option("How progress is printed; json: events as lines.")

    def run(self) -> None:
        """Code, or print what coding would take."""
        from d3pack.encode import coding_within

        steps, bits, atoms = coding_within(self.bytes_per_image)
        Encode(
            source=self.source,
            output=self.output,
            settings=EncodeSettings(
                method="codes",
                backbone=self.backbone,
                device=self.device,
                seed=self.seed,
                size=self.size,
                colours=self.colours,
                code_steps=steps,
                code_bits=bits,
                code_atoms=atoms,
                code_tried=self.tried,
            ),
            method_settings=None,
            class_names=self.class_names,
            dry_run=self.dry_run,
            shard=self.shard,
            workers=self.workers,
            restart=self.restart,
            overwrite=self.overwrite,
            format=self.format,
        ).run({"codes": ("--tried", "--bytes-per-image")})

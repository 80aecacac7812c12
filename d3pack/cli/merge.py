"""`d3pack merge`: the parts of all shards to a pack."""

from __future__ import annotations

from dataclasses import dataclass

from d3pack.cli import _out
from d3pack.cli._fields import Format, format_option, overwrite_option, pack_output
from d3pack.errors import UsageError
from d3pack.system import argument, option, place


@dataclass(frozen=True, slots=True)
class Merge:
    """Write the pack of an encoding whose shards have all finished.

    On the same kind of machine it is byte for byte the pack that one run without shards writes.

    Example: d3pack merge imnet.d3m.parts -o imnet.d3m
    """

    parts: tuple[str, ...] = argument(
        "Directories that encode --shard has made, or the one in which they lie."
    )
    output: str | None = pack_output(None)
    real: str | None = option(None, "The real images, if they are elsewhere now.")
    overwrite: bool = overwrite_option()
    format: Format = format_option("How progress is printed; json: events as lines.")

    def run(self) -> None:
        """Merge the parts."""
        from d3pack.encode import merge

        if self.output is None:
            raise UsageError("no output", hint="name one with -o out.d3m")
        with _out.progress(self.format) as listener:
            pack = merge(
                self.parts,
                self.output,
                self.real,
                listeners=[listener],
                overwrite=self.overwrite,
            )
        if self.format == "human":
            nbytes, classes = place(self.output).stat().st_size, len(pack.classes)
            _out.show(
                f"{self.output}: {nbytes:,} bytes, {len(pack):,} images of {classes:,} classes"
            )

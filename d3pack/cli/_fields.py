"""Fields that several verbs have, each declared once: the same flag means the same everywhere."""

from __future__ import annotations

from typing import Any, Literal

from d3pack.errors import UsageError
from d3pack.system import Shard, Workers, argument, nested, option

Format = Literal["human", "json", "quiet"]


def pack_argument(help: str = "A .d3m file, or an hf:// or s3:// address.") -> Any:
    """Declare a pack to read."""
    return argument(help)


def pack_output(default: Any) -> Any:
    """Declare where a pack is written."""
    return option(
        default, "The pack to write (.d3m): a path, s3://, ...", short="-o", metavar="PATH"
    )


def source_argument() -> Any:
    """Declare a source of real images."""
    return argument(
        "Class folders, tar, zip, WebDataset shards or parquet: path, s3://, hf://datasets/..."
    )


def backbone_option(
    help: str = "Backbone to use: name, Hub id or directory; checked by its lock.",
) -> Any:
    """Declare the backbone to use, where it is not the one that the pack names."""
    return option(None, help, private=True)


def shard_option(
    help: str = "Only one share: 3/8 is the third of eight. Shares may be done at the same time,"
    " anywhere; at last the command without --shard does what is missing.",
) -> Any:
    """Declare which share of the work to do."""
    return option(
        None,
        help,
        parse=Shard.parse,
        expected="NUMBER/COUNT, as 3/8",
        metavar="NUMBER/COUNT",
    )


def workers_field() -> Any:
    """Declare where the shards of a run are done."""
    return nested(Workers, group="Several devices and machines")


def without_shard(workers: Workers, shard: Shard | None) -> None:
    """Refuse one share for workers, which do all.

    Raises:
        UsageError: if both were chosen.
    """
    if workers.wanted and shard is not None:
        raise UsageError(
            "--shard is for runs without workers", hint="leave out --ray and --devices"
        )


def format_option(help: str = "How the result is printed.") -> Any:
    """Declare the form of the result."""
    return option("human", help)


def overwrite_option(help: str = "Replace existing output.") -> Any:
    """Declare whether existing output may be replaced."""
    return option(False, help)

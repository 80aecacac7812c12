"""What images of a pack take on this machine, and what of it needs a word of the user."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from d3pack.errors import UsageError
from d3pack.system import duration

if TYPE_CHECKING:
    from d3pack.decode.decoder import Decoder
    from d3pack.decode.pairs import Pair
    from d3pack.format import Pack

# A group of 16 images of 1024 x 1024 pixels is the largest that an ordinary recipe asks for, and
# takes about 12 GB with the small model `mini`.
MAX_PIXELS, MAX_IMAGE, LONG = 1 << 24, 1 << 21, 3600.0


def check_memory(what: str, pack: Pack, hint: str, decoder: Decoder | None = None) -> None:
    """Refuse groups of very many pixels, or, by an open decoder, of very many latent values.

    Nothing of their size is allocated before.

    Args:
        what: the images that are to be made.
        pack: theirs.
        hint: what a user can do.
        decoder: of the pack, where one is open.

    Raises:
        UsageError: a group is too large (E_LONG).
    """
    height, width = pack.recipe.size
    group = pack.recipe.group
    image = height * width if decoder is None else int(np.prod(decoder.latent_shape))
    if image > MAX_IMAGE or group * image > MAX_PIXELS:
        unit = "pixels" if decoder is None else "latent values"
        raise UsageError(
            f"{what} in groups of {group} images of {height} x {width}, {group * image:,} {unit}",
            code="E_LONG",
            hint=hint,
        )


def expected_seconds(decoder: Decoder, pairs: Sequence[Pair]) -> float:
    """Return about how many seconds images take, by a step and the pixels of one of each kind."""
    groups = decoder.plan(pairs)
    kinds = {first[1] < decoder.pack.coded_images: first for first, _ in groups}
    timed = {coded: decoder.time_one(first) for coded, first in kinds.items()}
    seconds = []
    for first, steps in groups:
        step, pixels = timed[first[1] < decoder.pack.coded_images]
        seconds.append(decoder.group * (step * steps + pixels))
    return max(*seconds, sum(seconds) / decoder.parallel_groups())


def check_time(what: str, seconds: float, hint: str) -> None:
    """Refuse work of over an hour.

    Raises:
        UsageError: it is (E_LONG).
    """
    if seconds > LONG:
        message = f"{what} take about {duration(seconds)} on this machine"
        raise UsageError(message, code="E_LONG", hint=hint)

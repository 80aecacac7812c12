"""How many images a second this machine makes, exactly and with each switch of fast numerics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from d3pack.decode.decoder import Decoder
from d3pack.decode.numerics import SWITCHES
from d3pack.system import first_line, seconds_of

if TYPE_CHECKING:
    from d3pack.format import Pack

_ENOUGH = 2.0  # seconds of each


def speeds(pack: Pack, device: str | None = None) -> Iterator[tuple[str, float | str]]:
    """Yield what is computed how, and images a second, or why it cannot be computed here.

    Args:
        pack: on a backbone that is here; its images are made.
        device: where.
    """
    yield "exact", _speed(Decoder(pack, device=device))
    for switch in SWITCHES:
        if switch == "tiny_vae":  # it needs an autoencoder of its own
            continue
        try:
            with Decoder(pack, device=device, numerics="fast", switches=[switch]) as decoder:
                yield switch, _speed(decoder)
        # of a compiler that is missing, or of kernels that this machine does not have
        except Exception as error:
            yield switch, f"not here: {first_line(error)}"


def _speed(decoder: Decoder) -> float:
    images = list(range(min(len(decoder), decoder.group * decoder.parallel_groups())))
    decoder.images(images)  # kernels are chosen, or compiled
    return len(images) / seconds_of(lambda: decoder.images(images), enough=_ENOUGH)

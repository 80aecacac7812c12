"""How many images a second this machine makes, exactly and with each switch of fast numerics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from d3pack.decode.decoder import Decoder
from d3pack.decode.numerics import SWITCHES
from d3pack.errors import D3MError
from d3pack.system import seconds_of

if TYPE_CHECKING:
    from d3pack.format import Pack

_ENOUGH = 2.0  # seconds of each


def speeds(pack: Pack, device: str | None = None) -> Iterator[tuple[str, float | str]]:
    """Yield what is computed how, and images a second, or why it cannot be computed here.

    Args:
        pack: on a backbone that is here; its images are made.
        device: where.
    """
    for name in ("exact", *SWITCHES):
        if name == "tiny_vae":  # it needs an autoencoder of its own
            continue
        how: dict[str, Any] = {} if name == "exact" else {"numerics": "fast", "switches": [name]}
        try:
            with Decoder(pack, device=device, **how) as decoder:
                rate: float | str = _speed(decoder)
        except D3MError as error:
            rate = f"not here: {error.code}"
        # of a compiler that is missing, or of kernels that this machine does not have
        except Exception as error:
            rate = f"not here: {type(error).__name__}"
        yield name, rate


def _speed(decoder: Decoder) -> float:
    images = list(range(min(len(decoder), decoder.group * decoder.parallel_groups())))
    decoder.images(images)  # kernels are chosen, or compiled
    return len(images) / seconds_of(lambda: decoder.images(images), enough=_ENOUGH)

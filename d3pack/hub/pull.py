"""From an address to a verified pack: in the cache, or part of it by range reads."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from d3pack.errors import HubError, NotFoundError
from d3pack.format import read
from d3pack.format.pack import Pack
from d3pack.hub.address import Address, is_address, parse
from d3pack.hub.cache import fetch

PathOrAddress = str | os.PathLike[str]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pulled:
    """A pack from the Hub, read and verified."""

    address: Address  # with the file, the commit and the root filled in: it can never change
    path: Path  # in the Hub's cache
    data: bytes  # as read once: what was verified is what is used
    pack: Pack


def pull(address: Address) -> Pulled:
    """Fetch a pack into the cache and verify it; a root that is not the pinned one is refused."""
    path, found = fetch(address)
    data = path.read_bytes()
    pack = read(data)
    check_root(pack.root, found)
    exact = found.at(str(found.revision), root=pack.root)
    _log.info("%s", exact)
    return Pulled(exact, path, data, pack)


def check_root(root: str, address: Address) -> None:
    """Refuse another pack than the address pins."""
    if address.root not in (None, root):
        raise HubError(
            f"{address} is a valid pack, but its root is {root}",
            code="E_HUB_PIN",
            hint="someone replaced it: ask whoever gave you the address, or pin the new root",
        )


def local_path(value: PathOrAddress) -> Path:
    """The path itself, or where a pack from the Hub lies, verified."""
    if is_address(value):
        return pull(parse(str(value))).path
    return Path(value)


def load(value: PathOrAddress) -> Pack:
    """Read a pack from a path or from the Hub."""
    if is_address(value):
        return pull(parse(str(value))).pack
    path = Path(value)
    if not os.path.exists(path) and (path.suffix != ".d3m" or len(path.parts) == 3):
        raise NotFoundError(
            f"there is no file {value}", hint="for the Hub write hf://datasets/org/name/file.d3m"
        )
    return read(path)

"""One lock for all decoders of an open backbone: each puts its own adapter on while it decodes."""

from __future__ import annotations

import os
import threading
import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from d3pack.backbones import Backbone

_locks: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_access = threading.Lock()


def lock_of(backbone: Backbone) -> Any:
    """Keep it as long as the backbone, so that its number cannot come to mean another one."""
    with _access:
        return _locks.setdefault(id(backbone), threading.Lock())


def _forget() -> None:
    """A child must not wait for threads that it does not have."""
    global _access
    _locks.clear()
    _access = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)

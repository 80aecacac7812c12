"""The config of a model, as diffusers has it: a mapping whose keys are attributes too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Config(dict[str, Any]):
    """Settings of a model by key and by attribute."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def settings_of(values: Mapping[str, Any]) -> Config:
    """Return the settings among the local variables of an `__init__`."""
    return Config({k: v for k, v in values.items() if k != "self" and not k.startswith("__")})

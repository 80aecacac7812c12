"""Which files of a repository in diffusers' layout a family needs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from d3pack.errors import BackboneError

_SHARD = r"-\d{5}-of-\d{5}"


@dataclass(frozen=True, slots=True)
class Part:
    """One folder: its config, and its weights or other files."""

    folder: str
    config: str = "config.json"
    weights: str = ""  # the stem of the weights file, without variant and suffix
    others: tuple[tuple[str, ...], ...] = ()  # the first alternative of which all files are there
    optional: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Layout:
    """The parts of a family, and files at the top that help if they are there."""

    parts: tuple[Part, ...]
    optional: tuple[str, ...] = ()

    def matches(self, paths: Iterable[str]) -> bool:
        """Whether a listing has the folders of this family."""
        there = set(paths)
        return all(f"{p.folder}/{p.config}" in there for p in self.parts if p.weights)

    def needed(self, paths: Iterable[str], variant: str | None = None) -> tuple[str, ...]:
        """The files to lock. Without a variant full-size weights win, "fp16" is the fallback."""
        there = set(paths)
        chosen = [path for path in self.optional if path in there]
        for part in self.parts:
            if part.config:
                chosen.append(_require(there, f"{part.folder}/{part.config}"))
            if part.weights:
                chosen += _weights(there, f"{part.folder}/{part.weights}", variant)
            if part.others:
                chosen += _first(there, part.folder, part.others)
            chosen += [f for o in part.optional if (f := f"{part.folder}/{o}") in there]
        return tuple(sorted(chosen))


def weight_files(paths: Iterable[str], stem: str) -> tuple[str, ...]:
    """The safetensors files of one part among locked paths; shards in order."""
    pattern = re.compile(re.escape(stem) + rf"(\.[a-z0-9]+)?({_SHARD})?(\.[a-z0-9]+)?\.safetensors")
    return tuple(sorted(path for path in paths if pattern.fullmatch(path)))


def _weights(there: set[str], stem: str, variant: str | None) -> list[str]:
    variants = [variant] if variant else [None, "fp16"]
    for name in variants:
        dot = f".{name}" if name else ""
        if (single := f"{stem}{dot}.safetensors") in there:
            return [single]
        shard = re.compile(re.escape(stem) + f"({re.escape(dot)}{_SHARD}|{_SHARD}{re.escape(dot)})")
        found = [p for p in there if shard.fullmatch(p.removesuffix(".safetensors"))]
        if found := [p for p in found if p.endswith(".safetensors")]:
            return found
    if any(p.startswith(stem) and not p.endswith((".safetensors", ".json")) for p in there):
        raise BackboneError(
            f"{stem} is only there as a pickle, which can run code",
            code="E_BACKBONE_REFUSED",
            hint="convert it with diffusers' save_pretrained(safe_serialization=True)",
        )
    what = f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"
    return [_require(there, what)]


def _first(there: set[str], folder: str, alternatives: tuple[tuple[str, ...], ...]) -> list[str]:
    for names in alternatives:
        paths = [f"{folder}/{name}" for name in names]
        if there.issuperset(paths):
            return paths
    return [_require(there, f"{folder}/{alternatives[0][0]}")]


def _require(there: set[str], path: str) -> str:
    if path not in there:
        raise BackboneError(
            f"{path} is missing",
            code="E_BACKBONE_MISSING",
            hint="point to a directory in diffusers' own layout",
        )
    return path

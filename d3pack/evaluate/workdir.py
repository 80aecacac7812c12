"""Finished students on disk, so that none is trained twice."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from d3pack.evaluate.presets import Preset
from d3pack.evaluate.training import History

FORMAT = 1  # raised when a change of the code makes older students incomparable


def write_json(path: Path, value: Any) -> None:
    """Written whole or not at all."""
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(part, path)


class Workdir:
    """A directory with one JSON file for every finished student."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)

    def place(self, arm: str, identity: Mapping[str, Any], seed: int) -> Path:
        """Where the student of this arm and seed is kept."""
        text = json.dumps({"format": FORMAT, **identity}, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        return self.path / f"{arm}-{digest}-seed{seed}.json"

    def load(self, place: Path) -> tuple[History, dict[str, Any]] | None:
        """A finished student and what was noted about its training set."""
        try:
            data = json.loads(place.read_text(encoding="utf-8"))
            return History.from_json(data["history"]), data["set"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def save(self, place: Path, history: History, about: Mapping[str, Any]) -> None:
        write_json(place, {"history": history.to_json(), "set": dict(about)})


def protocol(preset: Preset, student: str, updates: int | None, test: str) -> dict[str, Any]:
    """Everything beside the training set that decides about a student's accuracy."""
    operations = [repr(op) for op in (*preset.pixel_ops, *preset.batch_ops, preset.mix)]
    plain = {k: v for k, v in asdict(preset).items() if k not in {"pixel_ops", "batch_ops", "mix"}}
    return {
        "preset": json.loads(json.dumps(plain, default=str)),
        "operations": operations,
        "student": student,
        "updates": updates,
        "test": test,
    }

"""What the encode tests share: a small source of coloured pictures, and quick settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cli import invoke
from PIL import Image

from d3pack.encode import EncodeSettings, method_settings
from d3pack.errors import D3MError

CLASSES = ("goldfish", "lemon", "school bus")
SHORT = [
    "--ipc", "3", "--steps", "4", "--cool", "2", "--batch", "6", "--teacher-samples", "200",
    "--sampler-steps", "2", "--group", "3",
]  # fmt: skip


def picture(c: int, i: int, side: int = 16) -> Image.Image:
    """Class c has its own colour and stripe width; images differ by noise and phase."""
    rng = np.random.default_rng(1000 * c + i)
    stripes = ((np.arange(side) + rng.integers(side)) // (1 + c)) % 2
    base = np.zeros((side, side, 3)) + 40
    base[..., c % 3] = 200
    base += 30 * stripes[:, None, None] + rng.normal(0, 12, (side, side, 3))
    return Image.fromarray(np.clip(base, 0, 255).astype(np.uint8))


def make_tree(root: Path, count: int = 20, classes: tuple[str, ...] = CLASSES) -> Path:
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            picture(c, i).save(root / name / f"{i:03d}.png")
    return root


def settings_of(**values: Any) -> EncodeSettings:
    """Return settings from names and values, those of the method among the shared ones."""
    kind = method_settings(values.get("method", "d3m"))
    names = {field.name for field in fields(kind)}
    own = kind(**{name: value for name, value in values.items() if name in names})
    shared = {name: value for name, value in values.items() if name not in names}
    return EncodeSettings(**shared, method_settings=own)


def changed(settings: EncodeSettings, **values: Any) -> EncodeSettings:
    """Return settings with other values of the method's own."""
    return replace(settings, method_settings=replace(settings.method_settings, **values))


def quick(backbone: Path | str, **changes: Any) -> EncodeSettings:
    """Return settings under which every stage is real and short."""
    values: dict[str, Any] = {
        "images_per_class": 4,
        "backbone": str(backbone) or None,
        "sampler_steps": 3,
        "group": 4,
        "candidates": 2,
        "labels": "top2",
        "teacher_samples": 400,
    }
    piloted = "budget" in changes and not changes.get("no_codes")
    if changes.get("codes") or piloted or changes.get("method") in ("codes", "modes"):
        values["code_tried"] = 1
    if changes.get("method", "d3m") == "d3m":
        values |= {
            "modes": 2,
            "steps": 8,
            "cool": 4,
            "validate_every": 4,
            "batch": 12,
            "slots": 3,
            "triples": 4,
        }
    return settings_of(**{**values, **changes})


def call(*args: Any) -> Any:
    return invoke("encode", *args)


def fails(*args: Any) -> D3MError:
    found = call(*args).exception
    assert isinstance(found, D3MError), found
    assert "\n" not in str(found)
    return found


def save_classifier(path: Path, labels: Sequence[str]) -> Path:
    """A small ResNet as transformers saves it, with how it wants its images."""
    from transformers import ResNetConfig, ResNetForImageClassification

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ResNetForImageClassification(
            ResNetConfig(
                embedding_size=8,
                hidden_sizes=[8, 16],
                depths=[1, 1],
                layer_type="basic",
                id2label=dict(enumerate(labels)),
                label2id={label: i for i, label in enumerate(labels)},
            )
        ).eval()
    model.save_pretrained(path)
    settings = {
        "size": {"height": 24, "width": 24},
        "image_mean": [0.4] * 3,
        "image_std": [0.2] * 3,
    }
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    return path

"""The Teacher protocol, and any `transformers` image classifier as one."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from d3pack.errors import D3MError, UsageError
from d3pack.sources import read_table, tidy

_IMAGENET = (124, 116, 104)  # its mean colour
_MOST_SIDE = 2048  # pixels that a classifier may ask for
_REPO = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)


class TeacherError(D3MError):
    """The teacher is missing, refused, or has other classes."""

    code = "E_TEACHER"


class Teacher(Protocol):
    """A classifier of uint8 images of any size, by the classes of the source."""

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def record(self) -> Mapping[str, Any]:
        """For provenance: kind, name, bytes, sha256, figures."""
        ...

    def logits(self, images: Tensor) -> Tensor:
        """(N, 3, h, w) uint8 -> (N, classes) float32."""
        ...

    def features(self, images: Tensor) -> Tensor:
        """(N, 3, h, w) uint8 -> (N, F) float32, for comparing images."""
        ...


def zero_of(teacher: Teacher) -> tuple[int, int, int]:
    """Return the colour that a teacher sees as zeros: its `zero`, or else ImageNet's mean."""
    red, green, blue = getattr(teacher, "zero", _IMAGENET)
    return red, green, blue


def fit(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize uint8 images to `size`, as float32 in [0, 1]."""
    values = images.float() / 255
    if tuple(values.shape[-2:]) == size:
        return values
    return functional.interpolate(
        values, size=size, mode="bilinear", antialias=True, align_corners=False
    ).clamp(0, 1)


def match_labels(
    classes: Sequence[str], labels: Sequence[str], table: Mapping[str, str] | None = None
) -> list[int]:
    """Return for each class the index of the teacher's label with the same name.

    A label such as "tench, Tinca tinca" has several names.

    Args:
        table: labels of classes whose names the teacher does not know.

    Raises:
        TeacherError: a class has no label or several, or two classes have the same.
    """
    places: dict[str, set[int]] = {}
    for place, label in enumerate(labels):
        for name in (label, *label.split(",")):
            places.setdefault(tidy(name).casefold(), set()).add(place)
    indices: list[int] = []
    missing: list[str] = []
    double: list[str] = []
    for name in classes:
        label = table.get(name, name) if table else name
        matches = places.get(tidy(label).casefold(), set())
        if len(matches) == 1:
            indices += matches
        else:
            (double if matches else missing).append(name)
    if missing or double:
        problem = missing or double
        raise TeacherError(
            f"the teacher has {'no label' if missing else 'several labels'} for "
            f"{len(problem)} of {len(classes)} classes, first {problem[0]!r}",
            hint="map them with teacher_map (class to label), or train a teacher",
        )
    if len(set(indices)) < len(indices):
        raise TeacherError(
            "two classes have the same label of the teacher", hint="correct teacher_map"
        )
    return indices


def check_teacher(
    name: str, classes: Sequence[str] = (), table: Mapping[str, str] | None = None
) -> None:
    """Refuse what cannot be a teacher, as far as it shows without a request and without loading.

    Args:
        name: of the teacher.
        classes: those of the source.
        table: see `match_labels`.

    Raises:
        TeacherError: it is neither a directory nor a repository's name, or lacks files or labels.
    """
    if Path(name).is_dir():
        _weights(Path(name), name)
        _match(Path(name), classes, table)
    elif name.startswith(".") or not _REPO.fullmatch(name):
        raise TeacherError(f"no teacher directory {name}", hint="give a directory or org/name")
    else:
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            _weights(_snapshot(name), name)
            _match(_snapshot(name), classes, table)


def _match(path: Path, classes: Sequence[str], table: Mapping[str, str] | None) -> None:
    """Refuse a teacher whose config names labels, but not those of the classes."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        labels = [str(label) for label in config["id2label"].values()]
    # what is wrong with a model is said when it is loaded
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return
    match_labels(classes, labels, table)


def _weights(path: Path, name: str) -> list[Path]:
    """Return the files of weights in a teacher's directory."""
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        raise TeacherError(
            f"{name} holds no safetensors weights",
            hint="pickled weights are never loaded: convert them with save_pretrained",
        )
    if not (path / "config.json").is_file():
        raise TeacherError(
            f"{name} holds no config.json", hint="give what save_pretrained has written"
        )
    return weights


def _snapshot(name: str) -> Path:
    """Return the directory of a repository in the Hub's cache, fetched unless offline."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json"]))
    # the Hub client raises errors of its own and of the network
    except Exception as error:
        raise TeacherError(f"cannot fetch the teacher {name}: {_line(error)}") from error


class TransformersTeacher:
    """A `transformers` image classifier stored as safetensors."""

    def __init__(
        self, name: str, classes: Sequence[str], *, table: str | None = None, device: str = "cpu"
    ) -> None:
        from transformers import AutoModelForImageClassification

        check_teacher(name)
        path = Path(name) if Path(name).is_dir() else _snapshot(name)
        weights = _weights(path, name)
        try:
            model = AutoModelForImageClassification.from_pretrained(
                path, use_safetensors=True, local_files_only=True, trust_remote_code=False
            )
        # transformers, safetensors and torch each raise other errors for a damaged model
        except Exception as error:
            raise TeacherError(f"{path.name} is not an image classifier: {_line(error)}") from error
        self._model = model.eval().requires_grad_(False).to(device)
        labels = [str(model.config.id2label[i]) for i in range(model.config.num_labels)]
        self.classes = tuple(classes)
        mapping = None if table is None else read_table(Path(table))
        self._columns = torch.tensor(match_labels(classes, labels, mapping), device=device)
        self._size, self._mean, self._std = _preprocessing(path, model.config)
        self.zero = tuple(int(v) for v in (255 * self._mean).round().clamp(0, 255).flatten())
        digest = hashlib.sha256()
        for file in weights:
            digest.update(file.read_bytes())
        self.record: Mapping[str, Any] = {
            "kind": "transformers",
            "name": name if "/" in name and not Path(name).exists() else model.config.model_type,
            "bytes": sum(file.stat().st_size for file in weights),
            "sha256": digest.hexdigest()[:32],  # 128 bits: every byte of a pack counts
        }

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        device = self._columns.device
        values = fit(images.to(device), self._size)
        values = (values - self._mean.to(device)) / self._std.to(device)
        out: Tensor = self._model(pixel_values=values).logits
        return out.float()[:, self._columns].cpu()

    def features(self, images: Tensor) -> Tensor:
        """Return the logits, which every classifier has."""
        return self.logits(images)


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _preprocessing(path: Path, config: Any) -> tuple[tuple[int, int], Tensor, Tensor]:
    """Return size, mean and deviation from the files of the model, or ImageNet's.

    Raises:
        TeacherError: they are none that a classifier has.
    """
    name = "preprocessor_config.json"
    try:
        file = path / name
        settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        height, width = _size_of(settings, config)
        mean = settings.get("image_mean", [0.485, 0.456, 0.406])
        std = settings.get("image_std", [0.229, 0.224, 0.225])
        if settings.get("do_normalize") is False:
            mean, std = [0.0] * 3, [1.0] * 3
        mean, std = (
            torch.tensor(value, dtype=torch.float32).reshape(1, 3, 1, 1) for value in (mean, std)
        )
    # a stranger's file: any value may be of any type
    except (ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise TeacherError(
            f"{name} does not say how images are prepared: {_line(error)}"
        ) from error
    if not 1 <= min(height, width) <= max(height, width) <= _MOST_SIDE:
        raise TeacherError(f"{name} asks for images of {height} x {width} pixels")
    if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
        raise TeacherError(f"{name} has a mean or deviation that no images have")
    return (height, width), mean, std


def _size_of(settings: dict[str, Any], config: Any) -> tuple[int, int]:
    """Return height and width of the images that a classifier takes."""
    size = settings.get("crop_size") or settings.get("size")
    if size in (None, {}, []):
        size = getattr(config, "image_size", 224)
    if isinstance(size, Mapping):
        edge = size.get("shortest_edge", 224)
        height, width = size.get("height", edge), size.get("width", edge)
    elif isinstance(size, int):
        height = width = size
    else:
        height, width = list(size or (224, 224))
    return int(height), int(width)


def batched(teacher: Teacher, images: Tensor, batch: int = 128) -> tuple[Tensor, Tensor]:
    """Return logits and unit features of many images."""
    if len(images) == 0:
        raise UsageError("no images to classify")
    logits = [teacher.logits(part) for part in torch.split(images, batch)]
    features = torch.cat([teacher.features(part) for part in torch.split(images, batch)])
    return torch.cat(logits), functional.normalize(features - features.mean(0), dim=1)

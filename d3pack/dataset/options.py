"""What D3MDataset is called with: the pack, the device, and choices that contradict each other."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path

import torch

from d3pack.dataset.choice import CACHES, Cache
from d3pack.dataset.transforms import OUTPUTS
from d3pack.decode import modes
from d3pack.errors import NotFoundError, UsageError
from d3pack.format.pack import Pack


def opened(
    pack: str | PathLike[str] | Pack, classes: Sequence[str | int] | None
) -> tuple[Pack, Sequence[str | int] | None]:
    """The pack, and the classes still to be chosen from it."""
    if isinstance(classes, str):  # else each of its letters would be one
        raise UsageError(f"classes={classes!r} is one name", hint=f"write [{classes!r}]")
    if isinstance(pack, Pack):
        return pack, classes
    from d3pack.hub import is_address, load, read_classes

    if classes is not None and is_address(pack):
        return read_classes(pack, classes), None
    return load(pack), classes


def usable(device: str | torch.device | None) -> torch.device:
    """The device asked for, or the best one here; refused when it is not here."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return modes.usable(device)


def check_choices(
    *,
    device: torch.device,
    mode: str,
    backbone: object,
    output: str,
    batched: bool,
    soft_labels: bool,
    cache: Cache,
    fresh: bool,
    taught: bool,
) -> None:
    """Refuse what cannot be meant."""
    if mode not in ("exact", "fast"):
        raise UsageError(f"mode={mode!r}", hint="exact or fast")
    if isinstance(backbone, str | PathLike) and not Path(backbone).is_dir():
        raise NotFoundError(
            f"there is no backbone directory {fspath(backbone)}", hint="name the folder of one"
        )
    if output not in OUTPUTS:
        raise UsageError(f"output={output!r}", hint=f"one of {', '.join(OUTPUTS)}")
    if cache not in CACHES:
        raise UsageError(f"cache={cache!r}", hint="one of auto, gpu, cpu, disk, None")
    if cache == "gpu" and device.type == "cpu":
        raise UsageError("cache='gpu' with device='cpu'", hint="use cache='cpu' or 'disk'")
    if output == "pil" and batched:
        raise UsageError("batch_transform gets tensors, never PIL", hint="use transform=")
    if fresh and cache not in ("auto", None):
        raise UsageError(
            f"fresh=True with cache={cache!r}: fresh images are used once",
            hint="use cache=None",
        )
    if soft_labels and taught:
        raise UsageError("soft_labels=True and teacher= both make the labels", hint="choose one")
    if soft_labels and fresh:
        raise UsageError(
            "the pack's soft labels are of its own images, not of fresh ones",
            hint="give teacher=, or train on hard labels",
        )

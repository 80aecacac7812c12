"""`d3pack train`: photographs to a text-to-image backbone of one's own."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d3pack.cli import _out
from d3pack.cli._fields import Format, format_option, source_argument
from d3pack.system import REQUIRED, Listener, json_lines, nested, option
from d3pack.train import TrainSettings


@dataclass(frozen=True, slots=True)
class Train:
    """Train an autoencoder, a text encoder and a denoiser; write them in diffusers' layout.

    An interrupted run goes on when the same command is given again. On several GPUs, the same
    command behind `torchrun --nproc-per-node N -m` (or `accelerate launch -m`).

    Example: d3pack train photos/ -o backbone --time-budget 90m
    """

    source: str = source_argument()
    output: Path = option(REQUIRED, "Directory of the backbone; a run goes on there.", short="-o")
    settings: TrainSettings = nested(TrainSettings)
    format: Format = format_option("How progress is printed; json: events as lines.")

    def run(self) -> None:
        """Train, or go on training, and say where the backbone is."""
        from d3pack.train import train_backbone

        reports: dict[str, Listener] = {"human": _tell, "json": json_lines(sys.stdout)}
        report = reports.get(self.format, lambda event: None)
        _out.if_interrupted(f"run the same command again and it goes on ({self.output}/training)")
        folder = train_backbone(self.source, self.output, self.settings, report=report)
        if folder is not None and self.format == "human" and os.environ.get("RANK", "0") == "0":
            _out.show(f"{folder}: a backbone in diffusers' layout; use it as --backbone {folder}")


def _tell(event: dict[str, Any]) -> None:
    parts = [f"{event['stage']:<12}{event['step']:>8,}"]
    if "samples_per_s" in event:
        parts.append(f"{event['samples_per_s']:7.1f}/s")
    parts += [
        f"{key} {value:.4f}"
        for key, value in event.items()
        if isinstance(value, float) and key not in {"samples_per_s", "seconds", "progress", "left"}
    ]
    if "left" in event:
        parts.append(f"{event['left'] / 60:.0f} min left")
    _out.say("  ".join(parts))

"""`d3pack train`: photographs to a text-to-image backbone of one's own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from d3pack.cli import _out
from d3pack.errors import UsageError
from d3pack.system.text import parse_duration


def register(app: typer.Typer) -> None:
    """Add this family's verbs."""
    app.command("train")(train)


def train(
    source: Annotated[
        str,
        typer.Argument(
            help="Class-folder tree, tar, zip, WebDataset shards, parquet, hf://datasets/..."
        ),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Directory of the backbone; a run goes on there.")
    ],
    preset: Annotated[str, typer.Option(help="mini, mini-gpu, or tiny for a trial.")] = "mini",
    time_budget: Annotated[
        str | None,
        typer.Option(help="Time for all stages asked for, as 90m: learning rates fall by its end."),
    ] = None,
    stage: Annotated[
        list[str] | None,
        typer.Option(help="Only these: autoencoder, text, diffusion. May be given again."),
    ] = None,
    init_from: Annotated[
        str | None,
        typer.Option(help="Start from a backbone (a directory, or mini); trains its denoiser on."),
    ] = None,
    sentence_encoder: Annotated[
        Path | None,
        typer.Option(help="Directory of a sentence encoder: teaches where words lie."),
    ] = None,
    words: Annotated[
        Path | None,
        typer.Option(help="File of nouns, one a line, to learn beside the class names."),
    ] = None,
    licence: Annotated[
        str, typer.Option(help="Licence of the weights, as your photographs allow.")
    ] = "unknown",
    device: Annotated[str, typer.Option(help="cpu, or leave it to accelerate.")] = "",
    seed: Annotated[int, typer.Option(help="Decides about everything random.")] = 0,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the models first (minutes on a CPU).")
    ] = False,
    form: Annotated[
        _out.Format, typer.Option("--format", help="human, json (events as lines) or quiet.")
    ] = "human",
) -> None:
    """Train an autoencoder, a text encoder and a denoiser; write them in diffusers' layout.

    An interrupted run goes on when the same command is given again. On several GPUs, the same
    command behind `torchrun --nproc-per-node N -m` (or `accelerate launch -m`).

    Example: d3pack train photos/ -o backbone --time-budget 90m
    """
    from d3pack.train import PRESETS, STAGES, TrainSettings, train_backbone

    if preset not in PRESETS:
        raise UsageError(f"no preset {preset!r}", hint=f"presets: {', '.join(PRESETS)}")
    unknown = set(stage or ()) - set(STAGES)
    if unknown:
        raise UsageError(f"no stage {sorted(unknown)[0]!r}", hint=f"stages: {', '.join(STAGES)}")
    settings = TrainSettings(
        preset=preset,  # type: ignore[arg-type]
        time_budget=None if time_budget is None else parse_duration(time_budget),
        device=device or None,
        stages=tuple(stage or ()),  # type: ignore[arg-type]
        sentence_encoder=sentence_encoder,
        words=words,
        init_from=init_from,
        licence=licence,
        compile=compiled,
        seed=seed,
    )
    tell = {"human": _tell, "json": _event, "quiet": lambda event: None}[form]
    _out.if_interrupted(f"run the same command again and it goes on ({output}/training)")
    made = train_backbone(source, output, settings, report=tell)
    if made is not None and form == "human" and os.environ.get("RANK", "0") == "0":
        print(f"{output}: a backbone in diffusers' layout; use it as --backbone {output}")


def _event(event: dict[str, Any]) -> None:
    import json

    print(json.dumps(event, sort_keys=True), flush=True)


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

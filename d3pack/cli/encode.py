"""`d3pack encode`: real images to a pack."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from d3pack.cli import _out
from d3pack.errors import UsageError
from d3pack.system.text import count, duration, parse_duration

OnError = Literal["skip", "fail"]
Sampler = Literal["ddim", "dpmpp-2m", "euler", "lcm"]
Codec = Literal["f16", "i8", "i4", "pq"]


def register(app: typer.Typer) -> None:
    """Add this family's verbs."""
    app.command("encode")(encode)


def encode(
    source: Annotated[
        str,
        typer.Argument(
            help="Class-folder tree, tar, zip, WebDataset shards, parquet, hf://datasets/..."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The pack to write (.d3m)."),
    ] = None,
    ipc: Annotated[int, typer.Option("--ipc", help="Images per class.")] = 10,
    budget: Annotated[
        str | None,
        typer.Option(help="Bytes of the pack, as 20KB: chooses the dials."),
    ] = None,
    modes: Annotated[
        int | None,
        typer.Option(help="Prompts per class, each for a cluster of its images."),
    ] = None,
    vectors: Annotated[int | None, typer.Option(help="Learned vectors per prompt.")] = None,
    codec: Annotated[Codec | None, typer.Option(help="How vectors are stored.")] = None,
    candidates: Annotated[
        int | None,
        typer.Option(help="Images made for each one kept; 1: derived seeds."),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(help="Soft labels: none, top1, top5, ..., dense."),
    ] = None,
    temperature: Annotated[float, typer.Option(help="Of the soft labels.")] = 1.0,
    probes: Annotated[
        int | None,
        typer.Option(help="Small reference images for verify --decode."),
    ] = None,
    backbone: Annotated[
        str,
        typer.Option(help="mini, a directory in diffusers' layout, or org/name."),
    ] = "",
    size: Annotated[int | None, typer.Option(help="Side of the images in pixels.")] = None,
    template: Annotated[
        str | None,
        typer.Option(help="Sentence around the vectors, with one {}."),
    ] = None,
    sampler: Annotated[Sampler | None, typer.Option(help="How noise becomes an image.")] = None,
    sampler_steps: Annotated[int | None, typer.Option(help="Steps of the sampler.")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Weight of the prompt; measured where a teacher picks.")
    ] = None,
    group: Annotated[
        int | None,
        typer.Option(help="Images of one forward; part of the recipe."),
    ] = None,
    class_names: Annotated[
        Path | None,
        typer.Option(help="CSV or JSON: folder to name."),
    ] = None,
    split: Annotated[str, typer.Option(help="Which split of the source.")] = "train",
    first_classes: Annotated[
        int | None, typer.Option(help="Only the first N classes: a trial.")
    ] = None,
    on_error: Annotated[
        OnError, typer.Option(help="Bad files: skip (and count) or fail.")
    ] = "skip",
    teacher: Annotated[
        str,
        typer.Option(help="train, a directory or org/name of a classifier."),
    ] = "train",
    teacher_map: Annotated[
        Path | None,
        typer.Option(help="CSV or JSON: class to the teacher's label."),
    ] = None,
    teacher_samples: Annotated[
        int, typer.Option(help="Length of the training of a small teacher.")
    ] = 250_000,
    factor: Annotated[int | None, typer.Option(help="Collages of 1, 2x2 or 4x4 patches.")] = None,
    crops: Annotated[int | None, typer.Option(help="Trial crops per image.")] = None,
    crop_scale: Annotated[
        tuple[float, float] | None,
        typer.Option(help="Share of an image's area in a crop: least, most."),
    ] = None,
    pool: Annotated[
        int | None, typer.Option(help="Real images per class that are looked at.")
    ] = None,
    collages: Annotated[int | None, typer.Option(help="Collages per class, at most.")] = None,
    lr: Annotated[
        float | None, typer.Option(help="Length of a step, in Newton's damped ones.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="At most, before cooling.")] = None,
    cool: Annotated[
        int | None, typer.Option(help="Last steps: falling rate, under the codec.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Samples per step, all classes.")] = None,
    slots: Annotated[int | None, typer.Option(help="Prompts fitted at the same time.")] = None,
    patience: Annotated[
        int | None, typer.Option(help="Judgements without gain before cooling.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="d3m, classcond, minimax, or one that a plugin brings.")
    ] = "d3m",
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting of the method, as epochs=8. May be given again."),
    ] = None,
    vae: Annotated[
        Path | None,
        typer.Option(help="classcond: directory of the autoencoder; else that of mini."),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="classcond: small, base, or tiny for a trial.")
    ] = None,
    time_budget: Annotated[
        str | None, typer.Option(help="classcond: time to train for, as 90m.")
    ] = None,
    decode_seconds: Annotated[
        float | None,
        typer.Option(help="classcond: all images of the pack must be made in this time here."),
    ] = None,
    embed_backbone: Annotated[
        bool,
        typer.Option("--embed-backbone", help="classcond: carry the backbone inside the pack."),
    ] = False,
    seed: Annotated[int, typer.Option(help="Decides about everything random.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "",
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print classes, plan, time and bytes; do nothing."),
    ] = False,
    restart: Annotated[
        bool,
        typer.Option("--restart", help="Throw away what an earlier run left."),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
    form: Annotated[
        _out.Format, typer.Option("--format", help="human, json (events as lines) or quiet.")
    ] = "human",
) -> None:
    """Learn a prompt for every class of a source of real images, and write a pack.

    An interrupted run goes on when the same command is given again, and ends with the same bytes.

    Example: d3pack encode imagenet/ --ipc 50 -o imnet.d3m
    """
    if output is None and not dry_run:
        raise UsageError("no output", hint="name one with -o out.d3m, or pass --dry-run")
    from d3pack.encode import EncodeSettings
    from d3pack.system import parse_size

    settings = EncodeSettings(
        images_per_class=ipc,
        budget=None if budget is None else parse_size(budget),
        method=method,
        backbone=backbone or None,
        device=device or None,
        seed=seed,
        codec=codec,
        candidates=candidates,
        labels=labels,
        label_temperature=temperature,
        probes=probes,
        size=None if size is None else (size, size),
        sampler=sampler,
        sampler_steps=sampler_steps,
        guidance=guidance,
        group=group,
        teacher=teacher,
        teacher_map=teacher_map,
        teacher_samples=teacher_samples,
        method_settings=_own(
            method,
            setting or (),
            modes=modes,
            vectors=vectors,
            template=template,
            factor=factor,
            crops=crops,
            crop_scale=crop_scale,
            pool=pool,
            collages=collages,
            lr=lr,
            steps=steps,
            cool=cool,
            batch=batch,
            slots=slots,
            patience=patience,
            vae=vae,
            model=preset,
            train_seconds=None if time_budget is None else parse_duration(time_budget),
            decode_seconds=decode_seconds,
            embed=embed_backbone or None,
        ),
    )
    from d3pack.sources import open_source

    opened = open_source(
        source,
        class_names=class_names,
        split=split,
        on_error=on_error,
        first=first_classes,
    )
    if dry_run:
        _dry(opened, settings, form)
    else:
        assert output is not None
        _encode(opened, settings, output, form, restart=restart, overwrite=overwrite)


def _own(method: str, pairs: Sequence[str], **flags: Any) -> Any:
    """The method's own settings: named flags, and whatever --set says."""
    from d3pack.encode import method_settings
    from d3pack.system import from_plain, options_of

    kind = method_settings(method)
    known = {entry.name: entry for entry in options_of(kind)}
    values = {name: value for name, value in flags.items() if value is not None}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not (name and equals):
            raise UsageError(f"--set {pair!r} is no setting", hint="write --set name=value")
        name = name.replace("-", "_")
        values[name] = known[name].read(text) if name in known else text
    return from_plain(kind, values)


def _dry(source: Any, options: Any, form: _out.Format) -> None:
    from d3pack.encode import estimate_encode

    found = estimate_encode(source, options)
    lines = found.pop("lines")
    if form == "json":
        _out.emit(found)
        return
    for name, images in zip(found["classes"][:20], found["counts"], strict=False):
        print(f"{images:8d}  {_out.printable(name)}")
    if len(found["classes"]) > 20:
        print(f"     ...  and {len(found['classes']) - 20} more classes")
    print("\n".join(map(_out.printable, lines)))
    parts = ", ".join(f"{name} {duration(value)}" for name, value in found["seconds"].items())
    print(f"about {duration(found['seconds_total'])} on this machine ({parts})")
    print(f"about {found['bytes']:,} bytes")


def _encode(
    source: Any, options: Any, output: Path, form: _out.Format, *, restart: bool, overwrite: bool
) -> None:
    from contextlib import AbstractContextManager, nullcontext

    from d3pack.encode import encode
    from d3pack.system.events import Listener, json_lines
    from d3pack.system.live import live_view

    view: AbstractContextManager[Listener] = nullcontext(lambda event: None)
    if form != "quiet":
        view = live_view() if form == "human" else nullcontext(json_lines(sys.stdout))
    _out.if_interrupted(f"run the same command again and it goes on ({output.name}.work)")
    with view as listener:
        pack = encode(
            source, output, options, listeners=[listener], restart=restart, overwrite=overwrite
        )
    if form == "human":
        bad = len(source.skipped)
        size, classes = output.stat().st_size, len(pack.classes)
        print(f"{output}: {size:,} bytes, {len(pack):,} images of {classes:,} classes")
        if bad:
            _out.say(f"skipped {count(bad, 'file')}: {output.name}.work/skipped.txt names them")

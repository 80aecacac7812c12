"""From real images to a pack: a method, its journal, its events, and one whole write at the end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from d3pack.encode import skipped
from d3pack.encode.method import BACKBONE, Method, Plan, Run, methods, open_method
from d3pack.encode.options import EncodeOptions
from d3pack.errors import InvalidPackError, UsageError
from d3pack.format import read, write
from d3pack.format.pack import Pack
from d3pack.sources import Source
from d3pack.system.events import Events, Listener, log_file
from d3pack.system.files import full_disk_named
from d3pack.system.journal import Journal

# what nobody needs any more when the pack is written
_PASSING = ("classes", "candidates", "labels", "teacher", "training", "tuning", BACKBONE)

__all__ = [
    "EncodeOptions",
    "Method",
    "Plan",
    "Run",
    "dry_run",
    "encode",
    "methods",
    "open_method",
]


def _device(options: EncodeOptions) -> str:
    import torch

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not device.startswith("cpu"):
        # cuBLAS's own condition for equal sums; it looks once, before the first product
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return device


def dry_run(source: Source, options: EncodeOptions) -> dict[str, Any]:
    """The plan, and what it will cost here."""
    method = open_method(options.method)
    plan = method.plan(source, options, _device(options))
    return {
        "classes": list(source.classes),
        "counts": list(source.counts),
        "plan": dict(plan.to_json()),
        "lines": plan.lines(),
        **method.estimate(source, plan, options),
    }


@full_disk_named()
def encode(
    source: Source,
    options: EncodeOptions,
    output: str | Path,
    *,
    listeners: Sequence[Listener] = (),
    restart: bool = False,
    overwrite: bool = False,
    cache: Path | None = None,
) -> Pack:
    """Make a pack of a source and write it to `output`.

    All work is kept in `<output>.work`: after an interruption the same call goes on, and the file
    it ends with is byte for byte the one that an undisturbed run writes.
    """
    from d3pack.backbones import cache_home
    from d3pack.decode import backbone_path

    output = Path(output)
    if output.suffix != ".d3m":
        raise UsageError(f"the output {output.name} must end in .d3m")
    if not output.parent.is_dir():
        raise UsageError(f"there is no folder {output.parent.name} for the output")
    if os.path.isdir(output):
        raise UsageError(f"the output {output.name} is a folder", hint="name another")
    device = _device(options)
    method = open_method(options.method)
    plan = method.plan(source, options, device)
    work = output.with_name(output.name + ".work")
    events = Events(list(listeners))
    events.emit("plan", lines=plan.lines())
    with events.stage("look through the source", len(source.classes), "classes"):
        source.fingerprint(events.step)
    journal = Journal(
        work, _key(source, options, plan), restart=restart, start_over="pass --restart"
    )
    try:
        if (done := _finished(journal, output)) is not None:
            _tidy(journal)
            return done
        made, beside = journal.folder / BACKBONE, backbone_path(output)
        for there in (output, beside):
            # a run that was killed at its very end has put its own backbone there already
            if there.exists() and not overwrite and not _same(made, there):
                raise UsageError(f"{there.name} exists", hint="name another, or pass --overwrite")
        log = log_file(work / "log.txt")
        log({"event": "plan", "lines": plan.lines()})
        events.listeners.append(log)
        if journal.begun:
            events.note("going on where the last run stopped")
            skipped.recall(journal, source)
        run = Run(
            source, options, plan, journal, events, device, cache or cache_home() / "teachers"
        )
        with _repeatable(device):
            pack = method.encode(run)
        _list_skipped(source, work)
        if made.exists():
            _put_beside(made, beside)
        journal.record("root", pack.root)  # first: a file of that root is ours, and whole
        write(pack, output)
        _tidy(journal)
        events.emit("done", root=pack.root, bytes=output.stat().st_size)
        return pack
    finally:
        journal.close()


@contextmanager
def _repeatable(device: str) -> Iterator[None]:
    """On an accelerator: only kernels that give the same sums twice, as a processor does anyway."""
    if device.startswith("cpu"):
        yield
        return
    import torch

    from d3pack.decode import reproducible_cuda

    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with reproducible_cuda():
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)


def _key(source: Source, options: EncodeOptions, plan: Plan) -> Mapping[str, Any]:
    """What must stay the same for a run to go on."""
    chosen = asdict(options)
    planned = {f"plan {name}": value for name, value in plan.to_json().items()}
    return {"source": source.fingerprint(), **chosen, **planned}


def _finished(journal: Journal, output: Path) -> Pack | None:
    """The pack that this very work has already led to."""
    if "root" not in journal or not output.exists():
        return None
    try:
        pack = read(output)
    except InvalidPackError:
        return None  # what lay there before
    return pack if pack.root == journal["root"] else None


def _tidy(journal: Journal) -> None:
    for folder in _PASSING:
        journal.drop(folder)


def _same(made: Path, there: Path) -> bool:
    locks = [folder / "lock.json" for folder in (made, there)]
    return all(lock.is_file() for lock in locks) and len({k.read_bytes() for k in locks}) == 1


def _put_beside(made: Path, beside: Path) -> None:
    """A copy, whole or not at all: the journal keeps the original until all is done."""
    trial = beside.with_name(beside.name + ".part")
    shutil.rmtree(trial, ignore_errors=True)
    shutil.copytree(made, trial)
    shutil.rmtree(beside, ignore_errors=True)
    os.replace(trial, beside)


def _list_skipped(source: Source, work: Path) -> None:
    """Names of the files that were left out: for the person, not for the pack."""
    lines = [f"{skip.class_name}\t{skip.key}\t{skip.reason}\n" for skip in source.skipped]
    (work / "skipped.txt").write_text("".join(lines), encoding="utf-8", errors="backslashreplace")

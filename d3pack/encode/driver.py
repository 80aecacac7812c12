"""`encode`: prepare a job, run it in a work directory, and write the pack of its draft."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from d3pack.decode import backbone_path, reproducible_cuda
from d3pack.encode.contract import (
    EncodeContext,
    EncodeRun,
    Job,
    Method,
    ShardFinishedError,
    open_method,
    own_settings,
)
from d3pack.encode.finish import finish
from d3pack.encode.parts import (
    Part,
    count_of,
    open_parts,
    part_of,
    read_calls,
    record_call,
    remove_parts,
)
from d3pack.encode.plan import EncodePlan
from d3pack.encode.settings import EncodeSettings, check_used
from d3pack.encode.teaching import check_named_teacher
from d3pack.errors import D3MError, InvalidPackError, NotFoundError, UsageError
from d3pack.format import Pack, read, write
from d3pack.hub import load
from d3pack.sources import Source, open_source
from d3pack.system import (
    Events,
    Journal,
    Listener,
    ObjectPath,
    Shard,
    Workers,
    all_plain,
    digest,
    disk_full_as_error,
    log_file,
    place,
    replace_folder,
    resolve_device,
    run_work,
    write_text,
)
from d3pack.teachers import teacher_cache

# folders of the journal that are not needed when the pack is written
_TEMPORARY = (
    "classes",
    "candidates",
    "codes",
    "groups",
    "labels",
    "modes",
    "sets",
    "teacher",
    "training",
    "tuning",
)
_ROOT = "root"  # in the journal: identity of the pack that the run has led to
_BACKBONE = "backbone"  # in the journal: digest of the lock of a trained backbone


def estimate_encode(
    source: Source | str | Path,
    settings: EncodeSettings | None = None,
    *,
    method: Method | None = None,
) -> dict[str, Any]:
    """Return what `encode` would do and what it would cost here, without doing it.

    Args:
        source: as for `encode`.
        settings: as for `encode`.
        method: as for `encode`.

    Returns:
        `classes`, `counts` of their images, the `plan` as JSON, its `lines` for a person, the
        `bytes` of the pack, `seconds` by stage and `seconds_total` on this machine.
    """
    source, settings = _opened(source), settings or EncodeSettings()
    job = _prepare(method or open_method(settings.method), source, settings, None)[0]
    plan, estimate = job.describe(), job.estimate()
    return {
        "classes": list(source.classes),
        "counts": list(source.counts),
        "plan": plan.to_json(),
        "lines": plan.lines(),
        "bytes": estimate.nbytes,
        "seconds": {name: round(value, 3) for name, value in estimate.seconds.items()},
        "seconds_total": round(sum(estimate.seconds.values()), 3),
    }


@disk_full_as_error()
def encode(
    source: Source | str | Path,
    output: str | Path | ObjectPath,
    settings: EncodeSettings | None = None,
    *,
    method: Method | None = None,
    listeners: Sequence[Listener] = (),
    restart: bool = False,
    overwrite: bool = False,
    estimate: bool = False,
    teachers: Path | None = None,
    workers: Workers | None = None,
) -> Pack:
    """Make a pack of real images and write it.

    All work is kept in `<output>.work`, where the output is. After an interruption the same call
    goes on, and the file it ends with is byte for byte the one that an undisturbed run writes.

    Args:
        source: real images with class names: a directory of classes, an archive, shards, parquet,
            `hf://datasets/...`, or a `Source` from `open_source`.
        output: the file to write, or an address such as `s3://bucket/x.d3m`; its name ends in
            `.d3m`.
        settings: what the pack should be; by default ten images per class by `d3m`.
        method: an object to use in place of the method that the settings name.
        listeners: functions that receive the events of the run, such as those of `live_view`.
        restart: discard what an earlier run left in the work directory.
        overwrite: replace an output that exists.
        estimate: measure first what each part will take, and tell the listeners.
        teachers: directory of trained teachers; by default one in the cache that all runs share.
        workers: do the work in shards, on several devices or machines. Parts are kept as by
            `encode_shard`, in `<output>.parts`, which all machines have to see.

    Returns:
        The pack that was written.

    Raises:
        UsageError: if settings contradict each other, or differ from those of the run to go on.
        NotFoundError: if the source or the directory of the output does not exist.
        SourceError: if the real images cannot be used.
        BackboneError: if the backbone cannot be used.
        NoSpaceError: if the disk is full; the same call goes on once there is room.

    Example:
        >>> from d3pack.encode import EncodeSettings, encode
        >>> settings = EncodeSettings(images_per_class=50, labels="top3")
        >>> pack = encode("photos/", "photos.d3m", settings)  # doctest: +SKIP
    """
    output = check_output(output)
    check_unused(output, overwrite=overwrite, restart=restart)
    if settings is not None:
        check_used(settings, settings.method if method is None else method.name)
    work = _beside(output, ".work")
    if workers is not None and workers.wanted:
        opened = _opened(source)
        if restart:
            remove_parts(_beside(output, ".parts"))
        shared = _Shared(opened.address(), output, settings, method, teachers, restart, overwrite)
        pack: Pack = run_work(
            shared,
            workers,
            listeners,
            device=settings.device if settings else None,
            shards=count_of(shared.parts),
            most=len(opened.classes),
        )
        return pack
    whole = _Encoding(_opened(source), settings, method, teachers, listeners)
    return whole.write(work, output, restart=restart, overwrite=overwrite, estimate=estimate)


@disk_full_as_error()
def encode_shard(
    source: Source | str | Path,
    output: str | Path | ObjectPath,
    shard: Shard,
    settings: EncodeSettings | None = None,
    *,
    method: Method | None = None,
    listeners: Sequence[Listener] = (),
    restart: bool = False,
    wait: bool = False,
    teachers: Path | None = None,
) -> Path | ObjectPath:
    """Do one share of an encoding; `merge` makes the pack when all are done.

    Each shard keeps what it has done in a part, the directory `<output>.parts/NUMBER-of-COUNT`, and
    reads what it needs of other shards from theirs. So the shards run at the same time where they
    share storage, such as the object store of the output, or one after another, each as often as it
    takes.

    Args:
        source: as for `encode`, the same images for all shards.
        output: the file that `merge` is to write.
        shard: which share; what a share has to do does not depend on how many there are.
        settings: as for `encode`, the same for all shards.
        method: as for `encode`.
        listeners: as for `encode`.
        restart: discard what an earlier run of this shard left.
        wait: wait for other shards where their results are needed.
        teachers: as for `encode`.

    Returns:
        The part, which is complete.

    Raises:
        WaitingError: results of other shards are needed first; the same call goes on later.
        UsageError: another part was made with other settings.

    Example:
        >>> from d3pack.system import Shard
        >>> encode_shard("photos/", "photos.d3m", Shard(3, 8), wait=True)  # doctest: +SKIP
    """
    output = check_output(output)
    encoding = _Encoding(_opened(source), settings, method, teachers, listeners)
    return encoding.do_share(_beside(output, ".parts"), shard, restart=restart, wait=wait)


@disk_full_as_error()
def merge(
    parts: Sequence[str | Path | ObjectPath],
    output: str | Path | ObjectPath,
    source: Source | str | Path | None = None,
    *,
    method: Method | None = None,
    listeners: Sequence[Listener] = (),
    overwrite: bool = False,
    teachers: Path | None = None,
) -> Pack:
    """Write the pack of an encoding from the parts of all of its shards.

    Args:
        parts: directories that `encode_shard` made, of all shards of one encoding, or the one in
            which they lie.
        output: the file to write.
        source: the real images, if they are no longer where the shards found them.
        method: as for `encode`.
        listeners: as for `encode`.
        overwrite: replace an output that exists.
        teachers: as for `encode`.

    Returns:
        The pack: byte for byte that of `encode` on the same kind of machine.

    Raises:
        NotFoundError: a part does not exist.
        UsageError: parts are missing, or belong to different encodings.
        WaitingError: a shard has not finished.
    """
    output = check_output(output)
    folders = open_parts(parts)
    call, count = read_calls(folders)
    if source is None:
        source = call.open()
    work = _beside(output, ".work")
    encoding = _Encoding(_opened(source), call.settings, method, teachers, listeners)
    return encoding.write(work, output, overwrite=overwrite, parts=folders, shards=count)


class _Encoding:
    """One encoding: a job and what it needs to run."""

    def __init__(
        self,
        source: Source,
        settings: EncodeSettings | None,
        method: Method | None,
        teachers: Path | None,
        listeners: Sequence[Listener],
    ) -> None:
        self.source, self.settings = source, settings or EncodeSettings()
        self.method = method or open_method(self.settings.method)
        self.job, self.context = _prepare(self.method, source, self.settings, teachers)
        self.plan, self.events = self.job.describe(), Events(list(listeners))
        self.events.emit("plan", lines=self.plan.lines())
        with self.events.stage("look through the source", len(source.classes), "classes"):
            source.fingerprint(self.events.step)
        own = own_settings(self.method, self.settings)
        self.key = _journal_key(source, self.settings, own, self.plan)

    def write(
        self,
        work: Part,
        output: Path | ObjectPath,
        *,
        restart: bool = False,
        overwrite: bool = False,
        estimate: bool = False,
        parts: Sequence[Part] = (),
        shards: int = 1,
    ) -> Pack:
        """Run the job, or put together what shards have done, and write the pack."""
        with self._journal(work, restart, parts) as journal:
            if (finished := _finished(journal, output)) is not None:
                _remove_temporary(journal)
                return finished
            _check_free(output, overwrite, journal)
            if estimate:
                self.events.emit("estimate", seconds=self.job.estimate().seconds)
            run = self._run(journal, shard=Shard(1, shards), merging=bool(parts))
            with _deterministic(self.context.device):
                draft = self.job.run(run)
                pack = finish(run, self.plan, draft, self.method.name)
            # for the user, not for the pack
            write_text(journal.folder / "skipped.txt", self.source.skipped_lines())
            if draft.trained is not None:
                _publish_backbone(draft.trained, output, journal)
            journal.record(_ROOT, pack.root)  # first: a file with that root is ours, and complete
            write(pack, output)
            _remove_temporary(journal)
            self.events.emit("done", root=pack.root, bytes=output.stat().st_size)
            return pack

    def do_share(
        self,
        folder: Part,
        shard: Shard,
        *,
        restart: bool = False,
        wait: bool = False,
        quiet: bool = False,
    ) -> Part:
        """Run the job as far as it is this shard's; return its part.

        Args:
            quiet: do not say that it goes on: it does so often.
        """
        part = part_of(folder, shard)
        folder.mkdir(exist_ok=True)
        others = [
            part_of(folder, Shard(number, shard.count))
            for number in range(1, shard.count + 1)
            if number != shard.number
        ]
        with self._journal(part, restart, others) as journal:
            run = self._run(journal, quiet=quiet, shard=shard, wait=wait)
            record_call(journal, self.source, self.settings, shard)
            try:
                with _deterministic(self.context.device):
                    finish(run, self.plan, self.job.run(run), self.method.name)
            except ShardFinishedError:
                pass
            self.events.emit("shard", shard=str(shard))
        return part

    @contextmanager
    def _journal(self, folder: Part, restart: bool, parts: Sequence[Part]) -> Iterator[Journal]:
        start_over = "use --restart (restart=True)"
        journal = Journal(folder, self.key, restart=restart, start_over=start_over, parts=parts)
        with closing(journal):
            journal.look()
            log = log_file(journal.folder / "log.txt")
            log({"event": "plan", "lines": self.plan.lines()})
            self.events.listeners.append(log)
            try:
                yield journal
            finally:
                self.events.listeners.remove(log)

    def _run(self, journal: Journal, *, quiet: bool = False, **share: Any) -> EncodeRun:
        run = EncodeRun(self.source, self.settings, self.context, journal, self.events, **share)
        if journal.begun:
            if not quiet:
                self.events.note("going on where the last run stopped")
            run.recall_skipped()
        return run


@dataclass(slots=True)
class _Shared:
    """An encoding as workers do it: each opens it once."""

    source: Mapping[str, Any]
    output: Path | ObjectPath
    settings: EncodeSettings | None
    method: Method | None
    teachers: Path | None
    restart: bool
    overwrite: bool
    _opened: _Encoding | None = None

    @property
    def parts(self) -> Part:
        return _beside(self.output, ".parts")

    @property
    def folder(self) -> Path | None:
        return None if isinstance(self.parts, ObjectPath) else self.parts

    @property
    def encoding(self) -> _Encoding:
        assert self._opened is not None
        return self._opened

    def open(self, listen: Listener) -> None:
        source = open_source(**self.source)
        self._opened = _Encoding(source, self.settings, self.method, self.teachers, [listen])

    def do(self, shard: Shard) -> None:
        self.encoding.do_share(self.parts, shard, quiet=True)

    def finish(self, count: int) -> Pack:
        parts = [part_of(self.parts, Shard(n, count)) for n in range(1, count + 1)]
        work, restart, overwrite = _beside(self.output, ".work"), self.restart, self.overwrite
        how: dict[str, Any] = {"restart": restart, "overwrite": overwrite, "shards": count}
        return self.encoding.write(work, self.output, parts=parts, **how)


def check_output(output: str | Path | ObjectPath) -> Path | ObjectPath:
    """Return where a pack is to be written.

    Raises:
        UsageError: the name does not end in .d3m, or is that of a directory.
        NotFoundError: the directory of the output does not exist.
        D3MError: nothing can be written there.
    """
    where = place(output)
    if where.suffix != ".d3m":
        raise UsageError(f"invalid output {where.name!r}: expected a name that ends in .d3m")
    if isinstance(where, ObjectPath):
        return where
    output = where
    if not output.parent.is_dir():
        raise NotFoundError(
            f"the directory {output.parent} of the output does not exist", hint="create it first"
        )
    if not os.access(output.parent, os.W_OK):
        raise D3MError(
            f"the directory {output.parent} of the output cannot be written", hint="name another"
        )
    if os.path.isdir(output):  # unlike Path.is_dir, no error where the name is too long
        raise UsageError(f"the output {output.name} is a directory", hint="name another")
    return output


def check_unused(
    output: str | Path | ObjectPath, *, overwrite: bool = False, restart: bool = False
) -> None:
    """Refuse an output that exists, before any work.

    Args:
        output: where a pack is to be written.
        overwrite: it may be replaced.
        restart: what an earlier run left is discarded; otherwise the output may be of that run.

    Raises:
        UsageError: it exists, or there is a backbone beside it.
    """
    output = place(output)
    if overwrite or (_exists(_beside(output, ".work")) and not restart):
        return
    for path in (output, backbone_path(output)):
        if _exists(path):
            _refuse(path)


def _exists(path: Path | ObjectPath) -> bool:
    """Return whether there is something; unlike `Path.exists`, also for a name that is too long."""
    return path.exists() if isinstance(path, ObjectPath) else os.path.exists(path)


def _beside(output: Path | ObjectPath, suffix: str) -> Part:
    """Return the folder beside an output in which the work on it is kept."""
    return output.parent / f"{output.name}{suffix}"


def _opened(source: Source | str | Path) -> Source:
    return source if isinstance(source, Source) else open_source(source)


def _prepare(
    method: Method, source: Source, settings: EncodeSettings, teachers: Path | None
) -> tuple[Job, EncodeContext]:
    check_used(settings, method.name)
    check_named_teacher(settings, source.classes)
    context = EncodeContext(_device(settings.device), teachers or teacher_cache())
    return method.prepare(source, settings, own_settings(method, settings), context), context


def _device(name: str | None) -> str:
    device = resolve_device(name)
    if device.type != "cpu":
        # cuBLAS gives equal sums only with this; it looks once, before the first product
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return str(device)


@contextmanager
def _deterministic(device: str) -> Iterator[None]:
    """On an accelerator use only kernels that give the same sums twice, as a CPU does anyway."""
    if device.startswith("cpu"):
        yield
        return
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with reproducible_cuda():
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)


def _journal_key(
    source: Source, settings: EncodeSettings, own: Any, plan: EncodePlan
) -> Mapping[str, Any]:
    """Return what must be the same for a run to go on."""
    planned = {f"plan {name}": value for name, value in plan.to_json().items()}
    chosen = {**all_plain(settings), **all_plain(own)}
    return {"source": source.fingerprint(), **chosen, **planned}


def _finished(journal: Journal, output: Path | ObjectPath) -> Pack | None:
    """Return the pack if this very work has led to it."""
    if _ROOT not in journal or not output.exists():
        return None
    try:
        pack = load(str(output)) if isinstance(output, ObjectPath) else read(output)
    except InvalidPackError:
        return None  # another file, which was there before
    return pack if pack.root == journal[_ROOT] else None


def _check_free(output: Path | ObjectPath, overwrite: bool, journal: Journal) -> None:
    """Refuse to replace a pack, or a backbone next to it, that is not of this run."""
    backbone = backbone_path(output)
    # a run that was killed at its very end may have put its own backbone there
    ours = _BACKBONE in journal and journal[_BACKBONE] == _lock_digest(backbone)
    for path in (output, *([] if ours else [backbone])):
        if path.exists() and not overwrite:
            _refuse(path)


def _refuse(path: Path | ObjectPath) -> NoReturn:
    raise UsageError(
        f"{path.name} exists", hint="name another output, or use --overwrite (overwrite=True)"
    )


def _lock_digest(directory: Path) -> str | None:
    lock = directory / "lock.json"
    return digest(lock) if lock.is_file() else None


def _publish_backbone(trained: Path, output: Path | ObjectPath, journal: Journal) -> None:
    """Copy a trained backbone to where decoders look for it; all of it or nothing."""
    journal.record(_BACKBONE, _lock_digest(trained))
    with replace_folder(backbone_path(output)) as temporary:
        shutil.copytree(trained, temporary, dirs_exist_ok=True)


def _remove_temporary(journal: Journal) -> None:
    for folder in _TEMPORARY:
        journal.drop(folder)

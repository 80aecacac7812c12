"""What a method of encoding is: `prepare` gives a job, the job's `run` gives a draft of a pack.

A method learns; what all packs have in common is the work of `encode`: seeds, soft labels, probes,
provenance, contact sheets and writing. Other packages bring methods by entry points of the group
"d3pack.methods".
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from d3pack.encode.settings import (
    ClassCondSettings,
    D3MSettings,
    EncodeSettings,
    MinimaxSettings,
    ModesSettings,
)
from d3pack.errors import UsageError
from d3pack.system import Shard, WaitingError, load

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from d3pack.backbones import Backbone
    from d3pack.encode.plan import EncodePlan
    from d3pack.format import Coded, Pack, Recipe
    from d3pack.sources import Source
    from d3pack.system import Events, Journal
    from d3pack.teachers import Teacher

GROUP = "d3pack.methods"


@dataclass(frozen=True, slots=True)
class NoSettings:
    """Settings of a method that has none of its own."""


_BUILT_IN: Mapping[str, tuple[str, type]] = {
    "d3m": ("d3pack.encode.methods.d3m.method:D3M", D3MSettings),
    "classcond": ("d3pack.encode.methods.classcond.method:ClassCond", ClassCondSettings),
    "codes": ("d3pack.encode.methods.codes.method:CodesOnly", NoSettings),
    "minimax": ("d3pack.encode.methods.minimax.method:Minimax", MinimaxSettings),
    "modes": ("d3pack.encode.methods.modes.method:Modes", ModesSettings),
}
_SKIPPED = "skipped"  # in the journal
_NAMED_SHARDS = 8  # that a message lists


@dataclass(frozen=True, slots=True)
class EncodeContext:
    """Where a job is to work."""

    device: str
    teachers: Path  # directory of trained teachers, which runs share
    opened: dict[str, Teacher] = field(default_factory=dict)  # what shards of a worker use again


@dataclass(frozen=True, slots=True)
class EncodeRun:
    """One run of a job: what it reads, where it keeps its state, and whom it reports to.

    Attributes:
        shard: the share of the work that this process does.
        merging: whether it does none of it, and puts together what all shards have done.
        wait: whether it waits for other shards, or stops where it needs them.
    """

    source: Source
    settings: EncodeSettings
    context: EncodeContext
    journal: Journal
    events: Events
    shard: Shard = Shard()
    merging: bool = False
    wait: bool = False

    @property
    def is_shard(self) -> bool:
        """Whether others do a part of the work."""
        return self.shard.count > 1 and not self.merging

    def owns(self, unit: int) -> bool:
        """Return whether this process does a unit of a stage."""
        return not self.merging and self.shard.owns(unit)

    def units(
        self,
        stage: str,
        names: Sequence[str],
        *,
        done: Callable[[int], bool] | None = None,
        last: bool = False,
    ) -> Iterator[int]:
        """Yield the numbers of the units that this process has to make; then all are there.

        Args:
            stage: what is done, for messages.
            names: of each unit in the journal, where it is arrays or a fact.
            done: whether a unit is there; by default, whether the journal has its name.
            last: whether a shard has nothing to do after this stage.

        Raises:
            ShardFinishedError: this was the last stage, and others still work on it.
            WaitingError: units of other shards are missing.
        """
        is_done = done or (lambda unit: self.journal.has(names[unit]))
        self.journal.look()
        left = [unit for unit in range(len(names)) if not is_done(unit)]
        yield from filter(self.owns, left)
        self.journal.look()
        missing = [unit for unit in left if not is_done(unit)]
        if missing and self.is_shard and last:
            raise ShardFinishedError(f"shard {self.shard} has finished")
        if missing and self.wait:
            self.events.note(f"waiting: {self._missing(stage, missing)}")
        while missing:
            if not self.wait:
                raise WaitingError(
                    self._missing(stage, missing),
                    hint="run them first" if self.merging else "run this one again after them",
                )
            time.sleep(self.journal.look_seconds)
            self.journal.look()
            missing = [unit for unit in missing if not is_done(unit)]

    def _missing(self, stage: str, units: Sequence[int]) -> str:
        count = self.shard.count
        shards = sorted({unit % count + 1 for unit in units})
        names = ", ".join(map(str, shards[:_NAMED_SHARDS])) + ", ..." * (
            len(shards) > _NAMED_SHARDS
        )
        which = f"shard {names}" if len(shards) == 1 else f"shards {names}"
        has = "has" if len(shards) == 1 else "have"
        return f"{which} of {count} {has} not finished the stage {stage!r}"

    def once(self, stage: str, name: str, *, last: bool = False) -> bool:
        """Return whether this process has to do what is done once for all shards.

        Args:
            stage: what is done, for messages.
            name: of the arrays or the fact that the journal has when it is done.
            last: whether a shard has nothing to do after this stage.

        Raises:
            WaitingError: another shard does it, and has not finished.
        """
        return any(True for _ in self.units(stage, [name], last=last))

    def remember_skipped(self) -> None:
        """Record the files that were left out, before a stage that has opened files is done.

        A run that goes on does not open them again, and must still list them.
        """
        names = [[skip.class_name, skip.key, skip.reason] for skip in self.source.skipped]
        if names and self.journal.facts.get(_SKIPPED) != names:
            self.journal.record(_SKIPPED, names)

    def recall_skipped(self) -> None:
        """Open the recorded files again: they are listed, or an error where none may be bad."""
        skipped = [skip for names in self.journal.everywhere(_SKIPPED) for skip in names]
        for class_name, key, _ in skipped:
            if class_name not in self.source.classes:
                continue  # left out by its name: the source has listed it already
            c = self.source.classes.index(class_name)
            keys = list(self.source.names(c))
            if key in keys:
                self.source.get(c, keys.index(key))


class ShardFinishedError(WaitingError):
    """A shard has done all of its work."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a job will cost on this machine."""

    nbytes: int  # of the pack
    seconds: Mapping[str, float]  # by stage


@dataclass(frozen=True, slots=True)
class Draft:
    """What a method has learned. `encode` turns it into a pack."""

    recipe: Recipe
    # (classes, modes, vectors, width); None where no image is made under a prompt
    prompts: npt.NDArray[np.float32] | None
    backbone: Backbone  # open, as the recipe names it
    unconditional: npt.NDArray[np.float32] | None = None  # (vectors, width), for guidance
    teacher: Teacher | None = None  # needed where images are picked or labelled
    adapter: Coded | None = None
    embedded: Coded | None = None  # files of the backbone, which the pack carries
    trained: Path | None = None  # directory of a backbone to be put next to the pack
    metrics: Mapping[str, Any] = field(default_factory=dict)
    seen: int = 0  # real images that were used
    bad: int = 0  # real images that could not be read
    # images of a class to be coded; None: the teacher chooses
    photographs: Callable[[int], Tensor] | None = None
    # what is coded in their place: latents of images that were made
    latents: Callable[[int], Tensor] | None = None
    # how much each image of a class counts in the loss of a training; asked for when all are made
    weights: Callable[[int], npt.NDArray[np.float64]] | None = None
    # real images of a class, at most so many, for contact sheets
    real: Callable[[int, int], npt.NDArray[np.uint8]] | None = None
    title: str = "Real images, and what the pack makes"

    def pack(self, plan: EncodePlan) -> Pack:
        """Return the pack without picks, labels, probes and provenance."""
        from d3pack.format import EMBEDDED, Pack, encode_prompts, encode_unconditional

        recipe = plan.recipe_of(self.recipe)
        none = None if recipe.guidance == 1.0 else self.unconditional
        codec, prompts = plan.allocation.codec, self.prompts
        return Pack(
            classes=plan.classes,
            images_per_class=max(1, plan.seeded),  # without seeds, `codes` replaces this one
            recipe=recipe,
            prompts=None if prompts is None else encode_prompts(prompts, codec),
            seed=plan.seed,
            unconditional=None if none is None else encode_unconditional(none),
            adapter=self.adapter,
            optional={} if self.embedded is None else {EMBEDDED: {}},
            extensions={} if self.embedded is None else {EMBEDDED: self.embedded},
        )


class Job(Protocol):
    """Prepared work: every setting is definite, nothing costly has been done."""

    def describe(self) -> EncodePlan:
        """Return the resolved settings."""
        ...

    def estimate(self) -> Estimate:
        """Return bytes of the pack and seconds by stage, from a little work on this machine."""
        ...

    def run(self, run: EncodeRun) -> Draft:
        """Do the work; what is finished goes into the journal, and is not done again."""
        ...


class Method(Protocol):
    """A way to encode. It keeps no state: all of it is in the job."""

    @property
    def name(self) -> str:
        """How settings and packs call it."""
        ...

    @property
    def settings(self) -> type:
        """Dataclass of the settings that this method alone has."""
        ...

    def prepare(
        self, source: Source, settings: EncodeSettings, own: Any, context: EncodeContext
    ) -> Job:
        """Return a job, or refuse what cannot work.

        Args:
            source: the real images.
            settings: what every method reads.
            own: an instance of `self.settings`.
            context: device and directories.
        """
        ...


@cache
def _plugins() -> Mapping[str, str]:
    return {entry.name: entry.value for entry in entry_points(group=GROUP)}


def available_methods() -> tuple[str, ...]:
    """Return the names of all methods: the built-in ones and those of plugins."""
    return tuple(sorted({**_plugins(), **_BUILT_IN}))


def open_method(name: str) -> Method:
    """Return the method of that name.

    Raises:
        UsageError: if there is none.
    """
    if name in _BUILT_IN:
        place = _BUILT_IN[name][0]
    elif name in _plugins():
        place = _plugins()[name]
    else:
        raise UsageError(
            f"unknown method {name!r}: expected {', '.join(available_methods())}",
            hint="other methods come with plugins",
        )
    return cast(Method, load(place, f"the method {name}")())


def method_settings(name: str) -> type:
    """Return the dataclass of a method's own settings; for built-in ones this imports no torch.

    Raises:
        UsageError: if there is no such method.
    """
    return _BUILT_IN[name][1] if name in _BUILT_IN else open_method(name).settings


def own_settings(method: Method, settings: EncodeSettings) -> Any:
    """Return `settings.method_settings`, or the method's defaults where they are None.

    Raises:
        UsageError: if they belong to another method.
    """
    own = settings.method_settings
    if own is None:
        return method.settings()
    if not isinstance(own, method.settings):
        raise UsageError(
            f"invalid method_settings of {type(own).__name__}: the method {method.name} takes "
            f"{method.settings.__name__}"
        )
    return own

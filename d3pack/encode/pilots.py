"""How a budget is split between seeded images and codes: short students decide.

What is generated and what is photographed teach different things, and which of them pays depends
on the data and the size. Every split becomes a trial pack within the budget; students of its images
are tested on real training images of which no pack of this run holds a code, and which teach no
prompt. The teacher has seen them, as it has seen all of the source.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

from d3pack.backbones import Backbone
from d3pack.decode import Decoder
from d3pack.encode.codes import can_code, code_seconds, coding_alone, divided
from d3pack.encode.contract import EncodeRun
from d3pack.encode.plan import SMALL, EncodePlan, coding_for, repeats
from d3pack.encode.settings import EncodeSettings
from d3pack.errors import UsageError
from d3pack.format import Coding, Pack, Recipe
from d3pack.sources import Source
from d3pack.students import (
    PROTOCOLS,
    Intervals,
    LabelledImages,
    Protocol,
    RealImages,
    Updates,
    fit,
    held_back,
    seconds_needed,
    train_student,
)
from d3pack.system import count

SizeOf = Callable[[EncodePlan], int]
ROUNDS = 3  # students of the splits that are compared at last
FINALISTS = 2
TRAILING = 0.03  # accuracy: a split so far behind the best has no second student
FEW_TESTS = 100  # photographs: one of them is a percent
NEW = 0.9  # of the codes that a budget buys, that are of other photographs, at least
PICKS_SHARE = 10  # picks beside codes may take a tenth of the budget
MARGIN = 16  # bytes: a figure in the manifest may have a digit more
FINER = ((12, 1), (8, 2), (8, 4))  # bits and atoms of larger codes, tried in turn where codes pay
PILOTS = 9  # about so many students, for estimates
_NAME = "pilot {}: {}"  # in the journal: the accuracy of a student of a split


@dataclass(frozen=True, slots=True)
class Split:
    """One way to spend a budget."""

    name: str
    plan: EncodePlan

    @property
    def disclosure(self) -> int:
        """How much of it is photographs: of splits that teach as much, the one with least wins."""
        return (1 if self.plan.seeded else 2) if self.plan.codes else 0

    @property
    def text(self) -> str:
        """What a class of the pack holds."""
        parts = []
        if self.plan.coding is not None:
            under = "" if self.plan.coding.prompts else " without prompts"
            size = "" if self.plan.seeded else " at {}x{}".format(*self.plan.size)
            each = f"{self.plan.coding.nbytes:.1f} bytes"
            parts.append(f"{self.plan.codes} codes of {each}{size}{under}")
        if self.plan.seeded:
            parts.append(f"{self.plan.seeded} seeded")
        return f"{self.name} ({', '.join(parts)})"


def can_choose(source: Source, settings: EncodeSettings, backbone: Backbone) -> bool:
    """Return whether there is a choice: photographs to hold back, and a backbone for codes."""
    return max(source.counts) > 1 and can_code(backbone, coding_for(settings))


def first_splits(
    plan: EncodePlan,
    settings: EncodeSettings,
    photographs: int,
    size_of: SizeOf,
    small: tuple[int, int] | None = None,
) -> list[Split]:
    """Return what is compared first: codes alone, small ones alone, both, seeds alone.

    Without those whose codes do not fit. `photographs` can be coded of a class, at most; `small` is
    the size of small codes, if there are any.
    """
    wanted, limited = plan.images_per_class, settings.images_per_class is not None
    most = min(photographs, wanted) if limited else photographs
    derived = replace(plan, allocation=replace(plan.allocation, candidates=1, share=1))
    picks = size_of(plan) - size_of(derived)
    beside = derived if picks * PICKS_SHARE > (settings.budget or 0) else plan
    seeded = wanted - wanted // 2 if limited else wanted
    coding = coding_for(settings)
    alone = filled(derived, coding, 0, most, settings, size_of)
    if alone is not None and not (bare := coding_alone(alone, size_of)).prompts:
        alone = filled(derived, bare, 0, most, settings, size_of)
    little = None
    if small is not None:  # prompts were learned at the whole size
        bare = replace(coding, prompts=False)
        little = filled(replace(derived, size=small), bare, 0, most, settings, size_of)
    both = filled(beside, coding, seeded, most - seeded if limited else most, settings, size_of)
    plans = {"codes": alone, "small codes": little, "both": both, "seeds": plan}
    return [Split(name, plan) for name, plan in plans.items() if plan is not None]


def small_size(
    plan: EncodePlan, settings: EncodeSettings, backbone: Backbone
) -> tuple[int, int] | None:
    """Return half of the size of the images, where photographs are no larger and it can be made.

    Latents of small images have fewer values, of which as many bytes choose more.
    """
    height, width = plan.size
    if settings.size is not None or plan.typical > min(height, width) // 2:
        return None
    try:
        backbone.latent_shape_for(half := (height // 2, width // 2))
    except UsageError:
        return None
    return half


def filled(
    plan: EncodePlan,
    coding: Coding,
    seeded: int,
    most: int,
    settings: EncodeSettings,
    size_of: SizeOf,
) -> EncodePlan | None:
    """Return the plan with as many codes as the budget holds; None where one a class is too many.

    Args:
        seeded: images of each class that are made of seeds.
        most: codes of each class, at most.
    """

    def with_codes(codes: int) -> EncodePlan:
        return replace(plan, codes=codes, images_per_class=codes + seeded, coding=coding)

    free = (settings.budget or 0) - MARGIN
    first = size_of(with_codes(1))
    codes = 1 + int((free - first) // (coding.nbytes * len(plan.classes))) if first <= free else 0
    codes = min(codes, most)
    while codes and size_of(with_codes(codes)) > free:
        codes -= 1
    return with_codes(codes) if codes else None


def choose_split(
    run: EncodeRun,
    plan: EncodePlan,
    backbone: Backbone,
    make: Callable[[EncodePlan], Pack],
    size_of: SizeOf,
) -> EncodePlan:
    """Return the plan of the split whose images teach most, and say how they compared.

    Args:
        run: the run.
        plan: of seeds alone.
        backbone: makes the images.
        make: makes the pack of a plan, without labels.
        size_of: bytes of the pack of a plan.
    """
    counts = run.source.counts
    small = small_size(plan, run.settings, backbone)
    free = [n - held_back(n) for n in counts]
    most = enough(free)
    splits = first_splits(plan, run.settings, most, size_of, small)
    if len(splits) == 1:
        return plan
    if (tests := sum(map(held_back, counts))) < FEW_TESTS:
        tested = count(tests, "photograph")
        run.events.note(f"pilots are tested on only {tested}, so the choice may be wrong")
    race = _Race(run, plan, backbone, make)
    best = race.best(splits)
    while best.plan.coding is not None and (coding := finer(best.plan.coding)) is not None:
        most, seeded = best.plan.codes, best.plan.seeded
        larger = filled(best.plan, coding, seeded, most, run.settings, size_of)
        if larger is None or race.best([best, other := Split(best.name, larger)]) is best:
            break
        best = other
    run.events.note(f"chosen: {best.text}")
    for line in repeats(run.source.classes, free, best.plan.codes):
        run.events.note(line)
    return best.plan


def enough(counts: Sequence[int]) -> int:
    """Return how many photographs of each class to code, at most: one in ten may be repeated.

    A pack has equally many codes of each class, so that those of small classes repeat.
    """

    def new(codes: int) -> float:
        return sum(min(n, codes) for n in counts) / (codes * len(counts))

    least, most = max(1, min(counts)), max(counts)  # the share of new ones falls between them
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if new(middle) >= NEW else (least, middle - 1)
    return least


def finer(coding: Coding) -> Coding | None:
    """Return the next larger codes of the same levels; None where there are none to try."""
    for bits, atoms in FINER:
        larger = replace(coding, bits=bits, atoms=tuple(atoms if n else 0 for n in coding.atoms))
        if larger.nbytes > coding.nbytes:
            return larger
    return None


@dataclass(slots=True)
class _Race:
    """Students of splits, trained until one split is ahead; the journal keeps what they reached."""

    run: EncodeRun
    plan: EncodePlan
    backbone: Backbone
    make: Callable[[EncodePlan], Pack]
    _packs: dict[str, Pack] = field(default_factory=dict)
    _images: dict[str, LabelledImages] = field(default_factory=dict)
    _test: LabelledImages | None = None

    def best(self, splits: Sequence[Split]) -> Split:
        """Return the split that is ahead."""
        marks = self._accuracies(splits, [0])
        ahead = max(fmean(values) for values in marks.values())
        ranked = sorted(splits, key=lambda split: (-marks[split.text][0], split.disclosure))
        left = ranked[:FINALISTS]
        left = [split for split in left if marks[split.text][0] >= ahead - TRAILING]
        if len(left) > 1:
            marks = self._accuracies(left, range(ROUNDS))
        return max(left, key=lambda split: (fmean(marks[split.text]), -split.disclosure))

    def _accuracies(
        self, splits: Sequence[Split], seeds: Sequence[int]
    ) -> Mapping[str, list[float]]:
        """Accuracies of students on the images that were held back, seed by seed."""
        journal = self.run.journal
        runs = [(split, seed) for seed in seeds for split in splits]
        names = [_NAME.format(seed + 1, split.text) for split, seed in runs]
        if not all(name in journal for name in names):
            for split in splits:  # each shard does its share of what all students need
                self._pack_of(split)
        for unit in self.run.units("pilots", names):
            accuracy = round(self._train(*runs[unit]), 4)
            journal.record(names[unit], accuracy)
            self.run.events.note(f"{names[unit]}: {100 * accuracy:.1f} %")
        return {
            split.text: [journal[_NAME.format(seed + 1, split.text)] for seed in seeds]
            for split in splits
        }

    def _train(self, split: Split, seed: int) -> float:
        train, test, events = self._images_of(split), self._held(), self.run.events
        with events.stage(f"pilot {seed + 1} of {split.name}", self.plan.pilots, "updates"):
            history = train_student(
                train,
                test,
                pilot_protocol(self.plan),
                seed,
                classes=len(self.plan.classes),
                updates=self.plan.pilots,
                device=self.backbone.device,
                progress=lambda done, total: events.step(done),
            )
        return history.last

    def _pack_of(self, split: Split) -> Pack:
        if split.text not in self._packs:
            self._packs[split.text] = self.make(split.plan)
        return self._packs[split.text]

    def _images_of(self, split: Split) -> LabelledImages:
        """All images of the trial pack, at the size that students see."""
        if split.text not in self._images:
            pack = self._pack_of(split)
            decoder = Decoder(pack, device=self.backbone.device, backbone=self.backbone)
            each, parts = pack.images_per_class, []
            with self.run.events.stage(f"make images of {split.name}", len(pack), "images"):
                for c in range(len(pack.classes)):
                    images = decoder.images([(c, i) for i in range(each)]).cpu()
                    parts.append(fit(images, student_size(self.plan)))
                    self.run.events.step((c + 1) * each)
            self._images[split.text] = LabelledImages.of(parts)
        return self._images[split.text]

    def _held(self) -> LabelledImages:
        """The real images on which students are tested."""
        if self._test is None:
            source, size = self.run.source, student_size(self.plan)
            real = RealImages(source, source.classes, size, "training")
            held = [divided(source, self.plan, c)[1] for c in range(len(source.classes))]
            parts = [real.take(c, numbers) for c, numbers in enumerate(held)]
            self.run.remember_skipped()
            self._test = LabelledImages.of(parts)
        return self._test


def pilot_seconds(
    source: Source,
    plan: EncodePlan,
    settings: EncodeSettings,
    backbone: Backbone,
    recipe: Recipe,
    image: float,
) -> dict[str, float]:
    """Return the seconds by stage: codes of all kinds, images of all splits, students of them.

    `image` are the seconds that an image of the pack takes.
    """
    coding, classes = coding_for(settings), len(plan.classes)
    each = (settings.budget or 0) / coding.nbytes  # codes of a split, about
    images = plan.images_per_class * classes
    student = seconds_needed(
        replace(pilot_protocol(plan), length=Updates(plan.pilots)),
        classes,
        student_size(plan),
        images,
        sum(map(held_back, source.counts)),
        device=backbone.device,
    )
    seconds = 2 * code_seconds(backbone, plan, recipe, settings)
    if (small := small_size(plan, settings, backbone)) is not None:
        bare = replace(plan, size=small, coding=replace(coding, prompts=False))
        seconds += code_seconds(backbone, bare, replace(recipe, size=small), settings)
    made = (2 * each + 2 * images) * image
    return {"codes": seconds * each, "pilots": PILOTS * student + made}


def student_size(plan: EncodePlan) -> int:
    """Return the side of the images that pilots see: a multiple of 8, as students need."""
    return max(16, min(plan.typical, SMALL) // 8 * 8)


def pilot_protocol(plan: EncodePlan) -> Protocol:
    """Return how pilots are trained: as `quick`, and tested once."""
    return replace(PROTOCOLS["quick"], labels="hard", tests=Intervals(), size=student_size(plan))

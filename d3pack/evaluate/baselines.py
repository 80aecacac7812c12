"""Baselines: what a pack is compared with. To add one, add it here.

A baseline is a function of the bench and the pack that returns an `Entry`, registered by
`@baseline`; photographs in another format are a `PayloadFormat` more in `PAYLOADS`, photographs
chosen otherwise a `Choice` more in `CHOICES`. The settings, the command line, its help and
`spec/cli.md` are made from `BASELINES`. Rows of an evaluation have its order.

Torch is imported where it is needed: the help of the command line reads this module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from d3pack.errors import BackboneError
from d3pack.evaluate.entries import Choice, Entry, PayloadFormat, PayloadSettings
from d3pack.students import LabelledImages

if TYPE_CHECKING:
    from torch import Tensor

    from d3pack.backbones import Backbone
    from d3pack.evaluate.bench import Bench
    from d3pack.evaluate.payload import Choose
    from d3pack.format import Pack
    from d3pack.students import RealImages

Make = Callable[["Bench", "Pack"], Entry | None]


@dataclass(frozen=True, slots=True)
class Baseline:
    """An entry to compare a pack with.

    Attributes:
        name: how a user chooses it.
        help: what students are trained on, in a few words.
        make: returns the entry, or None where it does not apply; then it has noted why.
        payloads: formats of which pilots choose the best, with its settings, before the entry can
            be made.
        choice: how photographs are chosen, where they are not drawn at random.
        default: whether it belongs to every evaluation.
    """

    name: str
    help: str
    make: Make
    payloads: tuple[PayloadFormat, ...] = ()
    choice: Choice | None = None
    default: bool = True

    @property
    def needs_teacher(self) -> bool:
        """Whether it needs a teacher."""
        return self.choice is not None and self.choice.select is None


BASELINES: dict[str, Baseline] = {}


def baseline(
    name: str,
    help: str,
    *,
    payloads: tuple[PayloadFormat, ...] = (),
    choice: Choice | None = None,
    default: bool = True,
) -> Callable[[Make], Make]:
    """Register a function as the baseline of a name; see `Baseline`."""

    def register(make: Make) -> Make:
        BASELINES[name] = Baseline(name, help, make, payloads, choice, default)
        return make

    return register


@baseline("random", "as many real images, drawn at random")
def _random(bench: Bench, pack: Pack) -> Entry:
    return random_entry(bench.train, pack.images_per_class)


def random_entry(real: RealImages, per_class: int) -> Entry:
    """Return the entry of so many real images of each class, without loss."""
    return Entry(
        f"random-{per_class}",
        f"random real images, {per_class} a class",
        {"entry": "random", "per_class": per_class, "real": real.fingerprint()},
        lambda seed: real.draw(per_class, seed),
    )


# Progressive scans pay for large JPEG files only: both kinds are tried.
_JPEG = ({"optimize": True, "progressive": False}, {"optimize": True, "progressive": True})
JPEG_FILES = PayloadFormat("jpeg", "JPEG", "files", (10, 25, 60), _JPEG)
WEBP_SHEET = PayloadFormat("sheet", "WebP", "sheet", (5, 20, 60), ({"method": 6},))
AVIF_SHEET = PayloadFormat("avif", "AVIF", "sheet", (10, 25, 60), ({"speed": 4},))
PAYLOADS = (
    JPEG_FILES,
    PayloadFormat("webp", "WebP", "files", (5, 20, 60), ({"method": 6},)),
    WEBP_SHEET,
    AVIF_SHEET,
)


def _add_payload(format: PayloadFormat) -> None:
    @baseline(format.name, f"real images in equal bytes, {format.title}", payloads=(format,))
    def make(bench: Bench, pack: Pack) -> Entry | None:
        return payload_entry(bench, format, sent_bytes(pack))


for _format in PAYLOADS:
    _add_payload(_format)


def sent_bytes(pack: Pack) -> int:
    """Return the bytes that must travel: the pack, and a backbone that cannot be had elsewhere."""
    ledger = pack.ledger()
    return ledger.total + (0 if pack.recipe.backbone.repo else ledger.backbone)


def payload_entry(bench: Bench, format: PayloadFormat, budget: int) -> Entry | None:
    """Return the entry of random real images in so many bytes; None where not one image fits."""
    settings, scores = bench.payload_settings((format,), budget)
    return equal_bytes(bench.train, settings, budget, scores) if settings else None


def equal_bytes(
    real: RealImages, settings: PayloadSettings, budget: int, scores: dict[str, float]
) -> Entry:
    """Return the entry of random real images; `scores` are of the pilots that chose settings."""
    from d3pack.evaluate.payload import fill, most_per_class

    limit = most_per_class(real.counts, budget, settings.format)
    identity = {"entry": "equal-bytes", "budget": budget, "payload": str(settings)}
    return Entry(
        f"{settings.format.name}-{budget}",
        f"real images, {settings.format.title}",
        {**identity, "real": real.fingerprint()},
        lambda seed: fill(real.by_class(limit, seed), settings, budget),
        {"pilot": scores, "payload": str(settings)},
    )


SHEETS = (WEBP_SHEET, AVIF_SHEET)
# RDED as its scripts run it: five crops, squares of .08 to 1 of the area, fours of large images.
CHOICES = (
    Choice("chosen", "real images that a teacher believes most"),
    Choice("rded", "RDED: the best crops of real images, by a teacher", 5, (0.08, 1.0)),
)


def _add_choice(choice: Choice) -> None:
    what = f"{choice.help}, in equal bytes, one WebP or AVIF sheet"

    @baseline(choice.name, what, payloads=SHEETS, choice=choice, default=False)
    def make(bench: Bench, pack: Pack) -> Entry | None:
        return chosen_entry(bench, choice, sent_bytes(pack))


for _choice in CHOICES:
    _add_choice(_choice)


def chosen_entry(
    bench: Bench, choice: Choice, budget: int, sheets: tuple[PayloadFormat, ...] = SHEETS
) -> Entry | None:
    """Return the entry of what is chosen, in so many bytes and the better of the codecs."""
    if bench.chooser(choice) is None:
        return None
    settings, scores = bench.payload_settings(sheets, budget, choice)
    return chosen_payload(bench, choice, settings, budget, scores) if settings else None


def chosen_payload(
    bench: Bench,
    choice: Choice,
    settings: PayloadSettings,
    budget: int,
    scores: dict[str, float],
) -> Entry:
    """Return the entry of what is chosen; `scores` are of the pilots that chose settings."""
    choose, real = bench.chooser(choice), bench.train
    assert choose is not None
    identity = {"entry": choice.name, "budget": budget, "payload": str(settings)}
    return Entry(
        f"{choice.name}-{budget}",
        f"{choice.help}, {settings.format.title}",
        {**identity, **bench.teacher_of(choice), "real": real.fingerprint()},
        lambda seed: _fill_chosen(choose, choice, real, settings, budget),
        {"pilot": scores, "payload": str(settings)},
    )


def _fill_chosen(
    choose: Choose,
    choice: Choice,
    real: RealImages,
    settings: PayloadSettings,
    budget: int,
) -> LabelledImages:
    """The payload; which patches share a collage depends on how many collages there are."""
    from d3pack.evaluate.payload import fill, most_per_class

    limit = most_per_class(real.counts, budget, settings.format)
    payload = fill(choose(limit, ()), settings, budget)
    if choice.factor(real.size) == 1:
        return payload
    each = -(-len(payload.images) // len(real.classes))
    return fill(choose(each, ()), settings, budget)


@baseline("names", "images of the same backbone, prompted by class names")
def _names(bench: Bench, pack: Pack) -> Entry | None:
    from d3pack.backbones import DiT

    if pack.all_coded:
        bench.note("names: left out, all images of this pack are made of codes")
        return None
    backbone = bench.open_backbone(pack)
    try:
        unknown = backbone.unknown_names(pack.classes) if isinstance(backbone, DiT) else []
        twin = named_twin(pack, backbone)
    except BackboneError as error:  # two classes of the backbone have the same name
        bench.note(f"names: left out, {error.args[0]}")
        return None
    if unknown:
        if len(unknown) == len(pack.classes):
            bench.note("names: left out, the backbone knows no class of the pack by name")
            return None
        bench.note(
            f"names: {len(unknown)} of {len(pack.classes)} classes are unknown to the backbone by"
            " name, and made of the mean of its class rows"
        )
    if prompted_by_names(pack, twin):
        bench.note("names: left out, the prompts of this pack are its backbone's own class table")
        return None
    return names_entry(bench, twin)


def named_twin(pack: Pack, backbone: Backbone) -> Pack:
    """Return the pack prompted by class names: as tokens, or as the outputs for them."""
    from d3pack.backbones import TEMPLATE, default_sampling
    from d3pack.encode import sigmas_of, start_vectors
    from d3pack.format.codecs import encode_unconditional

    if pack.recipe.sampler == "table":  # fitted to the prompts of the pack, and to their guidance
        usual, size = default_sampling(backbone), pack.recipe.size
        sigmas = sigmas_of(backbone, usual.sampler, usual.steps, size)
        recipe = replace(pack.recipe, sampler=usual.sampler, sigmas=sigmas, extra={})
        pack = replace(pack, recipe=recipe)
    if pack.recipe.template is not None:
        tokens = replace(pack, unconditional=None)
        return names_pack(tokens, backbone.name_vectors, backbone.prompt_shape[0])
    shape = pack.prompts.params["shape"] if pack.prompts else backbone.output_shape
    most = int(shape[1])

    def outputs(name: str, k: int | None) -> Tensor:
        return start_vectors(backbone, name, k or most, TEMPLATE, outputs=True)

    none = encode_unconditional(backbone.outputs("", most).detach().float().cpu().numpy())
    return names_pack(replace(pack, unconditional=none), outputs, most)


def names_entry(bench: Bench, twin: Pack) -> Entry:
    """Return the entry of a pack that is prompted by class names: its prompts cost no bytes."""
    free = twin.ledger().total - prompt_bytes(twin)
    return pack_entry(bench, "names", "class names as prompts", twin, free)


def names_pack(pack: Pack, vectors: Callable[[str, int | None], Tensor], most: int) -> Pack:
    """Return the same recipe, seed and number of images, prompted by the classes' own names.

    All images are seeded: codes hold photographs, whatever prompts they are decoded under.

    `vectors(name, k)` are those of a name; a prompt may have `most` of them.
    """
    import torch

    from d3pack.backbones import MINI_GUIDANCE
    from d3pack.format.codecs import encode_prompts

    longest = max(len(vectors(name, None)) for name in pack.classes)
    prompts = torch.stack([vectors(name, min(longest, most)) for name in pack.classes])
    recipe = pack.recipe
    if pack.picks is not None:
        # picked seeds may do with no guidance at all; derived ones get what suits them
        recipe = replace(recipe, guidance=max(recipe.guidance, MINI_GUIDANCE))
    return replace(
        pack,
        recipe=recipe,
        prompts=encode_prompts(prompts[:, None].float().cpu().numpy(), "f16"),
        codes=None,
        picks=None,
        labels=None,
        adapter=None,
        probes=None,
        provenance={"method": "class names", "from": pack.root},
        optional={},
        extensions={},
    )


def prompted_by_names(pack: Pack, twin: Pack) -> bool:
    """Return whether a pack has the prompts of its twin by `names_pack`, as `classcond` makes."""
    import numpy as np

    from d3pack.format import decode_prompts, encode_prompts

    if pack.adapter is not None or pack.prompts is None or twin.prompts is None:
        return False
    own, names = decode_prompts(pack.prompts), decode_prompts(twin.prompts)
    if own.shape != names.shape:
        return False
    off = float(np.linalg.norm(own - names) / np.linalg.norm(names))
    rounded = encode_prompts(names, pack.prompts.codec)
    return bool(off <= rounded.figures["error"]["rms"] + 1e-3)  # the twin is rounded too


def prompt_bytes(pack: Pack) -> int:
    """Return the bytes of the prompts and of all that was learned with them."""
    sections = pack.ledger().sections
    return sum(sections.get(name, 0) for name in ("prompts", "picks", "adapter"))


@baseline(
    "whole",
    "all real images, for as many updates as the pack, unless the protocol has a schedule for them",
    default=False,
)
def _whole(bench: Bench, pack: Pack) -> Entry:
    return whole_entry(bench.train)


def whole_entry(real: RealImages) -> Entry:
    """Return the entry of all real images.

    It is no upper bound: students have the pack's number of updates, too few to learn all of a
    large set, except where the protocol has a schedule for it.
    """
    identity = {"entry": "whole", "real": real.fingerprint()}
    return Entry("whole", "all real images", identity, lambda seed: real.all(), whole=True)


def pack_entries(bench: Bench, pack: Pack) -> list[Entry]:
    """Return the entry of the pack and, if it has soft labels, the one of hard labels alone."""
    ledger = pack.ledger()
    entries = [pack_entry(bench, "pack", "this pack", pack, ledger.total)]
    if pack.labels is not None:
        bare = ledger.total - ledger.sections["labels"]
        title = "this pack, hard labels"
        entries.append(pack_entry(bench, "hard", title, pack, bare, hard=True))
    return entries


def pack_entry(
    bench: Bench, key: str, title: str, pack: Pack, nbytes: int, *, hard: bool = False
) -> Entry:
    """Return the entry of a pack: every seed trains on the images that D3MDataset decodes."""

    def build(seed: int) -> LabelledImages:
        return replace(bench.decode(pack), nbytes=nbytes)

    identity = {"entry": "pack", "root": pack.root, "hard": hard}
    return Entry(key, title, identity, build, pack=pack, hard=hard)

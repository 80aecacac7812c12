"""What a user chooses about `encode`: settings of every run, and those of each method alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from d3pack.errors import UsageError
from d3pack.format import MAX_SIDE
from d3pack.format.codecs import PROMPT_CODECS
from d3pack.students import PILOT_SHARE, PROTOCOLS, Updates
from d3pack.system import (
    SettingError,
    check,
    device_option,
    from_plain,
    option,
    options_of,
    parse_duration,
    parse_integer,
    parse_size,
    plain,
    same_option,
)

Sampler = Literal["ddim", "dpmpp-2m", "euler", "lcm"]
LabelKind = Literal["none", "topk", "dense"]
_OF_CODES = ("code_steps", "code_bits", "code_tried", "code_atoms")
_NOT_OF_CODES = {
    **dict.fromkeys(("guidance", "sampler", "sampler_steps"), "no image is made of a seed"),
    "codec": "no vectors are stored",
    "label_temperature": "no image has soft labels",
}


def parse_side(text: str) -> tuple[int, int]:
    """Return (height, width) of `64` or `48x64`."""
    match = re.fullmatch(r"([0-9]+)(?:x([0-9]+))?", text)
    if match is None:
        raise ValueError
    return int(match[1]), int(match[2] or match[1])


def parse_labels(text: str) -> tuple[LabelKind, int]:
    """Return kind and k of `none`, `dense` or `top5`."""
    if text in {"none", "dense"}:
        return ("none", 0) if text == "none" else ("dense", 0)
    if (match := re.fullmatch(r"top([0-9]{1,9})", text)) and (k := int(match[1])) >= 1:
        return "topk", k
    raise SettingError("labels", text, "none, dense, or top1, top2, ...")


def parse_updates(text: str) -> int:
    """Return the updates of a training: their number, or the name of a protocol that has one."""
    length = PROTOCOLS[text].length if text in PROTOCOLS else None
    return length.count if isinstance(length, Updates) else parse_integer(text)


@dataclass(frozen=True, slots=True)
class EncodeSettings:
    """Settings that every method reads. None means: chosen by the method, for source and budget."""

    images_per_class: int | None = option(
        None,
        "Images per class; 10, or 150 with a budget; at least as many as --codes.",
        flag="--ipc",
        ge=1,
        le=2**20,
    )
    budget: int | None = option(
        None,
        "Bytes of the whole pack, as 20KB; what is not set is chosen to fit.",
        parse=parse_size,
    )
    method: str = option(
        "d3m", "d3m, classcond, minimax, modes, codes, or one that a plugin brings."
    )
    backbone: str | None = option(
        None, "Diffusion model: mini, a directory in diffusers' layout, or org/name.", private=True
    )
    device: str | None = device_option()
    seed: int = option(0, "Decides everything that is random.", ge=0, lt=2**63)
    codec: str | None = option(
        None,
        "How vectors are stored.",
        choices=tuple(PROMPT_CODECS),
        group="contents of the pack",
    )
    candidates: int | None = option(
        None,
        "Images made for each one that is kept, or sets; 1: seeds are derived and cost no bytes.",
        ge=1,
        le=2**24,
        group="contents of the pack",
    )
    select: Literal["teacher", "s3", "draws"] = option(
        "teacher",
        "How candidates are picked: one by one by a teacher, or in whole sets a class, by their "
        "features (s3) or by the statistics of their noise (draws).",
        group="contents of the pack",
    )
    labels: str | None = option(
        None, "Soft labels: none, top1, top2, ... or dense.", group="contents of the pack"
    )
    for_updates: int = option(
        1500,
        "Updates of the training that the pack is meant for: pilots have a quarter of them.",
        ge=4,
        parse=parse_updates,
        expected="an integer, quick or standard",
        metavar="INTEGER",
    )
    codes: int | None = option(
        None,
        "Images per class that are photographs, coded in a few bytes each; they come first. "
        "The pilots of d3m choose with a budget.",
        ge=0,
        le=2**20,
        group="photographs as codes",
    )
    no_codes: bool = option(
        False,
        "Keep photographs out of the pack, whatever the budget.",
        group="photographs as codes",
    )
    code_steps: int = option(
        15, "Noise levels of a code.", ge=2, le=256, group="photographs as codes"
    )
    code_bits: int = option(
        8,
        "A codebook of each level has 2**bits entries.",
        ge=1,
        le=16,
        group="photographs as codes",
    )
    code_tried: int | None = option(
        None,
        "Choices tried at each level; more come nearer and take as many times longer. 8, fewer "
        "for more than 1,000 images, 1 for large latents.",
        ge=1,
        le=256,
        group="photographs as codes",
    )
    code_atoms: int = option(
        1, "Entries that are chosen at each level.", ge=1, le=1024, group="photographs as codes"
    )
    label_temperature: float = option(
        1.0,
        "Temperature of the soft labels.",
        flag="--temperature",
        gt=0,
        le=100,
        group="contents of the pack",
    )
    probes: int | None = option(
        None,
        "Small reference images for verify --decode.",
        ge=0,
        le=64,
        group="contents of the pack",
    )
    provenance: Literal["lean", "full"] = option(
        "lean",
        "What the pack says about its making; full adds measured figures, versions and hashes.",
        private=True,  # it shows
        group="contents of the pack",
    )
    size: tuple[int, int] | None = option(
        None,
        "Size of the images in pixels.",
        ge=1,
        parse=parse_side,
        expected="an integer or HEIGHTxWIDTH",
        metavar="SIZE",
        group="images",
    )
    colours: bool = option(
        False,
        "Keep the colours of images where photographs have none; otherwise such images are grey.",
        group="images",
    )
    sampler: Sampler | None = option(None, "How noise becomes an image.", group="images")
    sampler_steps: int | None = option(None, "Steps of the sampler.", ge=1, le=1000, group="images")
    guidance: float | None = option(
        None, "Weight of the prompt; measured where a teacher picks.", ge=0, le=100, group="images"
    )
    group: int | None = option(
        None,
        "Images that one forward pass makes; part of the recipe.",
        ge=1,
        le=1024,
        group="images",
    )
    teacher: str = option(
        "train",
        "Classifier that chooses and labels: train, a directory or org/name.",
        private=True,
        group="teacher",
    )
    teacher_map: Path | None = option(
        None, "CSV or JSON: class to the teacher's label.", private=True, group="teacher"
    )
    teacher_samples: int | None = option(
        None,
        "Images that the training of a small teacher sees; 250000, or 12500 a class where it only "
        "chooses what prompts learn from.",
        ge=0,
        group="teacher",
    )
    method_settings: Any = None  # an instance of the method's `settings`; None: its defaults

    @property
    def images(self) -> int:
        """Images of each class; with a budget more, as seeds cost little."""
        return self.images_per_class or max(150 if self.budget else 10, self.codes or 0)

    @property
    def pilots(self) -> int:
        """Updates of the students that choose how a budget is spent; 0: nothing to choose."""
        choose = self.budget is not None and self.codes is None and not self.no_codes
        return self.for_updates // PILOT_SHARE if choose else 0

    def __post_init__(self) -> None:
        check(self)
        parse_labels(self.labels or "none")
        if self.no_codes and self.codes:
            raise UsageError("codes= and no_codes= exclude each other")
        if (self.codes or 0) > self.images:
            raise SettingError("codes", self.codes, f"at most images_per_class, {self.images}")
        if self.size is not None and not 1 <= min(self.size) <= max(self.size) <= MAX_SIDE:
            shown = "{}x{}".format(*self.size)
            raise SettingError("size", shown, f"sides of 1 to {MAX_SIDE:,} pixels")
        for name in ("code_tried", "code_atoms"):
            if (value := getattr(self, name) or 1) > (most := 2**self.code_bits):
                expected = f"at most {most}, the entries for code_bits={self.code_bits}"
                raise SettingError(name, value, expected)


def check_used(settings: EncodeSettings, method: str) -> None:
    """Refuse settings of codes, pilots and seeds where the method makes none of them.

    Plugins know for themselves.

    Raises:
        SettingError: one is set.
    """
    coded, piloted = settings.codes, method == "d3m" and settings.pilots
    unused = dict[str, str]()
    if method in ("d3m", "classcond", "minimax") and not (coded or piloted):
        unused |= dict.fromkeys(_OF_CODES, "no photograph is coded")
    if method in ("d3m", "classcond", "minimax", "codes") and not piloted:
        unused["for_updates"] = "no pilots split a budget"
    if method in ("d3m", "classcond", "minimax"):
        if settings.candidates == 1:
            unused["select"] = "one candidate leaves no choice"
        elif (coded or 0) >= settings.images:
            unused["select"] = "no image has a seed"
    if method == "codes":
        unused |= _NOT_OF_CODES
    for field in fields(settings):
        if field.name in unused and (value := getattr(settings, field.name)) != field.default:
            raise SettingError(field.name, value, f"no value, since {unused[field.name]}")


@dataclass(frozen=True, slots=True)
class D3MSettings:
    """Settings of `d3m` alone."""

    condition: Literal["tokens", "outputs"] | None = option(
        None,
        "What is learned: tokens, the default, or outputs of the text encoder, which are decoded "
        "without it.",
    )
    modes: int | None = option(
        None, "Prompts per class, each for a cluster of images.", ge=1, le=4096
    )
    vectors: int | None = option(None, "Learned vectors per prompt.", ge=1, le=1024)
    template: str | None = option(
        None, "Sentence around the vectors, with one {}; outputs start at those of its words."
    )
    lora: Path | None = option(
        None, "LoRA of the backbone, in safetensors, that the pack carries.", private=True
    )
    fitted_steps: int | None = option(
        None,
        "Steps of a sampler that is fitted to lead where many small ones do; 5 for mini. "
        "0: one of --sampler and --sampler-steps.",
        ge=0,
        le=64,
    )
    one_pass: bool = option(
        False,
        "Fit prompts once more, to make in one pass of the model what guidance makes in two.",
    )
    factor: int | None = option(
        None, "Side of a collage in patches: 1, 2 or 4.", choices=(1, 2, 4), group="collages"
    )
    pool: int = option(
        512, "Real images per class that are looked at.", ge=1, le=2**20, group="collages"
    )
    crops: int | None = option(None, "Trial crops per image.", ge=1, le=4096, group="collages")
    crop_scale: tuple[float, float] | None = option(
        None,
        "Share that a crop shows of the largest box of its aspect: least and most.",
        gt=0,
        le=1,
        group="collages",
    )
    collages: int = option(256, "Collages per class, at most.", ge=1, le=2**20, group="collages")
    lr: float = option(
        3.0, "Length of a step, in damped natural gradients.", gt=0, le=10, group="inversion"
    )
    steps: int = option(40, "Steps before the last phase, at most.", ge=0, group="inversion")
    cool: int = option(
        250, "Steps of the last phase: falling rate, under the codec.", ge=0, group="inversion"
    )
    batch: int = option(40, "Samples per step, of all prompts.", ge=1, le=2**16, group="inversion")
    slots: int = option(
        10, "Prompts, at most, that are fitted together.", ge=1, le=2**20, group="inversion"
    )
    validate_every: int = option(20, "Steps between validations.", ge=1, group="inversion")
    triples: int = option(
        96, "Fixed (latent, time, noise) that validate a prompt.", ge=1, le=2**16, group="inversion"
    )
    patience: int = option(
        2, "Validations without gain before the last phase.", ge=1, group="inversion"
    )
    tolerance: float = option(5e-4, "The least relative gain that counts.", group="inversion")

    def __post_init__(self) -> None:
        check(self)
        if self.template is not None and self.template.count("{}") != 1:
            raise SettingError("template", self.template, "a sentence with one {}")
        if self.crop_scale is not None and self.crop_scale[0] > self.crop_scale[1]:
            raise SettingError("crop_scale", self.crop_scale, "the smaller share first")


@dataclass(frozen=True, slots=True)
class ClassCondSettings:
    """Settings of `classcond` alone."""

    vae: Path | None = option(
        None, "Directory of an autoencoder with config.json and weights; else mini's.", private=True
    )
    model: Literal["small", "base", "tiny"] | None = option(
        None, "Size of the model: small or base, by the device; tiny for a trial."
    )
    train_steps: int = option(0, "Steps of the training; 0: as many as the model has.", ge=0)
    train_seconds: float = option(
        0.0,
        "Time to train for, as 90m; turned into steps by a short trial.",
        flag="--time-budget",
        ge=0,
        parse=parse_duration,
        metavar="TIME",
    )
    decode_seconds: float = option(
        0.0, "Seconds in which this machine must make all images; 0: no limit.", ge=0
    )
    embed: bool = option(False, "Carry the backbone inside the pack.", flag="--embed-backbone")
    embed_bits: Literal[4, 8] = option(
        8,
        "Bits of a weight of the carried model: 8, or 4, for which the training ends rounded.",
    )
    search_images: int = option(
        200,
        "Images made to judge each setting of the sampler, four of each class at least.",
        ge=0,
        le=2**20,
    )
    licence: str = option("unknown", "Licence of the trained weights.")

    def __post_init__(self) -> None:
        check(self)
        if self.embed_bits == 4 and not self.embed:
            raise UsageError("embed_bits=4 is for a carried backbone: set embed=True as well")


@dataclass(frozen=True, slots=True)
class MinimaxSettings:
    """Settings of `minimax` alone; the defaults are those of the paper."""

    epochs: int = option(8, "Passes over the images.", ge=1)
    batch: int = option(8, "Images per step.", ge=1, le=2**16)
    lr: float = option(1e-3, "Learning rate of AdamW, without decay.", gt=0, le=1)
    ema: float = option(0.9999, "Decay of the average that is stored.", ge=0, lt=1)
    drop: float = option(0.1, "Share of labels left out.", ge=0, le=1)
    memory: int = option(64, "Latents of each class in each memory.", ge=1, le=2**16)
    representative: float = option(0.002, "Weight of nearness to real images.", ge=0, le=1000)
    diverse: float = option(0.008, "Weight of distance from earlier images.", ge=0, le=1000)
    train_steps: int = option(0, "Steps of the training; 0: all epochs.", ge=0)
    adapter: Literal["f16", "i8"] | None = option(
        None, "How the adapter is stored: f16, or i8 where a budget needs it."
    )
    search_images: int = option(
        0,
        "Images made to judge each setting of the sampler, four of each class at least; "
        "0: no search.",
        ge=0,
        le=2**20,
    )
    decode_seconds: float = option(
        0.0, "Seconds in which this machine must make all images; 0: no limit.", ge=0
    )

    def __post_init__(self) -> None:
        check(self)
        if self.decode_seconds and not self.search_images:
            raise UsageError(
                "decode_seconds limits the search for a sampler, and minimax makes none by itself",
                hint="set search_images as well, for instance to 200",
            )


@dataclass(frozen=True, slots=True)
class ModesSettings:
    """Settings of `modes` alone; the defaults are those of the paper."""

    pull: float = option(0.1, "Pull towards a centre, in deviations of a step's noise.", ge=0, le=1)
    pulled: float = option(0.5, "Share of the steps that pull, from the first on.", ge=0, le=1)
    pool: int = option(0, "Real images per class that are clustered; 0: all.", ge=0, le=2**24)
    weigh: bool = option(False, "Store the share of its cluster as the weight of each image.")

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True)
class ImportSettings:
    """How images are made of imported embeddings."""

    images_per_class: int = same_option(
        EncodeSettings, "images_per_class", default=10, help="Images per class."
    )
    seed: int = same_option(EncodeSettings, "seed")
    codec: str = same_option(EncodeSettings, "codec", default="f16")
    size: tuple[int, int] | None = same_option(
        EncodeSettings, "size", help="Size of the images in pixels; that of the backbone."
    )
    sampler: Sampler | None = same_option(EncodeSettings, "sampler")
    sampler_steps: int | None = same_option(EncodeSettings, "sampler_steps")
    guidance: float | None = same_option(EncodeSettings, "guidance", help="Weight of the prompt.")

    def __post_init__(self) -> None:
        check(self)


# How packs record settings. The spelling is part of a pack's bytes: renaming a setting must not
# change it, and readers of packs rely on it. The settings of d3m stand among the shared ones, those
# of other methods under "extra", there as text but for a few.
_RECORDED_AS = {"model": "preset"}
_NOT_TEXT = frozenset({"train_seconds", "decode_seconds", "embed", "embed_bits"})


def recorded_settings(settings: EncodeSettings, method: str) -> dict[str, Any]:
    """Return the settings that a pack records: what differs from the defaults, without places."""
    record = {k: v for k, v in plain(settings, private=False).items() if k != "method"}
    own = settings.method_settings
    if own is None or not plain(own):
        return record
    values = plain(own, private=False)
    if method == "d3m":
        return {**record, **values}
    record["extra"] = {
        _RECORDED_AS.get(name, name): value if name in _NOT_TEXT else str(value)
        for name, value in values.items()
    }
    return record


def d3m_settings(record: Mapping[str, Any]) -> EncodeSettings:
    """Return the settings that a pack made by d3m records.

    Raises:
        UsageError: if this version does not know one of them.
    """
    names = {entry.name for entry in options_of(D3MSettings)}
    own = from_plain(D3MSettings, {k: v for k, v in record.items() if k in names})
    shared = from_plain(EncodeSettings, {k: v for k, v in record.items() if k not in names})
    return replace(shared, method_settings=own)

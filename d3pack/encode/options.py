"""Everything a person can choose about `d3pack encode`, and what is chosen when they do not."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from d3pack.errors import UsageError
from d3pack.format.recipe import SAMPLERS, Sampler

LabelKind = Literal["none", "topk", "dense"]
CODECS = ("f16", "i8", "i4", "pq")


@dataclass(frozen=True, slots=True)
class EncodeOptions:
    """The dials. None means: by the source's resolution, the backbone or the budget."""

    images_per_class: int = 10
    backbone: str = ""  # "mini", a directory or a Hub id; "" is mini without a GPU, SD 1.5 with one
    method: str = "d3m"
    device: str = ""
    seed: int = 0
    # what the pack is made of: the five dials of a byte budget
    modes: int | None = None
    vectors: int | None = None
    codec: str | None = None
    candidates: int | None = None  # images made for each one kept; 1: derived seeds, 0 bytes
    labels: str | None = None  # none, top1, top2, ..., dense
    label_temperature: float = 1.0
    budget: int | None = None  # bytes of the whole pack
    probes: int | None = None
    # how images are made
    size: tuple[int, int] | None = None
    template: str | None = None
    sampler: Sampler | None = None
    sampler_steps: int | None = None
    guidance: float | None = None
    group: int | None = None
    # the real images
    factor: int | None = None  # collages of factor x factor patches
    pool: int = 512  # real images a class that are looked at
    crops: int | None = None  # trial crops an image
    crop_scale: tuple[float, float] | None = None  # share of an image's area that a crop shows
    collages: int = 256  # at most this many a class
    teacher: str = "train"
    teacher_map: str | None = None
    teacher_samples: int = 250_000
    # inversion
    lr: float = 3.0  # in units of Newton's steps, which damping makes short
    steps: int = 40  # at most, before the last phase
    cool: int = 250  # steps of the last phase: falling rate, under the codec
    batch: int = 40
    slots: int = 10  # classes and modes that are fitted at the same time
    validate_every: int = 20
    triples: int = 96  # fixed (latent, t, noise) of a row on which it is judged
    patience: int = 2  # judgements without gain before the last phase
    tolerance: float = 5e-4  # the smallest relative gain that counts
    extra: dict[str, Any] = field(default_factory=dict)  # settings of the method alone

    def __post_init__(self) -> None:
        for name in ("size", "crop_scale"):  # lists, where they come out of JSON
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))

        def need(good: bool, text: str) -> None:
            if not good:
                raise UsageError(text)

        need(1 <= self.images_per_class <= 2**20, f"--ipc lies between 1 and {2**20}")
        need(self.size is None or min(self.size) >= 1, "--size must be at least 1")
        for name in ("modes", "vectors", "candidates", "sampler_steps", "group", "crops"):
            value = getattr(self, name)
            need(value is None or value >= 1, f"--{name.replace('_', '-')} must be at least 1")
        for name in ("pool", "collages", "batch", "slots", "validate_every", "triples", "patience"):
            need(getattr(self, name) >= 1, f"--{name.replace('_', '-')} must be at least 1")
        need(self.steps >= 0 and self.cool >= 0, "steps cannot be negative")
        need(self.codec is None or self.codec in CODECS, f"--codec is one of {', '.join(CODECS)}")
        need(self.factor in {None, 1, 2, 4}, "--factor is 1, 2 or 4")
        need(
            self.sampler is None or (self.sampler in SAMPLERS and self.sampler != "table"),
            "--sampler is one of ddim, dpmpp-2m, euler, lcm",
        )
        need(self.template is None or self.template.count("{}") == 1, "--template needs one {}")
        need(
            self.guidance is None or 0 <= self.guidance <= 100, "--guidance lies between 0 and 100"
        )
        need(0 < self.lr <= 10, "--lr lies between 0 and 10")
        need(0 < self.label_temperature <= 100, "--temperature lies between 0 and 100")
        need(0 <= self.seed < 2**63, "--seed lies between 0 and 2**63")
        need(self.probes is None or 0 <= self.probes <= 64, "--probes lies between 0 and 64")
        low, high = self.crop_scale or (1.0, 1.0)
        need(0 < low <= high <= 1, "--crop-scale is two shares of the area, the smaller first")
        label_kind(self.labels or "none")

    def plain(self) -> dict[str, Any]:
        """As JSON keeps it; only what differs from the defaults."""
        default = {f.name: f.default for f in fields(self)}
        found = {k: v for k, v in asdict(self).items() if k != "extra" and v != default[k]}
        return {**found, **({"extra": self.extra} if self.extra else {})}


def no_settings(method: str, options: EncodeOptions) -> None:
    """Refuse settings that belong to another method."""
    if options.extra:
        name = next(iter(options.extra))
        raise UsageError(f"{method} has no setting {name!r}", hint="it belongs to another --method")


def label_kind(text: str) -> tuple[LabelKind, int]:
    """`none`, `dense` or `top5` -> kind and k."""
    if text in {"none", "dense"}:
        return ("none", 0) if text == "none" else ("dense", 0)
    if text.startswith("top") and text[3:].isdecimal() and int(text[3:]) >= 1:
        return "topk", int(text[3:])
    raise UsageError(f"labels {text!r} are not none, top1, top2, ... or dense")


def parse_size(text: str) -> int:
    """`20KB`, `1.5MB`, `6000` -> bytes. KB is 1000 bytes, KiB 1024."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20}
    number = text.strip().rstrip("BbIiKkMmGg")
    unit = text.strip()[len(number) :].strip().upper()
    try:
        value = int(float(number) * units[unit])
    except (ValueError, KeyError, OverflowError):
        raise UsageError(f"{text!r} is no size", hint="write 20KB, 64KiB or 1.5MB") from None
    if value <= 0:
        raise UsageError(f"{text!r} is no size", hint="write 20KB, 64KiB or 1.5MB")
    return value

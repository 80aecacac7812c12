"""How images are made: plain, immutable values that the manifest holds."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from numbers import Real
from typing import Any, Literal, TypeGuard, get_args

from d3pack.errors import InvalidPackError
from d3pack.format.canonical import FrozenDict, dumps, freeze, to_plain

Sampler = Literal["ancestral", "ddim", "dpmpp-2m", "euler", "lcm", "table"]
DType = Literal["float32", "bfloat16", "float16"]

SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)
DTYPES: tuple[DType, ...] = get_args(DType)
FRESH = ("ancestral", "lcm")  # samplers that take fresh noise in their steps
NOISE = "philox-normal16"

BACKBONE_FIELDS = ("kind", "repo", "lock", "bytes", "revision", "licence")
# A field with its default is left out of the manifest.
BACKBONE_DEFAULTS: Mapping[str, Any] = {
    "kind": "stable-diffusion",
    "licence": "unknown",
    "repo": "",
}
DEFAULTS: Mapping[str, Any] = {
    "dtype": "float32",
    "extra": {},
    "grey": False,
    "group": 16,
    "guidance": 1.0,
    "guided_channels": 0,
    "noise": NOISE,
    "sampler": "dpmpp-2m",
    "template": "a photo of a {}",
}

MAX_STEPS = 1000
MAX_FRESH = 256  # steps of a sampler that takes fresh noise: an epoch has as many draws
MAX_ETA = 1000.0
MAX_ORDER = 4  # answers of the model that a row of a sampler table may use
MIN_RATIO = 1 + 1e-6  # of a sigma to the next: closer ones leave no digits for the coefficients
MAX_SIDE = 8192
MAX_GROUP = 1024
MAX_FILES = 1024
MAX_FILE_SIZE = 2**48
MAX_BACKBONE = 2**48  # bytes
MAX_TEXT = 1024  # characters of a path, template or licence
MAX_PART = 255  # characters of a part of a path: what file systems accept

_KIND = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
_REVISION = re.compile(r"[0-9a-f]{40}")
_COMMIT = "40 hex digits, not a branch or a tag"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PART = rf"[A-Za-z0-9_][A-Za-z0-9._+-]{{0,{MAX_PART - 1}}}"
_PATH = re.compile(f"{_PART}(/{_PART})*")
# a line: no controls, no separators of lines, no marks that reverse text, no byte order mark
_PRINTABLE = re.compile(r"[^\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff]*")


@dataclass(frozen=True, slots=True)
class FileLock:
    """The size and hash of one file of a backbone."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class BackboneRef:
    """An exact reference to a diffusion model: where it is published, and the lock of its files.

    The lock is the hash of a list of files, which comes with the backbone. Where the list is known,
    it is in `files`, and decides about lock and size.
    """

    kind: str  # "stable-diffusion", "dit", or a plugin's name
    repo: str  # "mini", "org/name", or "" for a directory that is published nowhere
    revision: str = ""  # 40 hex digits, a commit; by default the first digits of the lock
    files: Mapping[str, FileLock] = field(default_factory=FrozenDict, compare=False)  # by path
    licence: str = "unknown"
    lock: str = ""  # 64 hex digits, see `lock_of`
    nbytes: int = 0  # of all files

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "files", FrozenDict(self.files))
        if self.files:
            put(self, "lock", lock_of(self.files))
            put(self, "nbytes", sum(lock.size for lock in self.files.values()))
        if self.revision == "" and isinstance(self.lock, str):
            put(self, "revision", self.lock[:40])

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "kind": self.kind,
            "repo": self.repo,
            "lock": self.lock,
            "bytes": self.nbytes,
            "revision": self.revision,
            "licence": self.licence,
        }

    @classmethod
    def from_json(cls, value: Any, at: str = "backbone") -> BackboneRef:
        """Return the reference of `to_json`; unknown and missing keys are refused.

        Those that have a default may be left out, as in the manifest.
        """
        defaults = backbone_defaults(value) if isinstance(value, Mapping) else {}
        items = _check_object(value, at, BACKBONE_FIELDS, defaults)
        items["nbytes"] = items.pop("bytes")
        # an empty revision would become the default
        _check_match(_REVISION, items["revision"], f"{at}.revision", _COMMIT)
        ref = cls(**items)
        ref.check(at)
        return ref

    def check(self, at: str = "backbone") -> None:
        """Raise `InvalidPackError` (E_RECIPE) unless the reference is exact."""
        _check_match(_KIND, self.kind, f"{at}.kind", "a short lower-case name")
        if self.repo != "":
            _check_match(_REPO, self.repo, f"{at}.repo", "`name` or `org/name`")
        _check_match(_SHA256, self.lock, f"{at}.lock", "64 hex digits")
        _check_match(_REVISION, self.revision, f"{at}.revision", _COMMIT)
        _check_int(self.nbytes, 0, MAX_BACKBONE, f"{at}.bytes")
        _check_text(self.licence, f"{at}.licence")
        if self.files:
            parse_files(files_json(self.files), f"{at}.files")


def backbone_defaults(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults of a backbone reference; that of the revision depends on its lock."""
    lock = value.get("lock")
    return {**BACKBONE_DEFAULTS, "revision": lock[:40] if isinstance(lock, str) else ""}


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything besides prompt and seed that decides about the pixels."""

    backbone: BackboneRef
    size: tuple[int, int]  # height, width in pixels
    sampler: Sampler
    sigmas: tuple[float, ...]  # descending, in the scale x0 + sigma * eps, last one 0
    guidance: float = 1.0
    guided_channels: int = 0  # 0: all latent channels; DiT's original code guides the first 3
    # {} is where the learned vectors go; None: they are outputs of the text encoder
    template: str | None = "a photo of a {}"
    dtype: DType = "float32"
    group: int = 16  # the one batch size of every forward pass
    grey: bool = False  # all channels of an image get its luma
    noise: str = NOISE
    extra: Mapping[str, Any] = field(default_factory=dict)  # sampler tables and plugin settings

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", tuple(self.size))
        # an integer would be another spelling of the same real
        object.__setattr__(self, "sigmas", tuple(map(_to_float, self.sigmas)))
        object.__setattr__(self, "guidance", _to_float(self.guidance))
        object.__setattr__(self, "extra", freeze(to_plain(self.extra)))

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, every field written out."""
        return {
            **{item.name: getattr(self, item.name) for item in fields(self)},
            "backbone": self.backbone.to_json(),
            "size": list(self.size),
            "sigmas": list(self.sigmas),
            "extra": to_plain(self.extra),
        }

    @classmethod
    def from_json(cls, value: Any, at: str = "recipe") -> Recipe:
        """Return the recipe of `to_json`; unknown and missing keys are refused with their path.

        Those that have a default may be left out, as in the manifest.
        """
        items = _check_object(value, at, [item.name for item in fields(cls)], DEFAULTS)
        for name in ("size", "sigmas"):
            if not isinstance(items[name], (list, tuple)):
                raise _invalid(f"{at}.{name}: not an array")
        reals = {"guidance": items["guidance"]}
        reals |= {f"sigmas[{i}]": sigma for i, sigma in enumerate(items["sigmas"])}
        for name, real in reals.items():
            if not is_real(real):
                raise _invalid(f"{at}.{name}: not a real number (write 1.0, not 1; 0.0, not -0.0)")
        if not isinstance(items["extra"], Mapping):
            raise _invalid(f"{at}.extra: not an object")
        backbone = BackboneRef.from_json(items.pop("backbone"), f"{at}.backbone")
        recipe = cls(backbone=backbone, **items)
        recipe.check(at)
        return recipe

    def check(self, at: str = "recipe") -> None:
        """Raise `InvalidPackError` (E_RECIPE) unless the recipe keeps the rules of the format."""
        self.backbone.check(f"{at}.backbone")
        if len(self.size) != 2:
            raise _invalid(f"{at}.size: must be [height, width]")
        for side in self.size:
            _check_int(side, 1, MAX_SIDE, f"{at}.size")
        _check_choice(self.sampler, SAMPLERS, f"{at}.sampler")
        _check_choice(self.dtype, DTYPES, f"{at}.dtype")
        _check_choice(self.noise, (NOISE,), f"{at}.noise")
        check_sigmas(self.sigmas, f"{at}.sigmas")
        if self.sampler in FRESH and len(self.sigmas) > MAX_FRESH + 1:
            raise _invalid(f"{at}.sigmas: {self.sampler} has noise for {MAX_FRESH} steps")
        for name, sampler in (("eta", "ancestral"), ("table", "table")):
            if name in self.extra and self.sampler != sampler:
                raise _invalid(f"{at}.extra.{name}: only the sampler {sampler} has it")
        if self.sampler == "ancestral":
            eta_of(self.extra, f"{at}.extra.eta")
        if self.sampler == "table":
            table_rows(self.extra.get("table"), len(self.sigmas) - 1, f"{at}.extra.table")
        if not -1000.0 <= self.guidance <= 1000.0:
            raise _invalid(f"{at}.guidance: {self.guidance!r}, must be within ±1000")
        _check_int(self.guided_channels, 0, 1024, f"{at}.guided_channels")
        if type(self.grey) is not bool:
            raise _invalid(f"{at}.grey: not true or false")
        if self.template is not None:
            _check_text(self.template, f"{at}.template")
            if self.template.count("{}") > 1:
                raise _invalid(f"{at}.template: more than one {{}}")
        _check_int(self.group, 1, MAX_GROUP, f"{at}.group")


def is_real(value: Any) -> TypeGuard[float]:
    """Return whether a value is a real of the format, in which zero has one spelling."""
    return type(value) is float and repr(value) != "-0.0"


def check_sigmas(sigmas: Sequence[float], at: str, code: str = "E_RECIPE") -> None:
    """Refuse levels that do not descend to 0 in steps that can be told apart."""

    def invalid(message: str) -> InvalidPackError:
        return InvalidPackError(f"{at}: {message}", code=code)

    if not 2 <= len(sigmas) <= MAX_STEPS + 1:
        raise invalid(f"{len(sigmas)} sigmas, must be 2 to {MAX_STEPS + 1}")
    for high, low in pairwise(sigmas):
        if not high >= low * MIN_RATIO:
            raise invalid(f"{low!r} after {high!r}, must descend by a millionth or more")
    if sigmas[-1] != 0.0 or math.copysign(1.0, sigmas[-1]) < 0:
        raise invalid(f"the last one is {sigmas[-1]!r}, must be 0.0")
    if not sigmas[0] <= 1e6:
        raise invalid(f"the first one is {sigmas[0]!r}, at most 1e6")
    if not sigmas[-2] >= 1e-6:
        raise invalid(f"the last but one is {sigmas[-2]!r}, at least 1e-6")


def eta_of(extra: Mapping[str, Any], at: str = "eta") -> float:
    """Return the share of noise in the steps of the sampler `ancestral`."""
    eta = extra.get("eta")
    if not is_real(eta) or not 0.0 <= eta <= MAX_ETA:
        raise _invalid(f"{at}: {eta!r:.80} is not a real from 0.0 to {MAX_ETA}")
    return eta


def table_rows(rows: Any, steps: int, at: str = "table") -> list[tuple[float, tuple[float, ...]]]:
    """Return the coefficients (a, b) of every step of the sampler `table`."""
    if not isinstance(rows, (list, tuple)) or len(rows) != steps:
        raise _invalid(f"{at}: must have one row for each of the {steps} steps")
    coefficients = []
    for i, row in enumerate(rows):
        if not (
            isinstance(row, (list, tuple)) and len(row) == 2 and isinstance(row[1], (list, tuple))
        ):
            raise _invalid(f"{at}[{i}]: not [a, [b0, b1, ...]]")
        a, b = row
        if not 1 <= len(b) <= min(i + 1, MAX_ORDER):
            raise _invalid(f"{at}[{i}]: uses {len(b)} answers of the model")
        for value in (a, *b):
            if type(value) not in (int, float) or not math.isfinite(value):
                raise _invalid(f"{at}[{i}]: {value!r:.80} is not a finite number")
        coefficients.append((float(a), tuple(map(float, b))))
    return coefficients


def lock_of(files: Mapping[str, FileLock]) -> str:
    """Return the lock of a backbone: the SHA-256 of the canonical list of its files."""
    return hashlib.sha256(dumps(files_json(files)).encode("ascii")).hexdigest()


def files_json(files: Mapping[str, FileLock]) -> dict[str, list[Any]]:
    """Return a list of files as plain JSON values."""
    return {path: [lock.size, lock.sha256] for path, lock in files.items()}


def parse_files(value: Any, at: str = "files") -> dict[str, FileLock]:
    """Return a list of files from JSON: path to [size, sha256].

    Raises:
        InvalidPackError: it breaks a rule of section 5 (E_RECIPE).
    """
    if not isinstance(value, Mapping):
        raise _invalid(f"{at}: not an object")
    if not 1 <= len(value) <= MAX_FILES:
        raise _invalid(f"{at}: {len(value)} files, must be 1 to {MAX_FILES}")
    for path, lock in value.items():
        if not isinstance(path, str) or len(path) > MAX_TEXT:
            raise _invalid(f"{at}: a path is longer than {MAX_TEXT} characters")
        _check_match(_PATH, path, at, "a relative path without dot-names")
        if not (isinstance(lock, (list, tuple)) and len(lock) == 2):
            raise _invalid(f"{at}[{path!r}]: not a pair of size and sha256")
        _check_int(lock[0], 0, MAX_FILE_SIZE, f"{at}[{path!r}].size")
        _check_match(_SHA256, lock[1], f"{at}[{path!r}].sha256", "64 hex digits")
    for path in value:
        parent = path.rpartition("/")[0]
        while parent:
            if parent in value:
                raise _invalid(f"{at}: {parent!r:.120} is a file and a directory")
            parent = parent.rpartition("/")[0]
    return {path: FileLock(*lock) for path, lock in value.items()}


def _invalid(message: str) -> InvalidPackError:
    return InvalidPackError(message, code="E_RECIPE")


def _to_float(value: Any) -> Any:
    if type(value) is bool or not isinstance(value, Real):
        return value  # `check` refuses it
    return float(value) + 0.0  # no -0.0


def _check_object(
    value: Any, at: str, names: Sequence[str], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Return an object that has exactly these fields, with defaults filled in."""
    if not isinstance(value, Mapping):
        raise _invalid(f"{at}: not an object")
    for name in value:
        if name not in names:
            raise _invalid(f"{at}.{name}: unknown field")
    for name in names:
        if name not in value and name not in defaults:
            raise _invalid(f"{at}.{name}: missing")
    return {**defaults, **value}


def _check_match(pattern: re.Pattern[str], value: Any, at: str, expected: str) -> None:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise _invalid(f"{at}: {value!r:.120} is not {expected}")


def _check_text(value: Any, at: str) -> None:
    _check_match(_PRINTABLE, value, at, "a line of text")
    if len(value) > MAX_TEXT:
        raise _invalid(f"{at}: longer than {MAX_TEXT} characters")


def _check_choice(value: Any, choices: tuple[str, ...], at: str) -> None:
    if not isinstance(value, str) or value not in choices:
        raise _invalid(f"{at}: {value!r:.120} is not one of {', '.join(choices)}")


def _check_int(value: Any, low: int, high: int, at: str) -> None:
    if type(value) is not int or not low <= value <= high:
        raise _invalid(f"{at}: {value!r:.120} is not an integer from {low} to {high}")

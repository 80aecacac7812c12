"""How images are made: plain, immutable values that go into the manifest and come out again."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any, Literal, get_args

from d3pack.errors import InvalidPackError
from d3pack.format.canonical import FrozenDict, dumps, freeze, to_plain

Sampler = Literal["ddim", "dpmpp-2m", "euler", "lcm", "table"]
DType = Literal["float32", "bfloat16", "float16"]

SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)
DTYPES: tuple[DType, ...] = get_args(DType)
NOISE = "philox-normal16"

MAX_STEPS = 1000
MAX_FRESH = 256  # steps of a sampler that takes fresh noise: an epoch has as many draws
MAX_ORDER = 4  # answers of the model that a row of a sampler table may use
APART = 1 + 1e-6  # a sigma to the next: closer ones leave no digits for the coefficients
MAX_SIDE = 8192
MAX_GROUP = 1024
MAX_FILES = 1024
MAX_FILE_SIZE = 2**48
MAX_TEXT = 1024  # characters of a path, template or licence
MAX_PART = 255  # characters of a part of a path: what file systems take

_KIND = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
_REVISION = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PART = rf"[A-Za-z0-9_][A-Za-z0-9._+-]{{0,{MAX_PART - 1}}}"
_PATH = re.compile(f"{_PART}(/{_PART})*")
_PRINTABLE = re.compile(r"[^\x00-\x1f\x7f-\x9f\u2028\u2029]*")


@dataclass(frozen=True, slots=True)
class FileLock:
    """What one file of a backbone must be."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class BackboneRef:
    """An exact reference to a diffusion model: repository, revision and every needed byte."""

    kind: str  # "stable-diffusion", "dit", or a plugin's name
    repo: str  # "mini", "org/name", or "" for a directory that has no public home
    revision: str  # 40 hex digits; for a directory see `directory_revision`
    files: Mapping[str, FileLock]  # relative POSIX path -> lock
    licence: str = "unknown"

    def __post_init__(self) -> None:
        object.__setattr__(self, "files", FrozenDict(self.files))

    @property
    def nbytes(self) -> int:
        """Bytes that whoever decodes the pack needs beside it."""
        return sum(lock.size for lock in self.files.values())

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "kind": self.kind,
            "repo": self.repo,
            "revision": self.revision,
            "files": files_json(self.files),
            "licence": self.licence,
        }

    @classmethod
    def from_json(cls, value: Any, at: str = "backbone") -> BackboneRef:
        """The reverse of `to_json`; refuses unknown and missing keys."""
        got = _object(value, at, _names(cls))
        files = got["files"]
        if not isinstance(files, Mapping):
            raise InvalidPackError(f"{at}.files: not an object", code="E_RECIPE")
        locks = {}
        for path, lock in files.items():
            if not (isinstance(lock, (list, tuple)) and len(lock) == 2):
                raise InvalidPackError(
                    f"{at}.files[{path!r}]: not a pair of size and sha256", code="E_RECIPE"
                )
            locks[path] = FileLock(lock[0], lock[1])
        ref = cls(got["kind"], got["repo"], got["revision"], locks, got["licence"])
        ref.check(at)
        return ref

    def check(self, at: str = "backbone") -> None:
        """Raise `RecipeError` unless the reference is exact."""
        _match(_KIND, self.kind, f"{at}.kind", "a short lower-case name")
        if self.repo != "":
            _match(_REPO, self.repo, f"{at}.repo", "`name` or `org/name`")
        _match(_REVISION, self.revision, f"{at}.revision", "40 hex digits, not a branch or a tag")
        _text(self.licence, f"{at}.licence")
        if not 1 <= len(self.files) <= MAX_FILES:
            raise InvalidPackError(
                f"{at}.files: {len(self.files)} files, must be 1 to {MAX_FILES}", code="E_RECIPE"
            )
        for path, lock in self.files.items():
            if len(path) > MAX_TEXT:
                raise InvalidPackError(
                    f"{at}.files: a path is longer than {MAX_TEXT} characters", code="E_RECIPE"
                )
            _match(_PATH, path, f"{at}.files", "a relative path without dot-names")
            _int(lock.size, 0, MAX_FILE_SIZE, f"{at}.files[{path!r}].size")
            _match(_SHA256, lock.sha256, f"{at}.files[{path!r}].sha256", "64 hex digits")
        for path in self.files:
            above = path.rpartition("/")[0]
            while above:
                if above in self.files:
                    raise InvalidPackError(
                        f"{at}.files: {above!r:.120} is a file and a directory", code="E_RECIPE"
                    )
                above = above.rpartition("/")[0]


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything besides prompt and seed that decides about the pixels."""

    backbone: BackboneRef
    size: tuple[int, int]  # height, width in pixels
    sampler: Sampler
    sigmas: tuple[float, ...]  # descending, VP-normalised x0 + sigma * eps scale, last one 0
    guidance: float = 1.0
    guided_channels: int = 0  # 0: all latent channels; DiT's original code guides the first 3
    template: str = "a photo of a {}"  # {} is where the learned vectors go; unused by class tables
    dtype: DType = "float32"
    group: int = 16  # the one micro-batch size at which every forward runs
    noise: str = NOISE
    extra: Mapping[str, Any] = field(default_factory=dict)  # sampler tables and plugin settings

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", tuple(self.size))
        # An integer would be another spelling of the same real.
        object.__setattr__(self, "sigmas", tuple(map(_real, self.sigmas)))
        object.__setattr__(self, "guidance", _real(self.guidance))
        object.__setattr__(self, "extra", freeze(to_plain(self.extra)))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, every field written out."""
        value = {item.name: getattr(self, item.name) for item in fields(self)}
        return {
            **value,
            "backbone": self.backbone.to_json(),
            "size": list(self.size),
            "sigmas": list(self.sigmas),
            "extra": to_plain(self.extra),
        }

    @classmethod
    def from_json(cls, value: Any, at: str = "recipe") -> Recipe:
        """The reverse of `to_json`; refuses unknown and missing keys, naming their path."""
        got = _object(value, at, _names(cls))
        for name in ("size", "sigmas"):
            if not isinstance(got[name], (list, tuple)):
                raise InvalidPackError(f"{at}.{name}: not an array", code="E_RECIPE")
        for i, sigma in enumerate((got["guidance"], *got["sigmas"])):
            if type(sigma) is not float:
                name = f"sigmas[{i - 1}]" if i else "guidance"
                raise InvalidPackError(
                    f"{at}.{name}: not a real number (write 1.0, not 1)", code="E_RECIPE"
                )
        if not isinstance(got["extra"], Mapping):
            raise InvalidPackError(f"{at}.extra: not an object", code="E_RECIPE")
        backbone = BackboneRef.from_json(got.pop("backbone"), f"{at}.backbone")
        recipe = cls(backbone=backbone, **got)
        recipe.check(at)
        return recipe

    def check(self, at: str = "recipe") -> None:
        """Raise `RecipeError` unless the recipe can be followed."""
        self.backbone.check(f"{at}.backbone")
        if len(self.size) != 2:
            raise InvalidPackError(f"{at}.size: must be [height, width]", code="E_RECIPE")
        for side in self.size:
            _int(side, 1, MAX_SIDE, f"{at}.size")
        _one_of(self.sampler, SAMPLERS, f"{at}.sampler")
        _one_of(self.dtype, DTYPES, f"{at}.dtype")
        _one_of(self.noise, (NOISE,), f"{at}.noise")
        if not 2 <= len(self.sigmas) <= MAX_STEPS + 1:
            raise InvalidPackError(
                f"{at}.sigmas: {len(self.sigmas)}, must be 2 to {MAX_STEPS + 1}", code="E_RECIPE"
            )
        for high, low in zip(self.sigmas, self.sigmas[1:], strict=False):
            if not high >= low * APART:
                raise InvalidPackError(
                    f"{at}.sigmas: {low!r} after {high!r}, must descend by a millionth or more",
                    code="E_RECIPE",
                )
        if self.sigmas[-1] != 0.0 or math.copysign(1.0, self.sigmas[-1]) < 0:
            raise InvalidPackError(
                f"{at}.sigmas: the last one is {self.sigmas[-1]!r}, must be 0.0", code="E_RECIPE"
            )
        if not self.sigmas[0] <= 1e6:
            raise InvalidPackError(
                f"{at}.sigmas: the first one is {self.sigmas[0]!r}, at most 1e6", code="E_RECIPE"
            )
        if not self.sigmas[-2] >= 1e-6:
            raise InvalidPackError(
                f"{at}.sigmas: {self.sigmas[-2]!r} before the end, at least 1e-6", code="E_RECIPE"
            )
        if self.sampler == "lcm" and len(self.sigmas) > MAX_FRESH + 1:
            raise InvalidPackError(
                f"{at}.sigmas: lcm has noise for {MAX_FRESH} steps", code="E_RECIPE"
            )
        if self.sampler == "table":
            table_rows(self.extra.get("table"), len(self.sigmas) - 1, f"{at}.extra.table")
        if not -1000.0 <= self.guidance <= 1000.0:
            raise InvalidPackError(
                f"{at}.guidance: {self.guidance!r} is beyond 1000", code="E_RECIPE"
            )
        _int(self.guided_channels, 0, 1024, f"{at}.guided_channels")
        _text(self.template, f"{at}.template")
        if self.template.count("{}") > 1:
            raise InvalidPackError(f"{at}.template: more than one {{}}", code="E_RECIPE")
        _int(self.group, 1, MAX_GROUP, f"{at}.group")


def table_rows(rows: Any, steps: int, at: str = "table") -> list[tuple[float, tuple[float, ...]]]:
    """The coefficients (a, b) of every step of the sampler `table`."""
    if not isinstance(rows, (list, tuple)) or len(rows) != steps:
        raise InvalidPackError(
            f"{at}: must have one row for each of the {steps} steps", code="E_RECIPE"
        )
    found = []
    for i, row in enumerate(rows):
        if not (
            isinstance(row, (list, tuple)) and len(row) == 2 and isinstance(row[1], (list, tuple))
        ):
            raise InvalidPackError(f"{at}[{i}]: not [a, [b0, b1, ...]]", code="E_RECIPE")
        a, b = row
        if not 1 <= len(b) <= min(i + 1, MAX_ORDER):
            raise InvalidPackError(
                f"{at}[{i}]: reaches back {len(b)} calls of the model", code="E_RECIPE"
            )
        for value in (a, *b):
            if type(value) not in (int, float) or not math.isfinite(value):
                raise InvalidPackError(
                    f"{at}[{i}]: {value!r:.80} is not a finite number", code="E_RECIPE"
                )
        found.append((float(a), tuple(map(float, b))))
    return found


def files_json(files: Mapping[str, FileLock]) -> dict[str, list[Any]]:
    """The files table as it stands in the manifest."""
    return {path: [lock.size, lock.sha256] for path, lock in files.items()}


def directory_revision(files: Mapping[str, FileLock]) -> str:
    """The revision of a directory without a repository: 40 hex digits of the hash of its table."""
    return hashlib.sha256(dumps(files_json(files)).encode("ascii")).hexdigest()[:40]


def _names(cls: Any) -> tuple[str, ...]:
    return tuple(item.name for item in fields(cls))


def _real(value: Any) -> Any:
    if type(value) is bool or not isinstance(value, Real):
        return value  # `check` names it
    return float(value)


def _object(value: Any, at: str, names: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidPackError(f"{at}: not an object", code="E_RECIPE")
    for name in value:
        if name not in names:
            raise InvalidPackError(f"{at}.{name}: unknown field", code="E_RECIPE")
    for name in names:
        if name not in value:
            raise InvalidPackError(f"{at}.{name}: missing", code="E_RECIPE")
    return dict(value)


def _match(pattern: re.Pattern[str], value: Any, at: str, wanted: str) -> None:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise InvalidPackError(f"{at}: {value!r:.120} is not {wanted}", code="E_RECIPE")


def _text(value: Any, at: str) -> None:
    _match(_PRINTABLE, value, at, "a line of text")
    if len(value) > MAX_TEXT:
        raise InvalidPackError(f"{at}: longer than {MAX_TEXT} characters", code="E_RECIPE")


def _one_of(value: Any, known: tuple[str, ...], at: str) -> None:
    if not isinstance(value, str) or value not in known:
        raise InvalidPackError(
            f"{at}: {value!r:.120} is not one of {', '.join(known)}", code="E_RECIPE"
        )


def _int(value: Any, low: int, high: int, at: str) -> None:
    if type(value) is not int or not low <= value <= high:
        raise InvalidPackError(
            f"{at}: {value!r:.120} is not an integer from {low} to {high}", code="E_RECIPE"
        )

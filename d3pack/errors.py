"""Exceptions that d3pack raises on purpose, and their codes.

    D3MError                        exit 1
    ├── UsageError                  exit 2   a call that cannot work
    ├── InvalidPackError            exit 3   the bytes are not a valid pack
    ├── BackboneError               exit 4   the backbone is missing, changed or refused
    │   └── BackboneChangedError    exit 4   a file is not the one that was locked
    ├── NotFoundError               exit 5   a file, directory or repository does not exist
    ├── HubError                    exit 6   the Hub, or the way to it
    │   └── HubOfflineError         exit 6   offline, and not in the cache
    ├── StorageError                exit 6   an object store, or the way to it
    ├── SourceError                 exit 7   the real images cannot be used
    └── NoSpaceError                exit 1   the disk is full; nothing is lost

Rooms add their own: `d3pack.sources` BadImageError, `d3pack.dataset` TransformError and two for an
index that is out of range or is not one (also IndexError and TypeError), `d3pack.teachers`
TeacherError, `d3pack.system` JournalError, SettingError, BusyError and WaitingError (exit 8). A
class is something to catch; a code says exactly what is wrong. Codes are stable: scripts and the
conformance corpus (`spec/vectors/index.json`) rely on them.
"""

from __future__ import annotations

from collections.abc import Mapping

CODES: Mapping[str, tuple[str, str]] = {
    # code: (class, meaning)
    "E_D3M": ("D3MError", "failed for another reason, given in the message"),
    "E_USAGE": ("UsageError", "contradicting arguments, an index out of range"),
    "E_LONG": ("UsageError", "work that takes hours, or very much memory, and was not confirmed"),
    "E_PACK": ("InvalidPackError", "not a valid pack"),
    # In the order in which a reader checks them: table of section 11 of spec/d3m-1.md, which
    # spec/make_errors.py writes.
    "E_TRUNCATED": (
        "InvalidPackError",
        "the file has fewer than 8 bytes, or ends before its header does; later: before its data",
    ),
    "E_LIMIT": (
        "InvalidPackError",
        "the header is too long; later: a limit to which section 4 gives this code is exceeded",
    ),
    "E_HEADER": (
        "InvalidPackError",
        "the header does not begin with `{`, is not ASCII, or its `__metadata__` is not an object"
        " with one string `d3m`",
    ),
    "E_JSON": (
        "InvalidPackError",
        "the header or the manifest is not JSON as section 2 allows it: cut short, NaN, infinity,"
        " an integer beyond 2^53 − 1, a lone surrogate, more than 32 levels, not ASCII",
    ),
    "E_VERSION": ("InvalidPackError", "the major version is another one"),
    "E_FEATURE": ("InvalidPackError", "`requires` has a name that the reader does not know"),
    "E_CANON": (
        "InvalidPackError",
        "the manifest is not in canonical form, or a field has its default; later: a"
        " parameter of the section `codes` has its default, or the header is not the one that the"
        " manifest determines",
    ),
    "E_MANIFEST": ("InvalidPackError", "a field is missing, unknown or of a wrong type"),
    "E_ROOT": ("InvalidPackError", "`root` is not the hash of the manifest"),
    "E_RECIPE": ("InvalidPackError", "the recipe breaks a rule of section 5"),
    "E_SECTION": (
        "InvalidPackError",
        "the entry of a section is malformed, missing, unknown, repeated or out of order",
    ),
    "E_CODEC": (
        "InvalidPackError",
        "the codec is unknown, or a parameter is missing, unknown or not one that it takes",
    ),
    "E_ADAPTER": (
        "InvalidPackError",
        "the adapter's table breaks a rule of section 8; later: one of its values does",
    ),
    "E_TRAILING": ("InvalidPackError", "there are bytes after the data"),
    "E_HASH": ("InvalidPackError", "the SHA-256 of shared bytes is not the one in the manifest"),
    "E_LEAF": ("InvalidPackError", "the row of a class does not match its leaf"),
    "E_NAME": (
        "InvalidPackError",
        "class names are not UTF-8, of a wrong number, repeated, empty, too long, or hold control"
        " characters",
    ),
    "E_IDS": ("InvalidPackError", "ids are repeated, or are 0, 1, 2, ... and so must be left out"),
    "E_PROMPT": (
        "InvalidPackError",
        "a value of a prompt is not finite, or a code has no meaning",
    ),
    "E_CODES": ("InvalidPackError", "the atoms of a code do not exist, or a bit has no meaning"),
    "E_PICKS": ("InvalidPackError", "a candidate is picked twice, or a bit has no meaning"),
    "E_LABEL": (
        "InvalidPackError",
        "a label is not a distribution over the classes, or not in its one spelling",
    ),
    "E_WEIGHTS": ("InvalidPackError", "all weights are 1 and so must be left out"),
    "E_PROBE": ("InvalidPackError", "a probe is of an image that the pack lacks, or is repeated"),
    "E_BACKBONE": ("BackboneError", "the backbone cannot be used as the pack demands"),
    "E_BACKBONE_MISSING": ("BackboneError", "a file that the backbone needs does not exist"),
    "E_BACKBONE_CHANGED": ("BackboneChangedError", "a file is not the one that was locked"),
    "E_BACKBONE_REFUSED": ("BackboneError", "pickles, remote code, paths that lead outside"),
    "E_BACKBONE_CONFIG": ("BackboneError", "a config of an unknown class, or out of bounds"),
    "E_BACKBONE_WEIGHTS": ("BackboneError", "weights missing, left over, misshapen, not finite"),
    "E_BACKBONE_GONE": ("BackboneError", "the repository or revision no longer exists"),
    "E_BACKBONE_GATED": ("BackboneError", "the repository wants an accepted licence or a token"),
    "E_BACKBONE_OFFLINE": ("BackboneError", "not on this machine, and the Hub is out of reach"),
    "E_BACKBONE_PROMPT": ("BackboneError", "learned vectors of another shape than it takes"),
    "E_BACKBONE_NOT_FINITE": ("BackboneError", "the images are not finite numbers"),
    "E_BACKBONE_MEMORY": ("BackboneError", "no memory on the device for one group of images"),
    "E_NOT_FOUND": ("NotFoundError", "a file, directory or repository does not exist"),
    "E_NO_SPACE": ("NoSpaceError", "the disk is full; nothing is lost"),
    "E_HUB": ("HubError", "the Hub answered with a failure"),
    "E_HUB_OFFLINE": ("HubOfflineError", "offline, and not in the cache"),
    "E_HUB_ACCESS": ("HubError", "gated, forbidden, or a wrong token"),
    "E_HUB_BUSY": ("HubError", "rate limits, failures, silence: the same call may work later"),
    "E_HUB_BYTES": ("HubError", "other bytes than were asked for"),
    "E_HUB_PIN": ("HubError", "another pack than the address pins"),
    "E_HUB_SIGNATURE": ("HubError", "a signature missing, of another pack, or by another signer"),
    "E_STORAGE": ("StorageError", "an object store answered with a failure"),
    "E_STORAGE_ACCESS": ("StorageError", "forbidden, or no credentials"),
    "E_STORAGE_BUSY": ("StorageError", "failures, silence: the same call may work later"),
    "E_STORAGE_BYTES": ("StorageError", "an object that changed while it was read"),
    "E_STORAGE_PIN": ("StorageError", "another pack than the address pins"),
    "E_SOURCE": ("SourceError", "the real images cannot be used"),
    "E_CLASSES": ("SourceError", "the pack and the real images have other classes"),
    "E_SOURCE_IMAGE": ("BadImageError", "an image that cannot be read"),
    "E_TRANSFORM": ("TransformError", "a transform failed or returned something else"),
    "E_TEACHER": ("TeacherError", "the teacher cannot be used"),
    "E_JOURNAL": ("JournalError", "the work directory cannot be used as it is"),
    "E_WAITING": ("WaitingError", "a shard needs results of other shards first"),
}


class D3MError(Exception):
    """Base class of all errors that d3pack raises on purpose.

    Args:
        message: what is wrong, in one line.
        hint: what to do next.
        code: one of `CODES`; without it, the code of the class.

    Attributes:
        code: stable name of the cause, such as `E_HASH`.
        hint: what to do next, or "".
        exit_code: exit status of the command for this class.

    Example:
        >>> str(InvalidPackError("the file is empty", code="E_TRUNCATED", hint="download it again"))
        '[E_TRUNCATED] the file is empty; download it again'
    """

    code = "E_D3M"
    exit_code = 1

    def __init__(self, message: str, *, hint: str = "", code: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        text = f"[{self.code}] {self.args[0]}"
        return f"{text}; {self.hint}" if self.hint else text


class UsageError(D3MError):
    """A call that cannot work: contradicting arguments, an index out of range."""

    code = "E_USAGE"
    exit_code = 2


class InvalidPackError(D3MError):
    """The bytes are not a valid pack; `code` names the rule that is broken."""

    code = "E_PACK"
    exit_code = 3


class BackboneError(D3MError):
    """The diffusion backbone cannot be used as the pack demands."""

    code = "E_BACKBONE"
    exit_code = 4


class BackboneChangedError(BackboneError):
    """A file of the backbone is not the one that was locked."""

    code = "E_BACKBONE_CHANGED"


class NotFoundError(D3MError):
    """A file, directory or repository does not exist."""

    code = "E_NOT_FOUND"
    exit_code = 5


class NoSpaceError(D3MError):
    """The disk is full."""

    code = "E_NO_SPACE"


class HubError(D3MError):
    """The Hugging Face Hub answered with a failure, or could not be reached."""

    code = "E_HUB"
    exit_code = 6


class HubOfflineError(HubError):
    """Offline, and not in the cache."""

    code = "E_HUB_OFFLINE"


class StorageError(D3MError):
    """An object store answered with a failure, or could not be reached."""

    code = "E_STORAGE"
    exit_code = 6


class SourceError(D3MError):
    """A tree, archive or table of real images cannot be used."""

    code = "E_SOURCE"
    exit_code = 7

"""The exceptions that d3pack raises on purpose, and their codes.

    D3MError                        exit 1
    ├── UsageError                  exit 2   a call that cannot work
    ├── InvalidPackError            exit 3   the bytes are not a valid pack
    ├── BackboneError               exit 4   the backbone is missing, changed or refused
    │   └── BackboneChangedError    exit 4   a file is not the one that was locked
    ├── NotFoundError               exit 5   a file, directory or repository does not exist
    ├── HubError                    exit 6   the Hub, or the way to it
    │   └── HubOfflineError         exit 6   offline, and not in the cache
    ├── SourceError                 exit 7   the real images cannot be used
    └── NoSpaceError                exit 1   the disk is full; nothing is lost

`d3pack.sources` adds BadImageError, `d3pack.dataset` TransformError, `d3pack.teachers` TeacherError
and `d3pack.system` JournalError. A class is something to catch; a code says exactly what is wrong.
Codes are stable: scripts and the conformance corpus (`spec/vectors/index.json`) rely on them.
"""

from __future__ import annotations

from collections.abc import Mapping

CODES: Mapping[str, tuple[str, str]] = {
    # code: (class, meaning)
    "E_D3M": ("D3MError", "failed for another reason, given in the message"),
    "E_USAGE": ("UsageError", "contradicting arguments, an index out of range"),
    "E_LONG": ("UsageError", "the evaluation takes hours and was not confirmed"),
    "E_PACK": ("InvalidPackError", "not a valid pack"),
    "E_TRUNCATED": ("InvalidPackError", "the file ends before its header says"),
    "E_LIMIT": ("InvalidPackError", "a limit of the format is exceeded"),
    "E_HEADER": ("InvalidPackError", "no safetensors header with one `d3m` entry"),
    "E_JSON": ("InvalidPackError", "not JSON as the format allows it"),
    "E_VERSION": ("InvalidPackError", "a newer major version"),
    "E_FEATURE": ("InvalidPackError", "a required feature that this reader does not know"),
    "E_CANON": ("InvalidPackError", "not in the one canonical spelling"),
    "E_MANIFEST": ("InvalidPackError", "a field missing, unknown or of a wrong type"),
    "E_ROOT": ("InvalidPackError", "the identity is not the hash of the manifest"),
    "E_RECIPE": ("InvalidPackError", "a recipe that cannot be followed"),
    "E_SECTION": ("InvalidPackError", "a section missing, unknown, repeated or out of order"),
    "E_CODEC": ("InvalidPackError", "an unknown codec, or parameters that it does not take"),
    "E_SHAPE": ("InvalidPackError", "a tensor of another name, dtype or shape"),
    "E_TRAILING": ("InvalidPackError", "bytes after the last tensor"),
    "E_PADDING": ("InvalidPackError", "padding that is not zero"),
    "E_HASH": ("InvalidPackError", "a tensor's bytes are not the ones that were written"),
    "E_LEAF": ("InvalidPackError", "a class's bytes do not match its leaf hash"),
    "E_NAME": ("InvalidPackError", "a class name empty, repeated, too long or with controls"),
    "E_IDS": ("InvalidPackError", "class ids repeated, or written although they say nothing"),
    "E_PROMPT": ("InvalidPackError", "a prompt value that is not a finite number"),
    "E_PICKS": ("InvalidPackError", "the same image twice"),
    "E_LABEL": ("InvalidPackError", "a soft label that is not a distribution over the classes"),
    "E_ADAPTER": ("InvalidPackError", "an adapter that does not fit its table of tensors"),
    "E_PROBE": ("InvalidPackError", "a probe of an image that the pack does not have"),
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
    "E_SOURCE": ("SourceError", "the real images cannot be used"),
    "E_CLASSES": ("SourceError", "the pack and the real images have other classes"),
    "E_SOURCE_IMAGE": ("BadImageError", "an image that cannot be read"),
    "E_TRANSFORM": ("TransformError", "a transform failed or returned something else"),
    "E_TEACHER": ("TeacherError", "the teacher cannot be used"),
    "E_JOURNAL": ("JournalError", "the work directory cannot be used as it is"),
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


class SourceError(D3MError):
    """A tree, archive or table of real images cannot be used."""

    code = "E_SOURCE"
    exit_code = 7

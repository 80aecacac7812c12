"""Every error d3pack raises on purpose.

    D3MError                        E_D3M         exit 1
    ├── UsageError                  E_USAGE       exit 2   the call cannot be meant
    ├── InvalidPackError            E_PACK        exit 3   the bytes are not a pack (one class a rule)
    ├── BackboneError               E_BACKBONE    exit 4   the generator is missing, other, or refused
    ├── NotFoundError               E_NOT_FOUND   exit 5   a file or a repository is not there
    ├── HubError                    E_HUB         exit 6   the Hub, or the way to it
    │   ├── HubOfflineError         E_HUB_OFFLINE          offline, and not in the cache
    │   ├── HubAccessError          E_HUB_ACCESS           gated, forbidden, wrong token
    │   ├── HubBusyError            E_HUB_BUSY             limits, failures, silence: try later
    │   ├── HubBytesError           E_HUB_BYTES            not the bytes that were asked for
    │   ├── RootPinError            E_HUB_PIN              another pack than the address pins
    │   └── SignatureError          E_HUB_SIGNATURE        missing, not of this pack, or another's
    └── SourceError                 E_SOURCE      exit 7   the real images cannot be used

A message is one line: what is wrong; `hint` says what to do next. Codes are stable: scripts and the
conformance corpus (`spec/vectors/index.json`) rely on them.
"""

from __future__ import annotations


class D3MError(Exception):
    """Root of all errors of d3pack."""

    code = "E_D3M"
    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        text = f"[{self.code}] {self.args[0]}"
        return f"{text}; {self.hint}" if self.hint else text


class UsageError(D3MError):
    """A call that cannot be meant: contradicting options, an index out of range."""

    code = "E_USAGE"
    exit_code = 2


class InvalidPackError(D3MError):
    """The bytes are not a valid pack."""

    code = "E_PACK"
    exit_code = 3


class BackboneError(D3MError):
    """The diffusion backbone cannot be used as the pack demands."""

    code = "E_BACKBONE"
    exit_code = 4


class NotFoundError(D3MError):
    """A file, directory or repository is not there."""

    code = "E_NOT_FOUND"
    exit_code = 5


class HubError(D3MError):
    """The Hugging Face Hub answered with a failure, or could not be reached."""

    code = "E_HUB"
    exit_code = 6


class HubOfflineError(HubError):
    """Offline, and not in the cache."""

    code = "E_HUB_OFFLINE"


class HubAccessError(HubError):
    """Gated, forbidden, or the token is wrong."""

    code = "E_HUB_ACCESS"


class HubBusyError(HubError):
    """The Hub limits, fails or falls silent: the same call may work later."""

    code = "E_HUB_BUSY"


class HubBytesError(HubError):
    """Other bytes, or another part of the file, than were asked for."""

    code = "E_HUB_BYTES"


class RootPinError(HubError):
    """The pack is valid but not the one that the address pins."""

    code = "E_HUB_PIN"


class SignatureError(HubError):
    """A signature is missing, does not cover the pack, or is another's."""

    code = "E_HUB_SIGNATURE"


class SourceError(D3MError):
    """A tree, archive or table of real images cannot be used."""

    code = "E_SOURCE"
    exit_code = 7

"""Every error d3pack raises on purpose.

    D3MError                     E_D3M                  exit 1
    ├── UsageError               E_USAGE                exit 2   the call cannot be meant
    ├── InvalidPackError         E_PACK                 exit 3   not a pack: one class a rule
    │   ├── TruncatedError       E_TRUNCATED            the file ends before its header says
    │   ├── LimitError           E_LIMIT                a limit of the format is exceeded
    │   ├── HeaderError          E_HEADER               no safetensors header with one `d3m` entry
    │   ├── JsonError            E_JSON                 not JSON as the format allows it
    │   ├── VersionError         E_VERSION              a newer major version
    │   ├── FeatureError         E_FEATURE              a required feature, unknown here
    │   ├── CanonError           E_CANON                the same content, spelled otherwise
    │   ├── ManifestError        E_MANIFEST             a field missing, unknown or of a wrong type
    │   ├── RootError            E_ROOT                 the identity does not match the manifest
    │   ├── RecipeError          E_RECIPE               a recipe that cannot be followed
    │   ├── SectionError         E_SECTION              missing, unknown, repeated or out of order
    │   ├── CodecError           E_CODEC                unknown, or parameters it does not take
    │   ├── ShapeError           E_SHAPE                a tensor of another name, dtype or shape
    │   ├── TrailingError        E_TRAILING             bytes after the last tensor
    │   ├── PaddingError         E_PADDING              padding that is not zero
    │   ├── HashError            E_HASH                 a tensor's bytes are not the ones written
    │   ├── LeafError            E_LEAF                 a class's bytes do not match its leaf
    │   ├── ClassNameError       E_NAME                 empty, repeated or with controls
    │   ├── IdError              E_IDS                  class ids repeated or needless
    │   ├── PromptError          E_PROMPT               a prompt value that is not a number
    │   ├── PickError            E_PICKS                the same image twice
    │   ├── LabelError           E_LABEL                labels that are no distribution
    │   ├── AdapterError         E_ADAPTER              an adapter that does not fit its table
    │   └── ProbeError           E_PROBE                a reference image of no image of the pack
    ├── BackboneError            E_BACKBONE             exit 4   the generator: missing or refused
    │   ├── BackboneMissingError E_BACKBONE_MISSING     a needed file is not in the directory
    │   ├── BackboneChangedError E_BACKBONE_CHANGED     a file is not the one that was locked
    │   ├── BackboneRefusedError E_BACKBONE_REFUSED     pickles, remote code, paths outside
    │   ├── BackboneConfigError  E_BACKBONE_CONFIG      a config not of ours, or not sane
    │   ├── BackboneWeightsError E_BACKBONE_WEIGHTS     missing, left over, misshapen, not finite
    │   ├── BackboneGoneError    E_BACKBONE_GONE        the repository or revision no longer exists
    │   ├── BackboneGatedError   E_BACKBONE_GATED       the repository wants an accepted licence
    │   ├── BackboneOfflineError E_BACKBONE_OFFLINE     not downloaded yet, and no way to the Hub
    │   ├── PromptWidthError     E_BACKBONE_PROMPT      learned vectors of another shape
    │   ├── NotFiniteError       E_BACKBONE_NOT_FINITE  the images came out as no numbers
    │   └── DeviceMemoryError    E_BACKBONE_MEMORY      the device has no room for one group
    ├── NotFoundError            E_NOT_FOUND            exit 5   a file or a repository is not there
    ├── NoSpaceError             E_NO_SPACE             exit 1   the disk is full: nothing is lost
    ├── HubError                 E_HUB                  exit 6   the Hub, or the way to it
    │   ├── HubOfflineError      E_HUB_OFFLINE          offline, and not in the cache
    │   ├── HubAccessError       E_HUB_ACCESS           gated, forbidden, wrong token
    │   ├── HubBusyError         E_HUB_BUSY             limits, failures, silence: try later
    │   ├── HubBytesError        E_HUB_BYTES            not the bytes that were asked for
    │   ├── RootPinError         E_HUB_PIN              another pack than the address pins
    │   └── SignatureError       E_HUB_SIGNATURE        missing, not of this pack, or another's
    └── SourceError              E_SOURCE               exit 7   the real images cannot be used

Rooms have errors of their own below these, where only they can raise them: E_SOURCE_IMAGE
(`sources`), E_TRANSFORM (`dataset`), E_TEACHER and E_JOURNAL (`encode`), E_CLASSES and E_LONG
(`evaluate`).

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


class TruncatedError(InvalidPackError):
    """The file ends before its header says it does."""

    code = "E_TRUNCATED"


class LimitError(InvalidPackError):
    """A limit of the format is exceeded."""

    code = "E_LIMIT"


class HeaderError(InvalidPackError):
    """The file does not start with a safetensors header that holds one `d3m` entry."""

    code = "E_HEADER"


class JsonError(InvalidPackError):
    """The header is not JSON as the format allows it."""

    code = "E_JSON"


class VersionError(InvalidPackError):
    """The pack is of a newer major version."""

    code = "E_VERSION"


class FeatureError(InvalidPackError):
    """The pack requires a feature that this reader does not know."""

    code = "E_FEATURE"


class CanonError(InvalidPackError):
    """The content may be right, but it is not spelled in the one canonical way."""

    code = "E_CANON"


class ManifestError(InvalidPackError):
    """A field of the manifest is missing, unknown or of a wrong type."""

    code = "E_MANIFEST"


class RootError(InvalidPackError):
    """The identity written in the manifest is not the manifest's hash."""

    code = "E_ROOT"


class RecipeError(InvalidPackError):
    """The recipe cannot be followed."""

    code = "E_RECIPE"


class SectionError(InvalidPackError):
    """A section is missing, unknown, repeated or out of order."""

    code = "E_SECTION"


class CodecError(InvalidPackError):
    """A codec is unknown, or its parameters are not the ones that it takes."""

    code = "E_CODEC"


class ShapeError(InvalidPackError):
    """A tensor has another name, dtype or shape than its codec demands."""

    code = "E_SHAPE"


class TrailingError(InvalidPackError):
    """There are bytes after the last tensor."""

    code = "E_TRAILING"


class PaddingError(InvalidPackError):
    """Padding between tensors is not zero."""

    code = "E_PADDING"


class HashError(InvalidPackError):
    """A tensor's bytes are not the ones that were written."""

    code = "E_HASH"


class LeafError(InvalidPackError):
    """The bytes of one class do not match its leaf hash."""

    code = "E_LEAF"


class ClassNameError(InvalidPackError):
    """A class name is empty, repeated, too long or holds control characters."""

    code = "E_NAME"


class IdError(InvalidPackError):
    """Class ids are repeated, or written although they say nothing."""

    code = "E_IDS"


class PromptError(InvalidPackError):
    """A prompt holds a value that is not a finite number."""

    code = "E_PROMPT"


class PickError(InvalidPackError):
    """Curated choices would make the same image twice."""

    code = "E_PICKS"


class LabelError(InvalidPackError):
    """A soft label is not a distribution over the classes."""

    code = "E_LABEL"


class AdapterError(InvalidPackError):
    """The adapter does not fit its own table of tensors."""

    code = "E_ADAPTER"


class ProbeError(InvalidPackError):
    """A reference image belongs to no image of the pack."""

    code = "E_PROBE"


class BackboneError(D3MError):
    """The diffusion backbone cannot be used as the pack demands."""

    code = "E_BACKBONE"
    exit_code = 4


class BackboneMissingError(BackboneError):
    """A file that the backbone needs is not there."""

    code = "E_BACKBONE_MISSING"


class BackboneChangedError(BackboneError):
    """A file of the backbone is not the one that was locked."""

    code = "E_BACKBONE_CHANGED"


class BackboneRefusedError(BackboneError):
    """A kind of file that is never opened: pickles, code, paths that lead outside."""

    code = "E_BACKBONE_REFUSED"


class BackboneConfigError(BackboneError):
    """A config names an unknown model class, or asks for something that is not sane."""

    code = "E_BACKBONE_CONFIG"


class BackboneWeightsError(BackboneError):
    """Weights are missing, left over, of a wrong shape or dtype, or not finite."""

    code = "E_BACKBONE_WEIGHTS"


class BackboneGoneError(BackboneError):
    """The repository or its revision no longer exists."""

    code = "E_BACKBONE_GONE"


class BackboneGatedError(BackboneError):
    """The repository asks for an accepted licence or a token."""

    code = "E_BACKBONE_GATED"


class BackboneOfflineError(BackboneError):
    """The backbone is not on this machine, and the Hub cannot be reached."""

    code = "E_BACKBONE_OFFLINE"


class PromptWidthError(BackboneError):
    """The learned vectors have another shape than the backbone takes."""

    code = "E_BACKBONE_PROMPT"


class NotFiniteError(BackboneError):
    """The backbone made values that are no numbers."""

    code = "E_BACKBONE_NOT_FINITE"


class DeviceMemoryError(BackboneError):
    """The device has no room for one group of images."""

    code = "E_BACKBONE_MEMORY"


class NotFoundError(D3MError):
    """A file, directory or repository is not there."""

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

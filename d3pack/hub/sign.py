"""Detached signatures by OpenSSF model-signing: `imnet.d3m.sig` beside `imnet.d3m`."""

from __future__ import annotations

import base64
import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from d3pack.errors import HubError, HubOfflineError, NotFoundError, UsageError
from d3pack.hub.address import Address
from d3pack.hub.cache import fetch
from d3pack.system import disk_full_as_error, first_line, require

SUFFIX = ".sig"


@dataclass(frozen=True, slots=True)
class Trust:
    """Who must have signed: the holder of a key, or an identity that Sigstore vouches for."""

    public_key: Path | None = None
    identity: str | None = None
    issuer: str | None = None

    def __post_init__(self) -> None:
        if (self.identity is None) != (self.issuer is None):
            raise UsageError("an identity and its issuer belong together", hint="give both")
        if self.public_key is not None and self.identity is not None:
            raise UsageError("a key or an identity, not both")

    def __bool__(self) -> bool:
        return self.public_key is not None or self.identity is not None


def sign(data: bytes, name: str, key: Path | None) -> bytes:
    """The signature of a pack: with a private key (PEM), or without one by Sigstore's login."""
    library = _library()
    config = library.signing.Config()
    with _as_file(data, name) as path:
        out = path.with_name(path.name + SUFFIX)
        try:
            if key is not None:
                config.use_elliptic_key_signer(private_key=key)
            config.sign(path, out)
        except FileNotFoundError:
            raise NotFoundError(f"there is no key {key}") from None
        except Exception as error:
            raise HubError(
                f"signing failed: {first_line(error)}",
                code="E_HUB_SIGNATURE",
                hint="the key must be an elliptic-curve private key in PEM, without a password",
            ) from error
        return out.read_bytes()


def check(data: bytes, name: str, signature: bytes, trust: Trust) -> str:
    """Refuse a signature that does not cover these bytes or is another's; say what is proved."""
    if signed_digest(signature) != hashlib.sha256(data).hexdigest():
        raise HubError(
            f"the signature beside {name} is of other bytes",
            code="E_HUB_SIGNATURE",
            hint="the pack or its signature was replaced: ask the publisher",
        )
    if not trust:
        return "signed; the signer was not checked"
    library = _library()
    config = library.verifying.Config()
    who = trust.identity if trust.public_key is None else f"the key {trust.public_key.name}"
    with _as_file(data, name) as path:
        beside = path.with_name(path.name + SUFFIX)
        beside.write_bytes(signature)
        try:
            if trust.public_key is not None:
                config.use_elliptic_key_verifier(public_key=trust.public_key)
            else:
                config.use_sigstore_verifier(identity=trust.identity, oidc_issuer=trust.issuer)
            config.verify(path, beside)
        except FileNotFoundError:
            raise NotFoundError(f"there is no key {trust.public_key}") from None
        except Exception as error:
            raise HubError(
                f"{name} is not signed by {who}: {first_line(error)}",
                code="E_HUB_SIGNATURE",
                hint="do not use it unless the publisher confirms another signer",
            ) from error
    return f"signed by {who}"


def check_remote(address: Address, data: bytes, trust: Trust, *, required: bool) -> str:
    """Look for a signature beside a pulled pack, at the same commit, and check it."""
    name = str(address.file).rpartition("/")[2]
    try:
        path, _ = fetch(replace(address, file=f"{address.file}{SUFFIX}", root=None))
    except NotFoundError:
        if required or trust:
            raise HubError(
                f"{address.repo} holds no signature of {name}",
                code="E_HUB_SIGNATURE",
                hint="ask the publisher for one (`d3pack push --sign`), or pull without asking",
            ) from None
        return "not signed"
    except HubOfflineError:
        if required or trust:
            raise
        return "not looked for: offline"
    return check(data, name, path.read_bytes(), trust)


def signed_digest(signature: bytes) -> str:
    """The sha256 that a signature is about; whether it is genuine is another question."""
    try:
        envelope = json.loads(signature)["dsseEnvelope"]
        statement = json.loads(base64.b64decode(envelope["payload"], validate=True))
        (resource,) = statement["predicate"]["resources"]
        if resource["algorithm"] != "sha256":
            raise ValueError(resource["algorithm"])
        return str(resource["digest"])
    except (ValueError, KeyError, TypeError):
        raise HubError(
            "the signature is not one of OpenSSF model-signing over a sha256",
            code="E_HUB_SIGNATURE",
            hint="sign the pack again",
        ) from None


def _library() -> Any:
    return require("model_signing", "signing")


@contextmanager
def _as_file(data: bytes, name: str) -> Iterator[Path]:
    """The very bytes that were read, as the file that the library wants: no symlink, no race."""
    with disk_full_as_error(), tempfile.TemporaryDirectory(prefix="d3pack-") as folder:
        path = Path(folder) / name.rpartition("/")[2]
        path.write_bytes(data)
        yield path

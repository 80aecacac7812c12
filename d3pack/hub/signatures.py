"""Detached signatures by OpenSSF model-signing: `imnet.d3m.sig` beside `imnet.d3m`."""

from __future__ import annotations

import base64
import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from d3pack.errors import HubError, HubOfflineError, NotFoundError
from d3pack.hub.address import Address
from d3pack.hub.cache import fetch
from d3pack.hub.settings import Trust
from d3pack.system import disk_full_as_error, first_line, require

SUFFIX = ".sig"
MAX_BYTES = 1_000_000  # of a signature; those of Sigstore have about ten thousand


def sign(data: bytes, name: str, key: Path | None) -> bytes:
    """Return the signature of a pack, by a private key (PEM) or else by a login at Sigstore."""
    library = require("model_signing", "signing")
    config = library.signing.Config()
    with _as_file(data, name) as path:
        out = path.with_name(path.name + SUFFIX)
        hint = "the key must be an elliptic-curve private key in PEM, without a password"
        with _failing_with("signing failed", hint, key):
            if key is not None:
                config.use_elliptic_key_signer(private_key=key)
            config.sign(path, out)
        return out.read_bytes()


def check_signature(data: bytes, name: str, signature: bytes, trust: Trust) -> str:
    """Return in words what a signature proves.

    Raises:
        HubError: it is of other bytes, or of another signer.
    """
    if signed_digest(signature) != hashlib.sha256(data).hexdigest():
        raise HubError(
            f"the signature beside {name} is of other bytes",
            code="E_HUB_SIGNATURE",
            hint="the pack or its signature was replaced: ask the publisher",
        )
    if not trust.names_signer:
        return "signed; the signer was not checked"
    library = require("model_signing", "signing")
    config = library.verifying.Config()
    signer = trust.identity if trust.public_key is None else f"the key {trust.public_key.name}"
    with _as_file(data, name) as path:
        signature_path = path.with_name(path.name + SUFFIX)
        signature_path.write_bytes(signature)
        hint = "do not use it unless the publisher confirms another signer"
        with _failing_with(f"{name} is not signed by {signer}", hint, trust.public_key):
            if trust.public_key is not None:
                config.use_elliptic_key_verifier(public_key=trust.public_key)
            else:
                config.use_sigstore_verifier(identity=trust.identity, oidc_issuer=trust.issuer)
            config.verify(path, signature_path)
    return f"signed by {signer}"


def check_remote(address: Address, data: bytes, trust: Trust) -> str:
    """Check the signature beside a pack, at the same commit, and return in words what it proves."""
    name = str(address.file).rpartition("/")[2]
    try:
        path, _ = fetch(replace(address, file=f"{address.file}{SUFFIX}", root=None))
    except NotFoundError:
        if trust.required or trust.names_signer:
            raise HubError(
                f"{address.repo} holds no signature of {name}",
                code="E_HUB_SIGNATURE",
                hint="ask the publisher to sign the pack, or pull it without requiring a signature",
            ) from None
        return "not signed"
    except HubOfflineError:
        if trust.required or trust.names_signer:
            raise
        return "not looked for: offline"
    return check_signature(data, name, _read(path, name), trust)


def _read(path: Path, name: str) -> bytes:
    """Return a signature from the cache; one that is too long to be one is not read."""
    with path.open("rb") as file:
        signature = file.read(MAX_BYTES + 1)
    if len(signature) > MAX_BYTES:
        raise HubError(
            f"the signature beside {name} has more than {MAX_BYTES:,} bytes",
            code="E_HUB_SIGNATURE",
            hint="the pack or its signature was replaced: ask the publisher",
        )
    return signature


def signed_digest(signature: bytes) -> str:
    """Return the SHA-256 that a signature is about; whether it is genuine is not checked."""
    try:
        envelope = json.loads(signature)["dsseEnvelope"]
        statement = json.loads(base64.b64decode(envelope["payload"], validate=True))
        (resource,) = statement["predicate"]["resources"]
        if resource["algorithm"] != "sha256":
            raise ValueError(resource["algorithm"])
        return str(resource["digest"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise HubError(
            "the signature is not one of OpenSSF model-signing over a sha256",
            code="E_HUB_SIGNATURE",
            hint="sign the pack again",
        ) from None


@contextmanager
def _failing_with(message: str, hint: str, key: Path | None) -> Iterator[None]:
    """Turn whatever model-signing raises into one line."""
    try:
        yield
    except FileNotFoundError:
        raise NotFoundError(f"there is no key {key}") from None
    except Exception as error:
        text = f"{message}: {first_line(error)}"
        raise HubError(text, code="E_HUB_SIGNATURE", hint=hint) from error


@contextmanager
def _as_file(data: bytes, name: str) -> Iterator[Path]:
    """Yield a file with the bytes that were read, so that nobody can replace them meanwhile."""
    with disk_full_as_error(), tempfile.TemporaryDirectory(prefix="d3pack-") as folder:
        path = Path(folder) / name.rpartition("/")[2]
        path.write_bytes(data)
        yield path

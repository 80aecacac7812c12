"""Signatures: what they cover, who has signed, and what is refused."""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from pathlib import Path

import pytest
from hub_loopback import LoopbackHub
from hub_packs import make_pack

from d3pack.errors import NotFoundError, UsageError
from d3pack.format import pack_bytes
from d3pack.hub import PushSettings, Trust, parse_address, prepare_push, send_push, signatures
from d3pack.hub.download import download
from d3pack.testing import raises_code

DATA = pack_bytes(make_pack())
OTHER = pack_bytes(make_pack(seed=2))


def statement(data: bytes, algorithm: str = "sha256") -> bytes:
    """A signature's outer form, with nobody's signature in it."""
    payload = {
        "predicate": {
            "resources": [
                {"name": ".", "algorithm": algorithm, "digest": hashlib.sha256(data).hexdigest()}
            ]
        }
    }
    text = base64.b64encode(json.dumps(payload).encode()).decode()
    return json.dumps({"dsseEnvelope": {"payload": text, "signatures": []}}).encode()


def test_signature_of_other_bytes_is_refused_without_a_key() -> None:
    assert signatures.check_signature(DATA, "a.d3m", statement(DATA), Trust()).startswith(
        "signed; the signer was"
    )
    with raises_code("E_HUB_SIGNATURE", match=r"beside a\.d3m is of other bytes"):
        signatures.check_signature(DATA, "a.d3m", statement(OTHER), Trust())


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"\xff", b"[1]", b'{"dsseEnvelope": {"payload": "!!"}}', b"null",
     statement(DATA, "blake2"), b'{"dsseEnvelope": {"payload": "e30="}}'],
)  # fmt: skip
def test_invalid_signature_is_refused(data: bytes) -> None:
    with raises_code("E_HUB_SIGNATURE", match="not one of OpenSSF model-signing"):
        signatures.check_signature(DATA, "a.d3m", data, Trust())


def test_trust_names_a_key_or_an_identity_with_its_issuer() -> None:
    assert not Trust().names_signer
    assert Trust(Path("key.pub")).names_signer
    assert Trust(identity="kim@example.com", issuer="https://example.com").names_signer
    with pytest.raises(UsageError, match="go together"):
        Trust(identity="kim@example.com")
    with pytest.raises(UsageError, match="exclude each other"):
        Trust(Path("key.pub"), "kim@example.com", "https://example.com")


def test_check_remote_finds_the_signature_of_a_pulled_pack(hub: LoopbackHub) -> None:
    hub.put("org/set", {"a.d3m": DATA})
    pulled = download(parse_address("hf://datasets/org/set/a.d3m"))
    assert signatures.check_remote(pulled.address, DATA, Trust()) == "not signed"
    with raises_code("E_HUB_SIGNATURE", match=r"org/set holds no signature of a\.d3m"):
        signatures.check_remote(pulled.address, DATA, Trust(required=True))
    with raises_code("E_HUB_SIGNATURE", match="holds no signature"):
        signatures.check_remote(pulled.address, DATA, Trust(Path("key.pub")))
    hub.put("org/set", {"a.d3m.sig": statement(DATA)})
    pulled = download(parse_address("org/set"))
    text = signatures.check_remote(pulled.address, DATA, Trust(required=True))
    assert text == "signed; the signer was not checked"
    hub.put("org/set", {"a.d3m.sig": statement(OTHER)})
    pulled = download(parse_address("org/set"))
    with raises_code("E_HUB_SIGNATURE", match="of other bytes"):
        signatures.check_remote(pulled.address, DATA, Trust())


def test_long_or_deep_signature_is_refused_in_one_line(hub: LoopbackHub) -> None:
    for signature, says in ((b" " * 1_000_001, "more than 1,000,000 bytes"),
                            (b"[" * 100_000, "is not one of OpenSSF")):  # fmt: skip
        hub.put("org/set", {"a.d3m": DATA, "a.d3m.sig": signature})
        pulled = download(parse_address("org/set"))
        with raises_code("E_HUB_SIGNATURE", match=says):
            signatures.check_remote(pulled.address, DATA, Trust())


def test_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(UsageError, match=r"pip install 'd3pack\[sign\]'"):
        signatures.sign(DATA, "a.d3m", Path("key.pem"))


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Path]:
    pytest.importorskip("model_signing", reason="needs the extra: pip install 'd3pack[sign]'")
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    out = {}
    for name in ("ours", "theirs"):
        key = ec.generate_private_key(ec.SECP256R1())
        out[name] = tmp_path / f"{name}.pem"
        out[name].write_bytes(
            key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
        )
        out[f"{name}.pub"] = tmp_path / f"{name}.pub"
        out[f"{name}.pub"].write_bytes(
            key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
        )
    return out


def test_key_signs_and_verifies(keys: dict[str, Path], tmp_path: Path) -> None:
    signature = signatures.sign(DATA, "a.d3m", keys["ours"])
    assert signatures.signed_digest(signature) == hashlib.sha256(DATA).hexdigest()
    assert (
        signatures.check_signature(DATA, "a.d3m", signature, Trust(keys["ours.pub"]))
        == "signed by the key ours.pub"
    )
    with raises_code("E_HUB_SIGNATURE", match=r"a\.d3m is not signed by the key theirs\.pub"):
        signatures.check_signature(DATA, "a.d3m", signature, Trust(keys["theirs.pub"]))
    with raises_code("E_HUB_SIGNATURE", match="is of other bytes"):
        signatures.check_signature(OTHER, "a.d3m", signature, Trust(keys["ours.pub"]))
    value = json.loads(signature)
    value["dsseEnvelope"]["payload"] = json.loads(statement(OTHER))["dsseEnvelope"]["payload"]
    with raises_code("E_HUB_SIGNATURE", match=r"a\.d3m is not signed by"):
        signatures.check_signature(
            OTHER, "a.d3m", json.dumps(value).encode(), Trust(keys["ours.pub"])
        )
    with pytest.raises(NotFoundError, match="no key"):
        signatures.check_signature(DATA, "a.d3m", signature, Trust(tmp_path / "none.pub"))
    with raises_code("E_HUB_SIGNATURE", match="elliptic-curve private key"):
        signatures.sign(DATA, "a.d3m", keys["ours.pub"])
    with pytest.raises(NotFoundError, match="no key"):
        signatures.sign(DATA, "a.d3m", tmp_path / "none.pem")
    assert str(tmp_path).encode() not in base64.b64decode(value["dsseEnvelope"]["payload"])


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_signed_push_is_verified_on_pull(
    hub: LoopbackHub, login: None, keys: dict[str, Path], tmp_path: Path
) -> None:

    (tmp_path / "a.d3m").write_bytes(DATA)
    settings = PushSettings(preview="none", sign=True, key=keys["ours"])
    done = send_push(prepare_push(tmp_path / "a.d3m", "org/set", settings), settings)
    assert "a.d3m.sig" in done.sent
    text = signatures.check_remote(done.address, DATA, Trust(keys["ours.pub"], required=True))
    assert text == "signed by the key ours.pub"
    with raises_code("E_HUB_SIGNATURE"):
        signatures.check_remote(done.address, DATA, Trust(keys["theirs.pub"], required=True))


def test_pack_in_a_folder_is_signed_by_its_own_name() -> None:
    with signatures._as_file(b"pack", "a/b.d3m") as path:
        assert (path.name, path.read_bytes()) == ("b.d3m", b"pack")

"""Every form of an address means one thing; everything else is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st

from d3pack.errors import D3MError, UsageError
from d3pack.hub import Address, is_address, parse_address

ROOT = "0123456789abcdef" * 4
COMMIT = "0123456789" * 4
FULL = Address("org/set", "a.d3m", "v1", ROOT)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("hf://datasets/org/set/a.d3m", Address("org/set", "a.d3m")),
        ("hf://datasets/org/set", Address("org/set")),
        ("hf://datasets/org/set/", Address("org/set")),
        ("hf://datasets/org/set@v1", Address("org/set", None, "v1")),
        ("hf://datasets/org/set@v1/deep/er/a.d3m", Address("org/set", "deep/er/a.d3m", "v1")),
        (f"hf://datasets/org/set@v1/a.d3m#sha256={ROOT}", FULL),
        ("hf://datasets/org/set@feature%2Fx/a.d3m", Address("org/set", "a.d3m", "feature/x")),
        ("hf://datasets/org/set@refs/pr/7/a.d3m", Address("org/set", "a.d3m", "refs/pr/7")),
        ("hf://datasets/org/set@refs/pr/7", Address("org/set", None, "refs/pr/7")),
        ("hf://datasets/o-r.g/s_e.t/a%20b.d3m", Address("o-r.g/s_e.t", "a b.d3m")),
        ("org/set", Address("org/set")),
        (f"org/set@{COMMIT}", Address("org/set", None, COMMIT)),
        (f"org/set@v1#sha256={ROOT}", Address("org/set", None, "v1", ROOT)),
        ("https://huggingface.co/datasets/org/set", Address("org/set")),
        ("https://huggingface.co/datasets/org/set/tree/v1", Address("org/set", None, "v1")),
        (f"https://huggingface.co/datasets/org/set/blob/v1/a.d3m#sha256={ROOT}", FULL),
        (
            "https://huggingface.co/datasets/org/set/resolve/main/a.d3m?download=true",
            Address("org/set", "a.d3m", "main"),
        ),
        (
            "https://huggingface.co/datasets/org/set/blob/refs%2Fpr%2F7/a.d3m",
            Address("org/set", "a.d3m", "refs/pr/7"),
        ),
        ("hf.co/datasets/org/set", Address("org/set")),
        ("huggingface.co/datasets/org/set/", Address("org/set")),
    ],
)
def test_address_is_read_in_every_form(text: str, address: Address) -> None:
    assert is_address(text)
    assert parse_address(text) == address
    assert parse_address(str(address)) == address


def test_address_on_an_endpoint_with_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://mirror.example:8080/hf")
    page = "http://mirror.example:8080/hf/datasets/org/set/blob/v1/a.d3m"
    assert parse_address(page) == Address("org/set", "a.d3m", "v1")
    assert parse_address(page).web == page


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("hf://org/set/a.d3m", "did you mean hf://datasets/org/set/a.d3m"),
        ("hf://models/org/set", "did you mean hf://datasets/org/set"),
        ("https://huggingface.co/org/set/blob/main/a.d3m", "not in a dataset repository"),
        ("hf://datasets/set", "expected a repository org/name"),
        ("hf://datasets/org/../a.d3m", "expected a repository org/name"),
        ("hf://datasets/org/set/../../a.d3m", "leads out of the repository"),
        ("hf://datasets/org/set/%2e%2e/a.d3m", "leads out of the repository"),
        ("hf://datasets/org/set/a%5c..%5cb.d3m", "leads out of the repository"),
        ("hf://datasets/org/set//a.d3m@", "expected one that ends in .d3m"),
        ("hf://datasets/org/set/a.zip", "expected one that ends in .d3m"),
        ("hf://datasets/org/set@/a.d3m", "expected a revision after @"),
        ("hf://datasets/org/set@..%2F..%2Fx/a.d3m", "expected a revision after @"),
        ("hf://datasets/org/set/a.d3m#md5=0", "64 lower-case hex digits"),
        (f"hf://datasets/org/set/a.d3m#sha256={ROOT[:-1]}", "64 lower-case hex digits"),
        (f"hf://datasets/org/set/a.d3m#sha256={ROOT.upper()}", "64 lower-case hex digits"),
        ("hf://datasets/org/set/a.d3m#", "64 lower-case hex digits"),
        ("https://example.com/datasets/org/set/resolve/main/a.d3m", "'example.com' is not the Hub"),
        ("https://huggingface.co.example.com/datasets/org/set", "is not the Hub"),
        ("https://huggingface.co/datasets/org/set/discussions/1", "/discussions/ has no pack"),
        ("hf://datasets/org/set/a b.d3m", "a space"),
        ("hf://datasets/org/set/a\x1b[31m.d3m", "a control character"),
        ("hf://datasets/org/set/a%1b[31m.d3m", "it holds control characters"),
        ("hf://datasets/org/set/a%e2%80%ae.d3m", "it holds control characters"),
        ("hf://datasets/o--rg/set", "expected a repository org/name"),
    ],
)
def test_invalid_address_is_refused(text: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_address(text)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_token_in_an_address_is_not_repeated() -> None:
    with pytest.raises(UsageError) as caught:
        parse_address("https://user:hf_secret@huggingface.co/datasets/org/set")
    assert "hf_secret" not in str(caught.value)


def test_existing_file_is_preferred_to_an_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_address("org/set")
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "set").write_bytes(b"")
    assert not is_address("org/set")


@pytest.mark.parametrize(
    "text", ["a.d3m", "data/a.d3m", "./org/set", "/org/set", "deep/er/set", "~/x", "set", ""]
)
def test_paths_are_not_addresses(text: str) -> None:
    assert not is_address(text)
    assert not is_address(Path("org/set"))


def outcome(text: str) -> Address | str:
    try:
        return parse_address(text)
    except D3MError as error:
        return str(error)


@given(st.text(max_size=60))
def test_any_text_is_an_address_or_one_line_of_error(text: str) -> None:
    for form in (text, f"hf://datasets/{text}", f"https://huggingface.co/datasets/{text}"):
        found = outcome(form)
        if isinstance(found, Address):
            assert outcome(str(found)) == found
        else:
            assert found.isprintable()

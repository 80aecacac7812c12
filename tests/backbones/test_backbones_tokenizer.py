"""Tokenizers: CLIP's give the library's ids, files of another shape never reach the library."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tiny_backbones import tiny_tokenizer

from d3pack.backbones import loading, mini_directory, open_backbone, tokenizer
from d3pack.testing import raises_code

TEXTS = (
    "a photo of a golden retriever",
    "NAÏVE café\u2003 it's 42nd!! we've don't",
    "<|endoftext|> in <|startoftext|>the <|endoftext| middle",
    "猫 と 犬 🐈 \u0130 e\u0301 ǅ",
    " \ta\n b\x00\x1b[31m\u202e ",
    "",
    "photo" * 200,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """tokenizer.json by who wrote it."""
    from transformers import CLIPTokenizer

    root = tmp_path_factory.mktemp("tokenizers")
    tiny_tokenizer(root / "vocab", layout="vocab")
    tiny_tokenizer(root / "tiny")
    CLIPTokenizer.from_pretrained(root / "vocab").save_pretrained(root / "clip")
    folders = {"tiny": root / "tiny", "transformers": root / "clip"}
    folders["mini"] = mini_directory() / "tokenizer"
    return {name: folder / "tokenizer.json" for name, folder in folders.items()}


def words(value: Any) -> Any:
    text = json.dumps(value)
    files = loading.Files({})
    files.read = lambda path: text.encode()  # type: ignore[method-assign]
    files._paths = {"tokenizer/tokenizer.json": Path("tokenizer.json")}
    return tokenizer.Words(files)


def older(value: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer as older libraries write it."""
    value["model"]["merges"] = [" ".join(merge) for merge in value["model"]["merges"]]
    for name in ("type", "byte_fallback", "ignore_merges"):
        value["model"].pop(name)
    for step in value["pre_tokenizer"]["pretokenizers"]:
        step.pop("use_regex", None)
        if step["type"] == "Split":
            regex = step["pattern"]["Regex"]
            step["pattern"]["Regex"] = regex.removeprefix(r"<\|startoftext\|>|<\|endoftext\|>|")
    return value


@pytest.mark.parametrize("writer", ["mini", "tiny", "transformers"])
@pytest.mark.parametrize("form", [lambda value: value, older], ids=["today", "older"])
def test_ids_are_those_of_the_library(
    writer: str, form: Callable[[Any], Any], saved: dict[str, Path]
) -> None:
    value = form(json.loads(saved[writer].read_text()))
    theirs, ours = tokenizers.Tokenizer.from_str(json.dumps(value)), words(value)
    for text in TEXTS:
        assert ours.ids(text) == theirs.encode(text, add_special_tokens=False).ids, text


def test_ids_of_vocabulary_and_merges_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    tiny_tokenizer(tmp_path / "tokenizer", layout="vocab")
    theirs = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    names = ("vocab.json", "merges.txt")
    ours = tokenizer.Words(
        loading.Files({f"tokenizer/{name}": tmp_path / "tokenizer" / name for name in names})
    )
    for text in (text for text in TEXTS if "<|" not in text):
        assert ours.ids(text) == theirs(text, add_special_tokens=False).input_ids, text


def nested(depth: int) -> dict[str, Any]:
    """Normalizers that make every character ten, each time: 10^depth characters."""
    step = {"type": "Replace", "pattern": {"Regex": "."}, "content": "a" * 10}
    return {"type": "Sequence", "normalizers": [step] * depth}


def put(*path: Any) -> Callable[[dict[str, Any]], None]:
    """Set what is at the path, all but its last item, to the last item."""
    *front, name, new = path

    def edit(value: dict[str, Any]) -> None:
        for key in front:
            value = value[key]
        value[name] = new

    return edit


def with_step(name: str, inner: str, step: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    return lambda value: value[name][inner].insert(0, step)


CATASTROPHE = {"Regex": "(a+)+$"}
HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "nested replacements": put("normalizer", nested(6)),
    "a sequence in a sequence": put("normalizer", {"type": "Sequence", "normalizers": [nested(3)]}),
    "replacement without end": put("normalizer", {"type": "Replace", "content": "aa"}),
    "the same step twice": with_step("normalizer", "normalizers", {"type": "NFC"}),
    "normalizer of another kind": put("normalizer", {"type": "Precompiled", "x": "AAAA"}),
    "no normalizer": put("normalizer", None),
    "a normalizer that is a list": put("normalizer", [1]),
    "regular expression that panics": put(
        "pre_tokenizer",
        "pretokenizers",
        0,
        {"type": "Split", "pattern": CATASTROPHE, "behavior": "Removed", "invert": True},
    ),
    "split that keeps": put("pre_tokenizer", "pretokenizers", 0, "behavior", "Isolated"),
    "more splits": with_step(
        "pre_tokenizer", "pretokenizers", {"type": "Split", "pattern": CATASTROPHE}
    ),
    "no pre-tokenizer": put("pre_tokenizer", None),
    "prefix space": put("pre_tokenizer", "pretokenizers", 1, "add_prefix_space", True),
    "another model": put("model", "type", "Unigram"),
    "no model": put("model", None),
    "dropout": put("model", "dropout", 0.5),
    "prefix of words": put("model", "continuing_subword_prefix", "##"),
    "byte fallback": put("model", "byte_fallback", True),
    "no vocabulary": put("model", "vocab", None),
    "ids that are text": put("model", "vocab", {"a": "b"}),
    "negative id": put("model", "vocab", {"a": -1}),
    "huge id": put("model", "vocab", {"a": 2**40}),
    "one id twice": put("model", "vocab", {"a": 1, "b": 1}),
    "long word": put("model", "vocab", {"a" * 1000: 1}),
    "merge without words": put("model", "merges", [["zz", "qq"]]),
    "merge of three": put("model", "merges", ["a b c"]),
    "merge of numbers": put("model", "merges", [[1, 2]]),
    "merges that are an object": put("model", "merges", {}),
    "added token elsewhere": put("added_tokens", 0, "id", 77),
    "added token that is empty": put("added_tokens", 0, "content", ""),
    "added token without flags": put("added_tokens", [{"id": 0, "content": "x"}]),
    "many added tokens": lambda value: value["added_tokens"].extend(value["added_tokens"] * 99),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_other_shapes_are_refused_before_they_run(case: str, saved: dict[str, Path]) -> None:
    value = json.loads(saved["transformers"].read_text())
    HOSTILE[case](value)
    started = time.perf_counter()
    with raises_code("E_BACKBONE_CONFIG", match="tokenizer"):
        words(value).ids("aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!")
    assert time.perf_counter() - started < 5


def test_a_tokenizer_over_64_megabytes_is_refused(sd: Path, saved: dict[str, Path]) -> None:
    text = saved["tiny"].read_text()
    (sd / "tokenizer" / "tokenizer.json").write_text(text + " " * loading.MAX_FILE)
    with raises_code("E_BACKBONE_CONFIG", match="more than 67108864 bytes"):
        open_backbone(str(sd))


def test_a_tokenizer_of_many_values_is_refused_before_it_is_parsed(
    sd: Path, saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve megabytes of lists would take 360 MB."""
    text = saved["tiny"].read_text().rstrip().removesuffix("}")
    lists = "[]," * (loading.MAX_MARKS // 2 + 1)
    (sd / "tokenizer" / "tokenizer.json").write_text(f'{text}, "x": [{lists}[]]}}')
    loads = json.loads
    monkeypatch.setattr("json.loads", lambda data: loads(data) if len(data) < 10**6 else 1 / 0)
    with raises_code("E_BACKBONE_CONFIG", match="more than 3000000 values"):
        open_backbone(str(sd))


def test_hostile_tokenizers_are_refused_when_a_backbone_is_opened(
    sd: Path, saved: dict[str, Path]
) -> None:
    value = json.loads(saved["transformers"].read_text())
    put("normalizer", nested(6))(value)
    (sd / "tokenizer" / "tokenizer.json").write_text(json.dumps(value))
    with raises_code("E_BACKBONE_CONFIG", match="normalizer is not that of a CLIP tokenizer"):
        open_backbone(str(sd))


def test_ids_beyond_the_embedding_table_are_refused(sd: Path) -> None:
    vocab = json.loads((sd / "tokenizer/vocab.json").read_text())
    vocab["z</w>"] = 5000
    (sd / "tokenizer/vocab.json").write_text(json.dumps(vocab))
    backbone: Any = open_backbone(str(sd))
    with raises_code("E_BACKBONE_CONFIG", match="beyond the embedding table"):
        backbone.sentence("z")

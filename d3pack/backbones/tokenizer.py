"""CLIP's tokenizer, from files that must have its shape.

A tokenizer.json can describe any program of normalizers and regular expressions, which may take all
memory or crash the process. So normalizer and splits must be those of CLIP, everything else must be
in bounds, and the library is given only what was checked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from d3pack.backbones.loading import Files, config_error
from d3pack.errors import BackboneError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_WORDS = 1 << 18  # CLIP has 49,408
MAX_ADDED = 64
MAX_LENGTH = 256  # characters of a word
_START, _END = "<|startoftext|>", "<|endoftext|>"
_WORD = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_SPECIAL = r"<\|startoftext\|>|<\|endoftext\|>|"
_LOWERCASE = {"type": "Lowercase"}
_SPACES = {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}
_NORMALIZERS: list[dict[str, Any]] = [
    {"type": "Sequence", "normalizers": [{"type": "NFC"}, _SPACES, _LOWERCASE]},  # CLIP's own
    _LOWERCASE,
]
_SPLITS: list[dict[str, Any]] = [
    *(
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Removed", "invert": True}
        for regex in (_SPECIAL + _WORD, _WORD)  # CLIP's own, of today's libraries and of older ones
    ),
    {"type": "WhitespaceSplit"},
]
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
# Fields of the model, and what they must be; the first value where they are missing.
_MODEL: dict[str, tuple[Any, ...]] = {
    "type": ("BPE",),
    "dropout": (None,),
    "unk_token": (None, _END),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": ("</w>",),
    "fuse_unk": (False,),
    "byte_fallback": (False,),
    "ignore_merges": (False,),
}


class Words:
    """A CLIP tokenizer, without the start, end and padding that its users add differently."""

    def __init__(self, files: Files, folder: str = "tokenizer") -> None:
        self._tokenizer = _read(files, folder)
        self.start, self.end = self._special(_START), self._special(_END)
        self.pad = self._special(_pad_token(files, folder))

    def ids(self, text: str) -> list[int]:
        """Return the ids of the words alone."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _special(self, token: str) -> int:
        index = self._tokenizer.token_to_id(token)
        if index is None:
            raise config_error(f"the tokenizer does not know {token}")
        return int(index)


def _pad_token(files: Files, folder: str) -> str:
    """Return the token that fills prompts up: SD 1.x uses the end token, SD 2.x "!"."""
    for path in (f"{folder}/special_tokens_map.json", f"{folder}/tokenizer_config.json"):
        if path in files:
            token = files.json(path).get("pad_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                return token
    return _END


def _read(files: Files, folder: str) -> Tokenizer:
    if f"{folder}/tokenizer.json" in files:
        return _build(files.json(f"{folder}/tokenizer.json"))
    try:
        lines = files.read(f"{folder}/merges.txt").decode("utf-8").splitlines()
    except UnicodeDecodeError:
        raise config_error(f"{folder}/merges.txt is not UTF-8") from None
    merges = [line.split() for line in lines if line and not line.startswith("#version")]
    vocab = files.json(f"{folder}/vocab.json")
    model = {"vocab": vocab, "merges": merges, "end_of_word_suffix": "</w>", "unk_token": _END}
    split = {"type": "Sequence", "pretokenizers": [_SPLITS[0], _BYTES]}
    return _build({"model": model, "normalizer": _NORMALIZERS[0], "pre_tokenizer": split})


def _build(value: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json; fields that encoding does not use are ignored."""
    from tokenizers import Tokenizer

    model, splits = value.get("model"), value.get("pre_tokenizer")
    if not isinstance(model, dict):
        raise _shape_error("model")
    for name, allowed in _MODEL.items():
        if model.get(name, allowed[0]) not in allowed:
            raise _shape_error(f"model.{name}")
    if value.get("normalizer") not in _NORMALIZERS:
        raise _shape_error("normalizer")
    steps = splits.get("pretokenizers") if isinstance(splits, dict) else None
    if not isinstance(steps, list) or len(steps) != 2 or steps[0] not in _SPLITS:
        raise _shape_error("pre_tokenizer")
    if not isinstance(steps[1], dict) or {**_BYTES, **steps[1], "trim_offsets": True} != _BYTES:
        raise _shape_error("pre_tokenizer")
    vocab, added = _check_vocab(model.get("vocab")), _check_added(value.get("added_tokens"))
    checked = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": value["normalizer"],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [steps[0], _BYTES]},
        "model": {
            **{name: model.get(name, allowed[0]) for name, allowed in _MODEL.items()},
            "vocab": vocab,
            "merges": _check_merges(model.get("merges"), vocab),
        },
    }
    try:
        tokenizer = Tokenizer.from_str(json.dumps(checked))
    except Exception as error:  # the library has no type of its own for what it refuses
        raise config_error(f"the tokenizer cannot be read: {error}") from None
    if any(tokenizer.token_to_id(token["content"]) != token["id"] for token in added):
        raise _shape_error("added_tokens")
    return tokenizer


def _check_vocab(vocab: Any) -> dict[str, int]:
    if not isinstance(vocab, dict) or not 1 <= len(vocab) <= MAX_WORDS:
        raise config_error(f"the tokenizer has not 1 to {MAX_WORDS} words")
    ids = list(vocab.values())
    if not all(type(index) is int and 0 <= index < 2 * MAX_WORDS for index in ids):
        raise config_error("the tokenizer has ids that are not small integers")
    if len(set(ids)) != len(ids) or max(map(len, vocab)) > MAX_LENGTH:
        raise config_error(f"the tokenizer has one id twice, or words over {MAX_LENGTH} characters")
    return vocab


def _check_merges(merges: Any, vocab: dict[str, int]) -> list[list[str]]:
    """Return merges as pairs, from "a b" or ["a", "b"]."""
    if not isinstance(merges, list) or len(merges) > MAX_WORDS:
        raise config_error(f"the tokenizer has not a list of at most {MAX_WORDS} merges")
    pairs = []
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(type(p) is str for p in pair):
            raise config_error(f"the tokenizer has a merge {merge!r:.80}, which is not a pair")
        if any(word not in vocab for word in (*pair, "".join(pair))):
            raise config_error(f"the tokenizer merges {merge!r:.80}, which it has no words for")
        pairs.append(pair)
    return pairs


def _check_added(tokens: Any) -> list[dict[str, Any]]:
    """Return special tokens, which text may contain, with their flags and ids."""
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    tokens = [] if tokens is None else tokens
    if not isinstance(tokens, list) or len(tokens) > MAX_ADDED:
        raise _shape_error("added_tokens")
    for token in tokens:
        if not isinstance(token, dict) or set(token) != {"id", "content", *flags}:
            raise _shape_error("added_tokens")
        is_text = type(token["content"]) is str and 1 <= len(token["content"]) <= MAX_LENGTH
        is_id = type(token["id"]) is int and 0 <= token["id"] < 2 * MAX_WORDS
        if not is_text or not is_id or not all(type(token[flag]) is bool for flag in flags):
            raise _shape_error("added_tokens")
    return tokens


def _shape_error(part: str) -> BackboneError:
    return config_error(f"tokenizer/tokenizer.json: {part} is not that of a CLIP tokenizer")

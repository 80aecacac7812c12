"""Tokenizers of CLIP, Gemma and Qwen, from files that must have their shape.

A tokenizer.json can describe any program of normalizers and regular expressions, which may take all
memory or crash the process. So normalizer and splits must be those of CLIP, Gemma or Qwen,
everything else must be in bounds, and the library is given only what was checked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from d3pack.backbones.loading import Files, config_error
from d3pack.errors import BackboneError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_WORDS = 1 << 18  # CLIP has 49,408
MAX_ADDED = 64
MAX_PIECES = 16  # text and special tokens around it; Gemma has 2
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
_BYTE_WORDS = {f"<0x{byte:02X}>" for byte in range(256)}  # what unknown words may fall back to
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


@dataclass(frozen=True, slots=True)
class _Shape:
    """What a tokenizer.json must hold."""

    name: str
    normalizers: tuple[Any, ...]
    splits: tuple[Any, ...]
    model: Mapping[str, tuple[Any, ...]]
    merges: int = MAX_WORDS
    added: int = MAX_ADDED
    length: int = MAX_LENGTH


_CLIP_SHAPE = _Shape(
    "a CLIP",
    tuple(_NORMALIZERS),
    tuple({"type": "Sequence", "pretokenizers": [split, _BYTES]} for split in _SPLITS),
    _MODEL,
)
_LANGUAGE = {**_MODEL, "continuing_subword_prefix": ("", None), "end_of_word_suffix": ("", None)}
_QWEN_WORD = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_SPLIT = {
    "type": "Split",
    "pattern": {"Regex": _QWEN_WORD},
    "behavior": "Isolated",
    "invert": False,
}
LANGUAGES: Mapping[str, _Shape] = {
    "gemma": _Shape(
        "a Gemma",
        ({"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},),
        (
            {
                "type": "Split",
                "pattern": {"String": " "},
                "behavior": "MergedWithPrevious",
                "invert": False,
            },
            None,
        ),
        {**_LANGUAGE, "unk_token": ("<unk>",), "fuse_unk": (True,), "byte_fallback": (True,)},
        merges=1 << 20,  # Gemma has 580,604
        added=1 << 12,
        length=1 << 10,
    ),
    "qwen": _Shape(
        "a Qwen",
        ({"type": "NFC"},),
        ({"type": "Sequence", "pretokenizers": [_QWEN_SPLIT, {**_BYTES, "use_regex": False}]},),
        {**_LANGUAGE, "unk_token": (None,)},
        added=1 << 10,
        length=1 << 10,
    ),
}


class LanguageWords:
    """The tokenizer of a language model, with the special tokens that it puts around a text."""

    def __init__(self, files: Files, kind: str) -> None:
        path = "tokenizer/tokenizer.json"
        value = files.json(path)
        self._tokenizer = _build(value, LANGUAGES[kind])
        self._before, self._after = _around(value.get("post_processor"), self._tokenizer)

    def ids(self, text: str, most: int | None = None) -> list[int]:
        """Return the ids of a text, in which special tokens may stand, or the first `most` of it.

        What is put around the text is never cut off.
        """
        inner = self._tokenizer.encode(text, add_special_tokens=False).ids
        if most is not None:
            inner = inner[: max(0, most - len(self._before) - len(self._after))]
        return [*self._before, *inner, *self._after]


def _around(processor: Any, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the ids that a post-processor puts before and after a text."""
    value = processor if isinstance(processor, dict) else {}
    inner = value.get("processors") if value.get("type") == "Sequence" else [value]
    for step in inner if isinstance(inner, list) else []:
        if not isinstance(step, dict) or step.get("type") != "TemplateProcessing":
            continue
        sides: tuple[list[int], list[int]] = ([], [])
        after = 0
        pieces = step.get("single")
        if not isinstance(pieces, list) or len(pieces) > MAX_PIECES:
            raise config_error(f"the tokenizer's post-processor has not up to {MAX_PIECES} pieces")
        for piece in pieces:
            token = piece.get("SpecialToken") if isinstance(piece, dict) else None
            if not isinstance(token, dict):
                after = 1
                continue
            index = tokenizer.token_to_id(str(token.get("id")))
            if index is None:
                raise config_error(f"the tokenizer does not know {token.get('id')!r:.80}")
            sides[after].append(index)
        return sides
    return [], []


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
        return _build(files.json(f"{folder}/tokenizer.json"), _CLIP_SHAPE)
    try:
        lines = files.read(f"{folder}/merges.txt").decode("utf-8").splitlines()
    except UnicodeDecodeError:
        raise config_error(f"{folder}/merges.txt is not UTF-8") from None
    merges = [line.split() for line in lines if line and not line.startswith("#version")]
    vocab = files.json(f"{folder}/vocab.json")
    model = {"vocab": vocab, "merges": merges, "end_of_word_suffix": "</w>", "unk_token": _END}
    split = {"type": "Sequence", "pretokenizers": [_SPLITS[0], _BYTES]}
    value = {"model": model, "normalizer": _NORMALIZERS[0], "pre_tokenizer": split}
    return _build(value, _CLIP_SHAPE)


def _build(value: Mapping[str, Any], shape: _Shape) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json; fields that encoding does not use are ignored."""
    from tokenizers import Tokenizer

    model, split = value.get("model"), _plain_split(value.get("pre_tokenizer"))
    if not isinstance(model, dict):
        raise _shape_error("model", shape)
    for name, allowed in shape.model.items():
        if model.get(name, allowed[0]) not in allowed:
            raise _shape_error(f"model.{name}", shape)
    if value.get("normalizer") not in shape.normalizers:
        raise _shape_error("normalizer", shape)
    if split not in [_plain_split(allowed) for allowed in shape.splits]:
        raise _shape_error("pre_tokenizer", shape)
    vocab = _check_vocab(model.get("vocab"), shape)
    added = _check_added(value.get("added_tokens"), shape)
    unknown = model.get("unk_token", shape.model["unk_token"][0])
    if unknown is not None and unknown not in vocab and not vocab.keys() >= _BYTE_WORDS:
        raise config_error(f"the tokenizer has no word {unknown}, which stands for unknown ones")
    checked = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": value["normalizer"],
        "pre_tokenizer": split,
        "model": {
            **{name: model.get(name, allowed[0]) for name, allowed in shape.model.items()},
            "vocab": vocab,
            "merges": _check_merges(model.get("merges"), vocab, shape),
        },
    }
    try:
        tokenizer = Tokenizer.from_str(json.dumps(checked))
    except Exception as error:  # the library has no type of its own for what it refuses
        raise config_error(f"the tokenizer cannot be read: {error}") from None
    if any(tokenizer.token_to_id(token["content"]) != token["id"] for token in added):
        raise _shape_error("added_tokens", shape)
    return tokenizer


def _plain_split(value: Any) -> Any:
    """Return a pre-tokenizer with the fields of `_BYTES` that may be missing, and those alone."""
    steps = value.get("pretokenizers") if isinstance(value, dict) else None
    if not isinstance(steps, list):
        return value
    plain = [
        {**_BYTES, **step, "trim_offsets": True}
        if isinstance(step, dict) and step.get("type") == "ByteLevel"
        else step
        for step in steps
    ]
    return {**value, "pretokenizers": plain}


def _check_vocab(vocab: Any, shape: _Shape) -> dict[str, int]:
    if not isinstance(vocab, dict) or not 1 <= len(vocab) <= MAX_WORDS:
        raise config_error(f"the tokenizer has not 1 to {MAX_WORDS} words")
    ids = list(vocab.values())
    if not all(type(index) is int and 0 <= index < 2 * MAX_WORDS for index in ids):
        raise config_error("the tokenizer has ids that are not small integers")
    if len(set(ids)) != len(ids) or max(map(len, vocab)) > shape.length:
        raise config_error(
            f"the tokenizer has one id twice, or words over {shape.length} characters"
        )
    return vocab


def _check_merges(merges: Any, vocab: dict[str, int], shape: _Shape) -> list[list[str]]:
    """Return merges as pairs, from "a b" or ["a", "b"]."""
    if not isinstance(merges, list) or len(merges) > shape.merges:
        raise config_error(f"the tokenizer has not a list of at most {shape.merges} merges")
    pairs = []
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(type(p) is str for p in pair):
            raise config_error(f"the tokenizer has a merge {merge!r:.80}, which is not a pair")
        if any(word not in vocab for word in (*pair, "".join(pair))):
            raise config_error(f"the tokenizer merges {merge!r:.80}, which it has no words for")
        pairs.append(pair)
    return pairs


def _check_added(tokens: Any, shape: _Shape) -> list[dict[str, Any]]:
    """Return special tokens, which text may contain, with their flags and ids."""
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    tokens = [] if tokens is None else tokens
    if not isinstance(tokens, list) or len(tokens) > shape.added:
        raise _shape_error("added_tokens", shape)
    for token in tokens:
        if not isinstance(token, dict) or set(token) != {"id", "content", *flags}:
            raise _shape_error("added_tokens", shape)
        is_text = type(token["content"]) is str and 1 <= len(token["content"]) <= MAX_LENGTH
        is_id = type(token["id"]) is int and 0 <= token["id"] < 2 * MAX_WORDS
        if not is_text or not is_id or not all(type(token[flag]) is bool for flag in flags):
            raise _shape_error("added_tokens", shape)
    return tokens


def _shape_error(part: str, shape: _Shape) -> BackboneError:
    return config_error(f"tokenizer/tokenizer.json: {part} is not that of {shape.name} tokenizer")

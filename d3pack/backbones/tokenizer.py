"""CLIP's tokenizer, built again from the vocabulary and merges of a backbone's files.

A tokenizer.json can describe any program of normalizers and regular expressions, which may take all
memory or crash the process. So none is run: the file must have the shape that CLIP's tokenizers
have, within bounds, and a tokenizer of that shape is built from its parts.
"""

from __future__ import annotations

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
_SPLITS = (_SPECIAL + _WORD, _WORD)  # as today's libraries write it, and as older ones did
_CLIP_STEPS: list[dict[str, Any]] = [
    {"type": "NFC"},
    {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
    {"type": "Lowercase"},
]
_MODEL = {  # values that each field may have; None: also where it is missing
    "type": ("BPE", None),
    "dropout": (None,),
    "unk_token": (_END, None),
    "continuing_subword_prefix": ("", None),
    "end_of_word_suffix": ("</w>",),
    "fuse_unk": (False, None),
    "byte_fallback": (False, None),
    "ignore_merges": (False, None),
}


class Words:
    """A CLIP tokenizer, without the start, end and padding that its users add differently."""

    def __init__(self, files: Files) -> None:
        self._tokenizer = _read(files)
        self.start, self.end = self._special(_START), self._special(_END)
        self.pad = self._special(_pad_token(files))

    def ids(self, text: str) -> list[int]:
        """Return the ids of the words alone."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _special(self, token: str) -> int:
        index = self._tokenizer.token_to_id(token)
        if index is None:
            raise config_error(f"the tokenizer does not know {token}")
        return int(index)


def _pad_token(files: Files) -> str:
    """Return the token that fills prompts up: SD 1.x uses the end token, SD 2.x "!"."""
    for path in ("tokenizer/special_tokens_map.json", "tokenizer/tokenizer_config.json"):
        if path in files:
            token = files.json(path).get("pad_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                return token
    return _END


def _read(files: Files) -> Tokenizer:
    try:
        if "tokenizer/tokenizer.json" in files:
            return _from_json(files.json("tokenizer/tokenizer.json"))
        lines = files.read("tokenizer/merges.txt").decode("utf-8").splitlines()
        merges = [line.split() for line in lines if line and not line.startswith("#version")]
        tokenizer = _byte_pairs(files.json("tokenizer/vocab.json"), merges, _END)
        _add_steps(tokenizer, _CLIP_STEPS, [_SPLITS[0], "ByteLevel"])
    except BackboneError:
        raise
    except Exception as error:  # tokenizers raises plain Exception for every malformed value
        raise config_error(f"the tokenizer cannot be read: {error}") from None
    return tokenizer


def _from_json(value: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json; fields that encoding does not use are ignored."""
    model = value.get("model")
    if not isinstance(model, dict):
        raise _shape_error("model")
    for name, allowed in _MODEL.items():
        if not any(model.get(name) is item or model.get(name) == item for item in allowed):
            raise _shape_error(f"model.{name}")
    tokenizer = _byte_pairs(model.get("vocab"), model.get("merges"), model.get("unk_token"))
    steps = _flatten(value.get("normalizer"), "normalizers")
    for step in steps:
        if step not in _CLIP_STEPS or steps.count(step) > 1:
            raise _shape_error("normalizer")
    _add_steps(tokenizer, steps, _splits(value.get("pre_tokenizer")))
    _add_tokens(tokenizer, value.get("added_tokens"))
    return tokenizer


def _splits(value: Any) -> list[str]:
    """Return the steps that split text: regular expressions of CLIP, or names of other steps."""
    splits = []
    for step in _flatten(value, "pretokenizers"):
        kind, pattern = step.get("type"), step.get("pattern")
        regex = pattern.get("Regex") if isinstance(pattern, dict) else None
        if kind == "Split" and regex in _SPLITS:
            if (step.get("behavior"), step.get("invert")) != ("Removed", True):
                raise _shape_error("pre_tokenizer")
            splits.append(str(regex))
        elif kind == "WhitespaceSplit":
            splits.append(kind)
        elif kind == "ByteLevel" and step.get("use_regex", True) is True:
            if step.get("add_prefix_space") is not False:
                raise _shape_error("pre_tokenizer")
            splits.append(kind)
        else:
            raise _shape_error("pre_tokenizer")
    if len(splits) != 2 or splits[0] == "ByteLevel" or splits[1] != "ByteLevel":
        raise _shape_error("pre_tokenizer")
    return splits


def _flatten(value: Any, name: str) -> list[dict[str, Any]]:
    """Return the steps of a sequence, which may not hold another one; or the only step."""
    is_sequence = isinstance(value, dict) and value.get("type") == "Sequence"
    steps = value.get(name) if is_sequence else [value]
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise _shape_error(name)
    return steps


def _byte_pairs(vocab: Any, merges: Any, unknown: str | None) -> Tokenizer:
    """Return a tokenizer of checked words and merges, "a b" or ["a", "b"]."""
    from tokenizers import Tokenizer, models

    if not isinstance(vocab, dict) or not isinstance(merges, list):
        raise _shape_error("model.vocab or model.merges")
    if len(vocab) > MAX_WORDS or len(merges) > MAX_WORDS:
        raise config_error(f"the tokenizer has more than {MAX_WORDS} words or merges")
    ids = list(vocab.values())
    if not all(type(index) is int and 0 <= index < 2 * MAX_WORDS for index in ids):
        raise config_error("the tokenizer has ids that are not small integers")
    if len(set(ids)) != len(ids) or max(map(len, vocab), default=0) > MAX_LENGTH:
        raise config_error(f"the tokenizer has one id twice, or words over {MAX_LENGTH} characters")
    pairs = []
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(type(p) is str for p in pair):
            raise config_error(f"the tokenizer has a merge {merge!r:.80}, which is not a pair")
        if any(word not in vocab for word in (*pair, "".join(pair))):
            raise config_error(f"the tokenizer merges {merge!r:.80}, which it has no words for")
        pairs.append((pair[0], pair[1]))
    return Tokenizer(
        models.BPE(vocab=vocab, merges=pairs, end_of_word_suffix="</w>", unk_token=unknown)
    )


def _add_steps(tokenizer: Tokenizer, steps: list[dict[str, Any]], splits: list[str]) -> None:
    from tokenizers import Regex, normalizers, pre_tokenizers

    makers: dict[str, Any] = {
        "NFC": normalizers.NFC,
        "Replace": lambda: normalizers.Replace(Regex(r"\s+"), " "),
        "Lowercase": normalizers.Lowercase,
        "WhitespaceSplit": pre_tokenizers.WhitespaceSplit,
        "ByteLevel": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    }
    for regex in _SPLITS:
        split = pre_tokenizers.Split(Regex(regex), behavior="removed", invert=True)
        makers[regex] = lambda split=split: split
    tokenizer.normalizer = normalizers.Sequence([makers[step["type"]]() for step in steps])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([makers[split]() for split in splits])


def _add_tokens(tokenizer: Tokenizer, value: Any) -> None:
    """Add special tokens, which text may contain, with the ids that the file names."""
    from tokenizers import AddedToken

    tokens = [] if value is None else value
    if not isinstance(tokens, list) or len(tokens) > MAX_ADDED:
        raise _shape_error("added_tokens")
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    for token in tokens:
        if not isinstance(token, dict) or not all(type(token.get(f)) is bool for f in flags):
            raise _shape_error("added_tokens")
        content = token.get("content")
        if type(content) is not str or not 1 <= len(content) <= MAX_LENGTH:
            raise _shape_error("added_tokens")
        tokenizer.add_tokens([AddedToken(content, **{flag: token[flag] for flag in flags})])
        if tokenizer.token_to_id(content) != token.get("id"):
            raise _shape_error("added_tokens")


def _shape_error(part: str) -> BackboneError:
    return config_error(f"tokenizer/tokenizer.json: {part} is not that of a CLIP tokenizer")

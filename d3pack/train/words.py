"""What prompts look like: caption templates, the tokenizer, vectors that say where words lie."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModel, AutoTokenizer, CLIPTokenizer

TEMPLATE = "a photo of a {}"
TEMPLATES = (TEMPLATE, "{}", "a {}", "a picture of a {}", "a close-up of a {}")
COLLAGE_TEMPLATES = (
    "a 2x2 collage of {}",
    "a collage of four photos of a {}",
    "a photo of a {} collage",
)


def spoken(name: str) -> str:
    """A class name as one says it: `king_penguin` -> `king penguin`."""
    return " ".join(name.replace("_", " ").split()).lower()


def train_tokenizer(names: Sequence[str], size: int, max_tokens: int) -> CLIPTokenizer:
    """CLIP's byte-pair scheme, learned from `names` and the caption templates."""
    plain = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    assert isinstance(plain.normalizer, normalizers.Normalizer)
    assert isinstance(plain.pre_tokenizer, pre_tokenizers.PreTokenizer)
    learner.normalizer, learner.pre_tokenizer = plain.normalizer, plain.pre_tokenizer
    fillers = [t.format("") for t in TEMPLATES + COLLAGE_TEMPLATES]
    # every byte and every byte that ends a word, in one order: ids break ties between merges
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    endings = [f"{unit}</w>" for unit in alphabet]
    trainer = trainers.BpeTrainer(
        vocab_size=size - 2,
        initial_alphabet=alphabet,
        special_tokens=endings,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator([*names, *(50 * fillers)], trainer)
    found = json.loads(learner.to_str())["model"]["merges"]
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in found]
    units = [*alphabet, *endings, *("".join(merge) for merge in merges)]
    vocab = {unit: i for i, unit in enumerate(dict.fromkeys(units))}
    vocab["<|startoftext|>"], vocab["<|endoftext|>"] = len(vocab), len(vocab) + 1
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_tokens)


@torch.no_grad()
def sentence_vectors(names: Sequence[str], encoder: Path) -> NDArray[np.float32]:
    """Unit vectors of a mean-pooled sentence encoder (MiniLM and its kin), one a name."""
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    model = AutoModel.from_pretrained(encoder).eval()
    order = sorted(range(len(names)), key=lambda i: len(names[i]))
    vectors = np.empty((len(names), model.config.hidden_size), np.float32)
    for start in range(0, len(order), 256):
        rows = order[start : start + 256]
        batch = tokenizer([names[i] for i in rows], padding=True, return_tensors="pt")
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        vectors[rows] = torch.nn.functional.normalize(pooled, dim=-1).numpy()
    return vectors


def scattered_vectors(names: Sequence[str], width: int, seed: int) -> NDArray[np.float32]:
    """Stand-ins when no sentence encoder is given: every name its own random direction."""
    drawn = np.random.Generator(np.random.Philox(key=[seed, 7])).standard_normal(
        (len(names), width)
    )
    unit: NDArray[np.float32] = (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(
        np.float32
    )
    return unit

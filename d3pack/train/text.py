"""The text encoder: tokenizer, training and captions as conditions.

A small CLIP text encoder learns to place names as a sentence encoder does. It is then frozen: its
states for all captions of the training set are computed once. Words that no photograph is named
by keep their place among the class names.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from d3pack.train.config import TextConfig
from d3pack.train.data import batch_rows, spoken
from d3pack.train.loop import Batch

TEMPLATE = "a photo of a {}"
TEMPLATES = (TEMPLATE, "{}", "a {}", "a picture of a {}", "a close-up of a {}")
COLLAGE_TEMPLATES = (
    "a 2x2 collage of {}",
    "a collage of four photos of a {}",
    "a photo of a {} collage",
)


def train_tokenizer(names: Sequence[str], size: int, max_tokens: int) -> CLIPTokenizer:
    """Train a byte-pair tokenizer of CLIP's kind on `names` and the caption templates."""
    plain = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    assert isinstance(plain.normalizer, normalizers.Normalizer)
    assert isinstance(plain.pre_tokenizer, pre_tokenizers.PreTokenizer)
    learner.normalizer, learner.pre_tokenizer = plain.normalizer, plain.pre_tokenizer
    fillers = [t.format("") for t in TEMPLATES + COLLAGE_TEMPLATES]
    # every byte, and every byte that ends a word, in a fixed order: ids break ties between merges
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
    learned = json.loads(learner.to_str())["model"]["merges"]
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in learned]
    units = [*alphabet, *endings, *("".join(merge) for merge in merges)]
    vocab = {unit: i for i, unit in enumerate(dict.fromkeys(units))}
    vocab["<|startoftext|>"], vocab["<|endoftext|>"] = len(vocab), len(vocab) + 1
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_tokens)


@torch.no_grad()
def sentence_vectors(names: Sequence[str], encoder: Path) -> NDArray[np.float32]:
    """Return unit vectors of names by a mean-pooled sentence encoder, such as MiniLM."""
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
    """Return a random direction for each name, where no sentence encoder is given."""
    drawn = np.random.Generator(np.random.Philox(key=[seed, 7])).standard_normal(
        (len(names), width)
    )
    unit: NDArray[np.float32] = (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(
        np.float32
    )
    return unit


def build_text_encoder(config: TextConfig, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.width,
            intermediate_size=4 * config.width,
            projection_dim=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            max_position_embeddings=config.max_tokens,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    encoded = tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt")
    ids: Tensor = encoded["input_ids"]
    return ids


class TextModule(nn.Module):
    def __init__(self, model: CLIPTextModel, vector_width: int) -> None:
        super().__init__()
        self.model = model
        self.head = nn.Linear(model.config.hidden_size, vector_width)

    def point(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return unit vectors read at the end-of-text token and at the last padding token."""
        states = self.model(input_ids=ids).last_hidden_state
        end = (ids == self.model.config.eos_token_id).int().argmax(1)
        at_end = states[torch.arange(len(ids), device=ids.device), end]
        return (
            functional.normalize(self.head(at_end).float(), dim=-1),
            functional.normalize(self.head(states[:, -1]).float(), dim=-1),
        )

    def forward(self, ids: Tensor, vectors: Tensor) -> dict[str, Tensor]:
        relations = vectors @ vectors.T
        loss = vectors.new_zeros(())
        for found in self.point(ids):
            loss = loss + (1 - (found * vectors).sum(1)).mean()
            loss = loss + 10 * (found @ found.T - relations).square().mean()
        return {"loss": loss / 2}


class TextTask:
    """Train the text encoder; `names[:classes]` are class names, which come in every batch."""

    name = "text"

    def __init__(
        self,
        config: TextConfig,
        tokenizer: CLIPTokenizer,
        names: Sequence[str],
        vectors: NDArray[np.float32],
        classes: int,
        seed: int,
        start: Path | None = None,
    ) -> None:
        self.config, self.tokenizer, self.names, self.start = config, tokenizer, names, start
        self.vectors, self.classes, self.seed = torch.from_numpy(vectors), classes, seed

    def module(self) -> nn.Module:
        torch.manual_seed(self.seed)
        width = self.vectors.shape[1]
        if self.start is None:
            return TextModule(build_text_encoder(self.config, self.tokenizer), width)
        model = CLIPTextModel.from_pretrained(self.start / "text_encoder", dtype=torch.float32)
        return TextModule(model, width)

    def batch(self, step: int, rank: int, world: int, progress: float) -> Batch:
        at, batch = step * world + rank, self.config.loop.batch
        class_rows = min(self.classes, batch // 4)
        rows = np.concatenate(
            [
                batch_rows(self.classes, class_rows, at, self.seed),
                batch_rows(len(self.names), batch - class_rows, at, self.seed),
            ]
        )
        rng = np.random.Generator(np.random.Philox(key=[self.seed + 2, at]))
        every = TEMPLATES + COLLAGE_TEMPLATES
        picks = rng.integers(0, len(every), batch)
        texts = [every[p].format(self.names[r]) for p, r in zip(picks, rows, strict=True)]
        return {"ids": tokenize(self.tokenizer, texts), "vectors": self.vectors[rows]}

    @torch.no_grad()
    def validate(self, module: nn.Module) -> dict[str, float]:
        """Return how often a class name is nearest to its own vector among those of all names."""
        assert isinstance(module, TextModule)
        names = self.names[: self.classes]
        ids = tokenize(self.tokenizer, [TEMPLATES[0].format(name) for name in names])
        device = next(module.parameters()).device
        points = module.point(ids.to(device))[0].cpu()
        nearest = (points @ self.vectors.T).argmax(1)
        return {
            "cosine": float((points * self.vectors[: self.classes]).sum(1).mean()),
            "nearest": float((nearest == torch.arange(self.classes)).float().mean()),
        }

    def preview(self, module: nn.Module, path: Path) -> None:
        """Write nothing: this stage makes no images."""


STATES = "encoder_hidden_states"


@torch.no_grad()
def encode_captions(
    model: CLIPTextModel, tokenizer: CLIPTokenizer, captions: Sequence[str]
) -> Tensor:
    device = next(model.parameters()).device
    ids = tokenize(tokenizer, captions).to(device)
    return torch.cat(
        [model(input_ids=part).last_hidden_state.cpu() for part in torch.split(ids, 256)]
    )


class TextConditioner:
    """Captions as conditions: states of every (class, template), encoded once."""

    def __init__(
        self, model: CLIPTextModel, tokenizer: CLIPTokenizer, names: Sequence[str], drop: float
    ) -> None:
        every = TEMPLATES + COLLAGE_TEMPLATES
        texts = [template.format(spoken(name)) for name in names for template in every]
        states = encode_captions(model, tokenizer, ["", *texts])
        self.empty, self.drop = states[0], drop
        self.table = states[1:].reshape(len(names), len(every), *states.shape[1:])

    def for_training(
        self, labels: NDArray[np.int64], collage: NDArray[np.bool_], rng: np.random.Generator
    ) -> Batch:
        single = rng.integers(0, len(TEMPLATES), len(labels))
        # packs use the first template: it comes half of the time
        single[rng.random(len(labels)) < 0.5] = 0
        several = len(TEMPLATES) + rng.integers(0, len(COLLAGE_TEMPLATES), len(labels))
        states = self.table[labels, np.where(collage, several, single)]
        states[torch.from_numpy(rng.random(len(labels)) < self.drop)] = self.empty
        return {STATES: states}

    def for_sampling(self, labels: Sequence[int]) -> tuple[Batch, Batch]:
        states = self.table[torch.tensor(labels), 0]
        return {STATES: states}, {STATES: self.empty.expand_as(states)}

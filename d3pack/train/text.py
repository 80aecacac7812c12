"""Stage two: a small CLIP text encoder that learns where words lie from a sentence encoder.

It is then frozen: its states for all captions of the diet are computed once, and the words that
the photographs never name keep their place among those they do.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from d3pack.train.config import TextConfig
from d3pack.train.loop import Batch
from d3pack.train.photos import batch_rows
from d3pack.train.words import COLLAGE_TEMPLATES, TEMPLATES


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
    found = tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt")
    ids: Tensor = found["input_ids"]
    return ids


class TextModule(nn.Module):
    def __init__(self, model: CLIPTextModel, vector_width: int) -> None:
        super().__init__()
        self.model = model
        self.head = nn.Linear(model.config.hidden_size, vector_width)

    def point(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors read at the end-of-text token and at the last padding token."""
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
    """`names[:classes]` are the class names of the diet: they come in every batch."""

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
        mine = min(self.classes, batch // 4)
        rows = np.concatenate(
            [
                batch_rows(self.classes, mine, at, self.seed),
                batch_rows(len(self.names), batch - mine, at, self.seed),
            ]
        )
        rng = np.random.Generator(np.random.Philox(key=[self.seed + 2, at]))
        every = TEMPLATES + COLLAGE_TEMPLATES
        picks = rng.integers(0, len(every), batch)
        texts = [every[p].format(self.names[r]) for p, r in zip(picks, rows, strict=True)]
        return {"ids": tokenize(self.tokenizer, texts), "vectors": self.vectors[rows]}

    @torch.no_grad()
    def validate(self, module: nn.Module) -> dict[str, float]:
        """How often a class name lies nearest to its own vector, among those of all names."""
        assert isinstance(module, TextModule)
        names = self.names[: self.classes]
        ids = tokenize(self.tokenizer, [TEMPLATES[0].format(name) for name in names])
        device = next(module.parameters()).device
        found = module.point(ids.to(device))[0].cpu()
        nearest = (found @ self.vectors.T).argmax(1)
        return {
            "cosine": float((found * self.vectors[: self.classes]).sum(1).mean()),
            "nearest": float((nearest == torch.arange(self.classes)).float().mean()),
        }

    def preview(self, module: nn.Module, path: Path) -> None:
        """Nothing to look at: words have no picture yet."""

"""Captions as conditions: the frozen text encoder's states, looked up instead of computed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from d3pack.train.loop import Batch
from d3pack.train.text import tokenize
from d3pack.train.words import COLLAGE_TEMPLATES, TEMPLATES, spoken

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
    """Every caption of the diet, encoded once: (class, template) -> states."""

    def __init__(
        self, model: CLIPTextModel, tokenizer: CLIPTokenizer, names: Sequence[str], drop: float
    ) -> None:
        every = TEMPLATES + COLLAGE_TEMPLATES
        texts = [template.format(spoken(name)) for name in names for template in every]
        states = encode_captions(model, tokenizer, ["", *texts])
        self.empty, self.drop = states[0], drop
        self.table = states[1:].reshape(len(names), len(every), *states.shape[1:])

    def given(
        self, labels: NDArray[np.int64], collage: NDArray[np.bool_], rng: np.random.Generator
    ) -> Batch:
        single = rng.integers(0, len(TEMPLATES), len(labels))
        # the template that packs use comes half of the time
        single[rng.random(len(labels)) < 0.5] = 0
        several = len(TEMPLATES) + rng.integers(0, len(COLLAGE_TEMPLATES), len(labels))
        states = self.table[labels, np.where(collage, several, single)]
        states[torch.from_numpy(rng.random(len(labels)) < self.drop)] = self.empty
        return {STATES: states}

    def wanted(self, labels: Sequence[int]) -> tuple[Batch, Batch]:
        states = self.table[torch.tensor(labels), 0]
        return {STATES: states}, {STATES: self.empty.expand_as(states)}

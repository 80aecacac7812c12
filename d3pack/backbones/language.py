"""Language models as text encoders: Gemma 2, Qwen 3 and the encoder of T5Gemma.

They are opened to encode alone: packs of their outputs decode without them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from d3pack.backbones.loading import Files, build, config_error
from d3pack.backbones.tokenizer import LanguageWords
from d3pack.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Prompting:
    """How a family turns a text into outputs of its encoder."""

    model: str  # class of the encoder
    words: str  # its tokenizer: "gemma" or "qwen"
    around: str = "{}"  # what the encoder reads around the text
    instruction: str = ""  # read first; of its outputs, only that of the first token is used
    layers: tuple[int, ...] = ()  # hidden states that are joined; none: the last, normed
    lower: bool = False


class LanguageModel:
    """A text encoder and its tokenizer."""

    def __init__(
        self,
        files: Files,
        prompting: Prompting,
        most: int,  # tokens of a text; the pipelines cut longer ones too
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._prompting, self._device = prompting, device
        self.words = LanguageWords(files, prompting.words)
        # of an instruction, the outputs of all but the first and last token are left out
        read = len(self.words.ids(prompting.instruction)) if prompting.instruction else 0
        self._left_out = max(0, read - 2)
        self._most = most + self._left_out
        self.model = build(
            files, "text_encoder", "model", (prompting.model,), device=device, dtype=dtype
        )

    @torch.no_grad()
    def outputs(self, text: str) -> Tensor:
        """Return what the denoiser takes for a text, float32 (tokens, D), without padding."""
        how = self._prompting
        text = text.lower().strip() if how.lower else text
        ids = self.words.ids(how.instruction + how.around.format(text), self._most)
        if not ids:  # of an empty text, where nothing stands around it
            return torch.zeros(0, self.model.config.hidden_size, device=self._device)
        if max(ids) >= self.model.config.vocab_size:
            raise config_error("the tokenizer has ids beyond the embedding table")
        encoded = self.model(
            input_ids=torch.tensor([ids], device=self._device), output_hidden_states=True
        )
        if how.layers:
            hidden = torch.cat([encoded.hidden_states[layer] for layer in how.layers], dim=-1)
        else:
            hidden = encoded.last_hidden_state
        outputs = hidden[0].float()
        if how.instruction:
            outputs = torch.cat([outputs[:1], outputs[1 + self._left_out :]])
        return outputs

    def last(self, text: str, k: int) -> Tensor:
        """Return the last k outputs for a text; fewer are repeated in turn."""
        if k < 1:
            raise UsageError(f"invalid vectors {k}: expected at least 1")
        outputs = self.outputs(text)
        if len(outputs) >= k:
            return outputs[-k:]
        return outputs[torch.arange(k, device=outputs.device) % len(outputs)]

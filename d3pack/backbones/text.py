"""CLIP's text encoder, with learned vectors in place of the embeddings of words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from d3pack.backbones.loading import Files, build, config_error
from d3pack.backbones.lock import Part
from d3pack.backbones.protocol import words_of
from d3pack.backbones.tokenizer import Words
from d3pack.errors import BackboneError, InvalidPackError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


POSITIONS = 77  # of CLIP, and so of outputs where the encoder is not open


def tokenizer(folder: str) -> Part:
    """Return the part of a layout that is a tokenizer of CLIP."""
    return Part(
        folder,
        config="",
        others=(("tokenizer.json",), ("vocab.json", "merges.txt")),
        optional=("special_tokens_map.json", "tokenizer_config.json"),
        text=True,
    )


def open_text(
    files: Files, *, device: torch.device, dtype: torch.dtype, second: bool = False
) -> TextEncoder | None:
    """Return a text encoder, or None where its files are not among those to read."""
    if f"text_encoder{'_2' if second else ''}/config.json" not in files:
        return None
    return TextEncoder(files, device=device, dtype=dtype, second=second)


def spread(tokens: Tensor, k: int | None) -> Tensor:
    """Return k vectors for some tokens: repeated in turn, or averaged; None: as many."""
    import torch

    if k is None:
        return tokens
    if len(tokens) <= k:
        return tokens[torch.arange(k, device=tokens.device) % len(tokens)]
    return torch.stack([part.mean(0) for part in torch.tensor_split(tokens, k)])


def check_outputs(vectors: Tensor, shape: tuple[int, int, int]) -> None:
    """Refuse outputs (B, k, D) of another number or width than a backbone takes."""
    least, most, width = shape
    if vectors.ndim != 3 or vectors.shape[2] != width or not least <= vectors.shape[1] <= most:
        raise BackboneError(
            f"outputs of shape {tuple(vectors.shape)} do not fit: this backbone takes {least} to"
            f" {most} of width {width}",
            code="E_BACKBONE_PROMPT",
            hint="the pack was made for another backbone",
        )


def no_outputs() -> BackboneError:
    """Return the error for outputs where a family has no text encoder."""
    return BackboneError(
        "this backbone reads no text and takes no outputs of a text encoder",
        code="E_BACKBONE_PROMPT",
    )


def missing_encoder() -> BackboneError:
    """Return the error for text that is to be encoded where only outputs are decoded."""
    return BackboneError(
        "the text encoder of this backbone is not open",
        code="E_BACKBONE_MISSING",
        hint="a pack of outputs is decoded without it; encoding needs all files",
    )


class TextEncoder:
    """CLIP's text model, which takes embeddings instead of ids.

    The second one of a backbone has a projection for the pooled vector.
    """

    def __init__(
        self, files: Files, *, device: torch.device, dtype: torch.dtype, second: bool = False
    ) -> None:
        end, kind = ("_2", "CLIPTextModelWithProjection") if second else ("", "CLIPTextModel")
        model = build(files, f"text_encoder{end}", "model", (kind,), device=device, dtype=dtype)
        self.projection: Tensor | None = model.text_projection.weight if second else None
        self.model = model
        self.words = Words(files, f"tokenizer{end}")
        self.table: Tensor = self.model.embeddings.token_embedding.weight
        self.positions = int(self.model.embeddings.position_embedding.weight.shape[0])
        self.embed([self.words.start, self.words.end, self.words.pad])  # are in the table

    @property
    def width(self) -> int:
        """Width of one vector."""
        return int(self.table.shape[1])

    def embed(self, ids: list[int]) -> Tensor:
        """Return the embeddings (n, D) of token ids."""
        import torch

        if max(ids, default=0) >= len(self.table):
            raise config_error("the tokenizer has ids beyond the embedding table")
        return self.table[torch.tensor(ids, dtype=torch.long, device=self.table.device)]

    def ids(self, text: str) -> list[int]:
        """Return start, words, end and padding as a diffusers pipeline does, cut to length."""
        inner = self.words.ids(text)[: self.positions - 2]
        ids = [self.words.start, *inner, self.words.end]
        return ids + [self.words.pad] * (self.positions - len(ids))

    def name_tokens(self, name: str) -> Tensor:
        """Return the embeddings (n, D) of the words of a class name, at least one."""
        return self.embed(self.words.ids(words_of(name)) or [self.words.end]).float()

    def splice(self, vectors: Tensor, template: str) -> Tensor:
        """Return embeddings (B, positions, D) of a template with vectors (B, k, D) at its {}."""
        import torch

        if template.count("{}") != 1:
            raise InvalidPackError(f"the template {template!r} must have one {{}}", code="E_RECIPE")
        if vectors.ndim != 3 or vectors.shape[2] != self.width or not vectors.shape[1]:
            raise BackboneError(
                f"prompts of shape {tuple(vectors.shape)} do not fit: vectors here are"
                f" {self.width} wide",
                code="E_BACKBONE_PROMPT",
                hint="the pack was made for another backbone",
            )
        before, after = (self.words.ids(part) for part in template.split("{}"))
        used = 2 + len(before) + vectors.shape[1] + len(after)
        if used > self.positions:
            raise BackboneError(
                f"{vectors.shape[1]} vectors and the template {template!r} fill {used} of"
                f" {self.positions} positions",
                code="E_BACKBONE_PROMPT",
                hint="use fewer vectors or a shorter template",
            )
        count = len(vectors)
        head = self.embed([self.words.start, *before]).expand(count, -1, -1)
        rest = [*after, self.words.end] + [self.words.pad] * (self.positions - used)
        tail = self.embed(rest).expand(count, -1, -1)
        return torch.cat([head, vectors.to(self.table.dtype), tail], dim=1)

    def encode(self, embeddings: Tensor) -> Tensor:
        """Return the last hidden states of embeddings (B, T, D), after the final norm."""
        hidden, causal = self._embedded(embeddings)
        for layer in self.model.encoder.layers:
            hidden = layer(hidden, causal)
        normed: Tensor = self.model.final_layer_norm(hidden)
        return normed

    def encode_deep(self, embeddings: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """Return the states before the last layer, and the last one of the end token, normed."""
        hidden, causal = self._embedded(embeddings)
        before = hidden
        for layer in self.model.encoder.layers:
            before, hidden = hidden, layer(hidden, causal)
        return before, self.model.final_layer_norm(hidden[:, end])

    def _embedded(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the first layer takes: states with positions, and the causal mask."""
        import torch

        hidden: Tensor = self.model.embeddings(embeddings)
        length = hidden.shape[1]
        low = torch.finfo(hidden.dtype).min
        mask = torch.full((length, length), low, dtype=hidden.dtype, device=hidden.device)
        return hidden, mask.triu(1).expand(len(hidden), 1, length, length)

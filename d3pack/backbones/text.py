"""Words to CLIP hidden states, with learned vectors spliced in where the words look up theirs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from d3pack.backbones.loading import Files, build
from d3pack.errors import BackboneError, InvalidPackError

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from torch import Tensor

_SPLIT = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
_START, _END = "<|startoftext|>", "<|endoftext|>"


class Words:
    """A CLIP tokenizer, without the start, end and padding that its users add differently."""

    def __init__(self, files: Files) -> None:
        self._tokenizer = _tokenizer(files)
        self.start, self.end = self._special(_START), self._special(_END)
        self.pad = self._special(_pad_token(files))

    def ids(self, text: str) -> list[int]:
        """The ids of the words alone."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _special(self, token: str) -> int:
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise BackboneError(f"the tokenizer does not know {token}", code="E_BACKBONE_CONFIG")
        return int(found)


class TextEncoder:
    """CLIP's text model, fed with embeddings instead of ids."""

    def __init__(self, files: Files, *, device: torch.device, dtype: torch.dtype) -> None:
        built = build(
            files, "text_encoder", "model", ("CLIPTextModel",), device=device, dtype=dtype
        )
        self.model = getattr(built, "text_model", built)  # transformers 4 wraps it once more
        self.words = Words(files)
        self.table: Tensor = self.model.embeddings.token_embedding.weight
        self.positions = int(self.model.embeddings.position_embedding.weight.shape[0])
        if max(self.words.start, self.words.end, self.words.pad) >= len(self.table):
            raise BackboneError(
                "the tokenizer has ids beyond the embedding table", code="E_BACKBONE_CONFIG"
            )

    @property
    def width(self) -> int:
        """The width of one vector."""
        return int(self.table.shape[1])

    def embed(self, ids: list[int]) -> Tensor:
        """Token embeddings (n, D) as the look-up gives them."""
        import torch

        return self.table[torch.tensor(ids, dtype=torch.long, device=self.table.device)]

    def ids(self, text: str) -> list[int]:
        """Start, words, end and padding: what a pipeline would feed, cut to length."""
        inner = self.words.ids(text)[: self.positions - 2]
        ids = [self.words.start, *inner, self.words.end]
        return ids + [self.words.pad] * (self.positions - len(ids))

    def splice(self, vectors: Tensor, template: str) -> Tensor:
        """Vectors (B, k, D) at the template's {} -> embeddings (B, positions, D)."""
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
        """Embeddings (B, T, D) -> the last hidden states after the final norm, as pipelines use."""
        import torch

        hidden = self.model.embeddings(inputs_embeds=embeddings)
        length = hidden.shape[1]
        low = torch.finfo(hidden.dtype).min
        mask = torch.full((length, length), low, dtype=hidden.dtype, device=hidden.device)
        causal = mask.triu(1).expand(len(hidden), 1, length, length)
        encoded = self.model.encoder(inputs_embeds=hidden, attention_mask=causal)
        normed: Tensor = self.model.final_layer_norm(encoded.last_hidden_state)
        return normed


def _tokenizer(files: Files) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    try:
        if "tokenizer/tokenizer.json" in files:
            found = Tokenizer.from_buffer(files.read("tokenizer/tokenizer.json"))
            found.no_padding()
            found.no_truncation()
            return found
        lines = files.read("tokenizer/merges.txt").decode("utf-8").splitlines()
        pairs = (line.split() for line in lines if line and not line.startswith("#version"))
        merges = [(first, second) for first, second in pairs]
        model = models.BPE(
            vocab=files.json("tokenizer/vocab.json"),
            merges=merges,
            end_of_word_suffix="</w>",
            unk_token=_END,
        )
        tokenizer = Tokenizer(model)
    except BackboneError:
        raise
    except Exception as error:  # tokenizers raises plain Exception for every malformed file
        raise BackboneError(
            f"the tokenizer cannot be read: {error}", code="E_BACKBONE_CONFIG"
        ) from None
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pad_token(files: Files) -> str:
    """SD 1.x pads with the end token, SD 2.x with "!": the tokenizer's own settings say."""
    for path in ("tokenizer/special_tokens_map.json", "tokenizer/tokenizer_config.json"):
        if path in files:
            token = files.json(path).get("pad_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                return token
    return _END

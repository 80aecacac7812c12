"""What stands for a class before anything is learned: tokens, or outputs of the text encoder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from d3pack.backbones import Backbone, apply_adapter, words_of
from d3pack.errors import UsageError
from d3pack.format import Coded, decode_adapter


def learns_outputs(backbone: Backbone, condition: str | None) -> bool:
    """Return whether vectors are to be outputs of the text encoder, and refuse what cannot be."""
    tokens, outputs = backbone.prompt_shape[0] > 0, backbone.output_shape[1] > 0
    if condition and not {"tokens": tokens, "outputs": outputs}[condition]:
        raise UsageError(f"invalid condition {condition!r}: this backbone takes no {condition}")
    return condition == "outputs" or not tokens


def start_vectors(backbone: Backbone, name: str, k: int, template: str, outputs: bool) -> Tensor:
    """Return k vectors for the name of a class: tokens, or outputs for it within the template."""
    if not outputs:
        return backbone.name_vectors(name, k)
    return backbone.outputs(template.replace("{}", words_of(name)), k)


def name_outputs(backbone: Backbone, name: str, template: str) -> Tensor:
    """Return all outputs of the text encoder for the name of a class within the template.

    Of a backbone that takes outputs alone, and any number of them: as many as the text has, without
    padding. Repeated ones would count many times.
    """
    text = template.replace("{}", words_of(name))
    vectors = backbone.name_vectors(text)
    least = backbone.output_shape[0]
    return vectors if len(vectors) >= least else backbone.outputs(text, least)


def no_class(backbone: Backbone, k: int) -> npt.NDArray[np.float32] | None:
    """Return k outputs (k, D) for the empty text; None where they are zeros, as without any."""
    vectors = backbone.outputs("", k)
    return vectors.detach().float().cpu().numpy() if vectors.any() else None


@contextmanager
def tuned(backbone: Backbone, adapter: Coded | None) -> Iterator[None]:
    """Tune the backbone for a while, as a decoder of the pack will."""
    tensors = {} if adapter is None else decode_adapter(adapter)
    copies = {name: torch.from_numpy(value.copy()) for name, value in tensors.items()}
    with apply_adapter(backbone, {n: t.to(backbone.device) for n, t in copies.items()}):
        yield

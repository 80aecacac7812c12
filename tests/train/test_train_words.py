"""What says where words lie: a sentence encoder's vectors, or a direction of its own for each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer

from d3pack.train.data import spoken
from d3pack.train.text import scattered_vectors, sentence_vectors

WORDS = ["goldfish", "lemon", "school", "bus", "golden", "retriever"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real BERT of a few kilobytes."""
    path = tmp_path_factory.mktemp("encoder")
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = {word: i for i, word in enumerate([*marks, *WORDS])}
    BertTokenizer(vocab=vocab).save_pretrained(path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(
            BertConfig(
                vocab_size=len(vocab),
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=32,
            )
        ).save_pretrained(path)
    return path


def test_a_vector_is_the_names_own_whatever_stands_beside_it(encoder: Path) -> None:
    names = ["golden retriever", "lemon", "school bus", "goldfish"]
    together = sentence_vectors(names, encoder)
    assert together.shape == (4, 16)
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    for name, vector in zip(names, together, strict=True):
        # alone nothing is padded: padding must not be averaged in
        assert np.allclose(sentence_vectors([name], encoder)[0], vector, atol=1e-5)
    assert np.abs(together @ together.T - np.eye(4)).max() < 1
    assert not np.allclose(together[0], together[2])


def test_without_an_encoder_names_point_apart() -> None:
    vectors = scattered_vectors(["a", "b", "c"], 64, 5)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert np.abs(vectors @ vectors.T - np.eye(3)).max() < 0.6
    assert np.array_equal(vectors, scattered_vectors(["a", "b", "c"], 64, 5))
    assert not np.array_equal(vectors, scattered_vectors(["a", "b", "c"], 64, 6))


def test_names_as_they_are_said() -> None:
    assert spoken("king_penguin") == "king penguin"
    assert spoken("  Golden   Retriever ") == "golden retriever"

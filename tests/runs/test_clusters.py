"""Which answers say the same: by words, and by the embeddings of an encoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, T5Config, T5Model

from bayeslora.errors import BayesLoraError
from bayeslora.runs.answers import Sampling
from bayeslora.runs.clusters import Cluster, Embedder, clustered

ANGLES = {"cat": 0.0, "kitten": 20.0, "lynx": 40.0, "dog": 90.0}


def turned(texts: Sequence[str]) -> Tensor:
    """Embeddings in the plane, 20 degrees apart but for the dog's."""
    angles = torch.tensor([ANGLES[text] for text in texts]).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_similar_answers_join_the_first_answer_of_a_cluster() -> None:
    """The lynx is as near to the kitten as that is to the cat, but a cluster is known by its first answer."""
    texts = ["cat", "dog", "kitten", "lynx", "The dog.", "cat"]
    assert clustered(texts, turned, math.cos(math.radians(25))) == [
        Cluster("cat", 3),
        Cluster("dog", 2),
        Cluster("lynx", 1),
    ]
    assert clustered(texts, turned, math.cos(math.radians(45)))[0] == Cluster("cat", 4)
    assert clustered(texts, turned, 1.0) == clustered(texts)


def test_an_empty_answer_stays_alone() -> None:
    assert clustered(["", "cat", "", "kitten"], turned, 0.9) == [Cluster("", 2), Cluster("cat", 2)]
    assert clustered(["", " "], turned, 0.9) == [Cluster("", 2)]


def test_embeddings_are_means_over_the_tokens_of_a_text_whatever_is_beside_it(tiny_bert_folder: Path) -> None:
    texts = ["good", "a bad movie with a good end"]
    found = Embedder(str(tiny_bert_folder))(texts)
    model, tokenizer = (
        AutoModel.from_pretrained(tiny_bert_folder).eval(),
        AutoTokenizer.from_pretrained(tiny_bert_folder),
    )
    for text, embedding in zip(texts, found, strict=True):
        with torch.no_grad():
            mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0)
        assert torch.allclose(embedding, mean / mean.norm(), atol=1e-5)


def test_the_encoder_of_an_encoder_decoder_embeds(tmp_path: Path, tiny_bert_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert_folder)
    config = T5Config(vocab_size=len(tokenizer), d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5Model(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    embed = Embedder(str(tmp_path))
    same, other = embed(["good", "good"]), embed(["bad"])
    assert same.shape == (2, 8) and torch.allclose(same[0], same[1]) and not torch.allclose(same[0], other[0])


def test_what_does_not_embed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BayesLoraError, match="lacks config.json"):
        Embedder(str(tmp_path))
    with pytest.raises(BayesLoraError, match="similarity is 0, but must be above 0"):
        Sampling(similarity=0)

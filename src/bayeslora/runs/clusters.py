r"""Group answers that say the same: by their words, and by the embeddings of an encoder as an option.

Answers that are equal but for case, articles and punctuation are always in one cluster. With embeddings, an answer
also joins the first cluster whose first answer is similar: the cosine of their mean-pooled embeddings is at least
`similarity`. With $n_c$ of S answers in cluster $c$, the semantic entropy is

$$ H = -\sum_c \frac{n_c}{S} \log \frac{n_c}{S}, $$

the discrete form of Farquhar et al. (2024, doi:10.1038/s41586-024-07421-0), whose clusters are of answers that entail
each other. It is 0 if all answers are in one cluster, and at most $\log S$.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel

from bayeslora.runs.base import (
    check_bare,
    load_errors,
    load_tokenizer,
    longest_input,
    quiet_loading,
    ready,
    resolve_model,
    source,
)

SIMILARITY = 0.9
"""Default cosine from which on two answers say the same."""

Embed = Callable[[Sequence[str]], Tensor]
"""Function from n texts to embeddings (n, d) of length 1."""


@dataclass(frozen=True)
class Cluster:
    """A group of sampled answers with the same meaning: the `text` of the first, and their `count`."""

    text: str
    count: int


class Embedder:
    """Embeddings of texts: the mean of an encoder's last hidden states over the tokens, of length 1.

    Args:
        model: folder, package or hub id of any encoder; of an encoder-decoder the encoder is used.

    Raises:
        BayesLoraError: the model cannot be loaded.
    """

    @quiet_loading()
    def __init__(self, model: str) -> None:
        resolved = resolve_model(model)
        self.tokenizer = load_tokenizer(resolved, model)
        with load_errors(f"the model {model}", resolved):
            check_bare(model, resolved)
            loaded: Any = AutoModel.from_pretrained(**source(resolved), dtype=torch.float32)
        self.length = longest_input(loaded, self.tokenizer, None)
        self.model: Any = ready(loaded.get_encoder() if loaded.config.is_encoder_decoder else loaded)

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return embeddings (n, d) of n texts that are not empty, on the CPU."""
        batch = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.length, return_tensors="pt"
        ).to(self.model.device)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        states = self.model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1).to(states.dtype)
        pooled = (states * mask).sum(dim=1) / mask.sum(dim=1).clamp_min(1)
        return torch.nn.functional.normalize(pooled, dim=-1).cpu()


def clustered(texts: Sequence[str], embed: Embed | None = None, similarity: float = SIMILARITY) -> list[Cluster]:
    """Return clusters of texts that say the same, the largest first; of equal size, the first to appear.

    With `embed`, texts join whose embeddings have a cosine of at least `similarity`; an empty text stays alone.
    """
    found: dict[str, Cluster] = {}
    for text in texts:
        key = normalized(text)
        found[key] = replace(found[key], count=found[key].count + 1) if key in found else Cluster(text, 1)
    clusters = list(found.values())
    if embed is not None and len(clusters) > 1:
        clusters = _joined(clusters, embed, similarity)
    return sorted(clusters, key=lambda cluster: -cluster.count)


def _joined(clusters: list[Cluster], embed: Embed, similarity: float) -> list[Cluster]:
    """Return the clusters, those whose first text is similar to that of an earlier one together with it."""
    spoken = [cluster for cluster in clusters if cluster.text.strip()]
    vectors = embed([cluster.text for cluster in spoken])
    leaders: list[int] = []
    counts: dict[int, int] = {}
    for place, cluster in enumerate(spoken):
        # Rounding must not part equal vectors at a similarity of 1.
        near = (each for each in leaders if float(vectors[each] @ vectors[place]) >= similarity - 1e-6)
        leader = next(near, place)
        if leader == place:
            leaders.append(place)
        counts[leader] = counts.get(leader, 0) + cluster.count
    joined = {spoken[leader].text: count for leader, count in counts.items()}
    return [
        replace(cluster, count=joined.get(cluster.text, cluster.count))
        for cluster in clusters
        if cluster.text in joined or not cluster.text.strip()
    ]


def normalized(text: str) -> str:
    """Return a text in lower case, without English articles and the punctuation around words, with single spaces.

    The sign and the point of a number stay. A text of nothing else stays as it is.
    """
    lower = unicodedata.normalize("NFKC", text).lower()
    words = [re.sub(r"^(?!-\d)\W+|\W+$", "", word) for word in lower.split()]
    kept = [word for word in words if word and word not in ("a", "an", "the")]
    return " ".join(kept or lower.split())


def semantic_entropy(counts: Sequence[int]) -> float:
    """Return the entropy of clusters of these sizes, in nats."""
    total = sum(counts)
    return math.fsum(-count / total * math.log(count / total) for count in counts) + 0.0

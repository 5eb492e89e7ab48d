r"""Score a language model on the tokens of known answers.

For a token $y_t$ of an answer, $p(y_t \mid y_{<t})$ is its probability under the mean weights, or with S draws the
mean of its probabilities under them. `nll` is the mean of $-\log p$ over all tokens of all answers, in nats, and
`perplexity` its exponential. A token counts as right if it is the most probable one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor, nn

from bayeslora.data.chat import LABELS
from bayeslora.data.completions import IGNORED
from bayeslora.data.encode import pad_id
from bayeslora.errors import BayesLoraError
from bayeslora.evaluation.items import forward_names, innermost
from bayeslora.evaluation.metrics import calibration_gap, confidence_bins
from bayeslora.evaluation.uncertainty import area_under_risk_coverage, by_correctness, histograms, risk_coverage_curve
from bayeslora.methods.layer import device_of, evaluation_mode
from bayeslora.prediction import Predictable
from bayeslora.prediction.weights import Weights

Array = NDArray[np.float64]
_MAX_NUMBERS = 2**26
"""Maximum of logits (rows x tokens x vocabulary) of a pass: 256 MiB in float32."""


@dataclass(frozen=True)
class TextEvaluation:
    """Scores of a language model on n tokens of known answers, in the split's order.

    Attributes:
        log_probability: (n,) log-probability of each answer token, in nats.
        entropy: (n,) entropy of the distribution over the vocabulary at each token, in nats.
        mutual_information: (n,) the part of `entropy` due to disagreement of the draws; 0 without samples.
        confidence: (n,) largest probability of the distribution at each token.
        correct: (n,) whether the answer token is the most probable one.
        row: (n,) number of the row that the token belongs to.
        vocabulary: size of the model's vocabulary.
        seconds: wall time of the forward passes.
        samples: number of draws of the weights; 0 is the mean weights.
    """

    log_probability: Array
    entropy: Array
    mutual_information: Array
    confidence: Array
    correct: NDArray[np.bool_]
    row: NDArray[np.int64]
    vocabulary: int
    seconds: float
    samples: int = 0

    @property
    def scores(self) -> dict[str, float]:
        """`perplexity`, `nll` and `token_accuracy`, and `ece` and `aurc` of the most probable tokens."""
        nll = float(-self.log_probability.mean())
        return {
            "perplexity": float(np.exp(nll)),
            "nll": nll,
            "token_accuracy": float(self.correct.mean()),
            "ece": calibration_gap(self.reliability),
            "aurc": area_under_risk_coverage(-self.confidence, ~self.correct),
        }

    @property
    def rows(self) -> int:
        """Number of rows."""
        return int(self.row.max()) + 1

    @property
    def reliability(self) -> list[dict[str, Any]]:
        """Confidence bins over tokens, as in metrics.json."""
        return confidence_bins(self.confidence, self.correct)

    @property
    def risk_coverage(self) -> dict[str, list[float]]:
        """Share of wrong tokens as a function of coverage, the most confident first, as in metrics.json."""
        return risk_coverage_curve(-self.confidence, ~self.correct)

    def histograms(self) -> dict[str, dict[str, Any]]:
        """Return histograms of entropy and mutual information of right and wrong tokens, as in metrics.json."""
        measures = {"entropy": self.entropy}
        if self.samples:
            measures["mutual_information"] = self.mutual_information
        return histograms(by_correctness(measures, self.correct), self.vocabulary)


def evaluate_text(
    model: Predictable, data: Dataset, tokenizer: Any, batch_size: int = 8, samples: int = 0, seed: int = 0
) -> TextEvaluation:
    """Score the answers of a split that `encode_generation` has encoded.

    Args:
        model: a language model, or the saved posterior of its weights.
        data: the encoded split.
        tokenizer: tokenizer that pads the batches.
        batch_size: maximum number of rows in a forward pass; passes with long rows have fewer.
        samples: number of draws to average the probability of each token over; 0 uses the mean weights.
        seed: seed of the draws.

    Raises:
        BayesLoraError: `samples` > 0 for a model without a posterior, or an output is not finite.
    """
    weights = Weights(model, samples, seed)
    started = time.perf_counter()
    parts: list[Tensor] = []
    rows: list[NDArray[np.int64]] = []
    vocabulary = int(innermost(weights.model).config.get_text_config().vocab_size)
    with evaluation_mode(weights.model), torch.inference_mode():
        for numbers, batch in _batches(data, tokenizer, batch_size, vocabulary, weights.model):
            parts.append(_scored(weights, batch).cpu())
            rows.append(np.repeat(numbers, (batch[LABELS][:, 1:] != IGNORED).sum(dim=1).cpu().numpy()))
    found, row = torch.cat(parts, dim=1).double().numpy(), np.concatenate(rows)
    order = np.argsort(row, kind="stable")
    log_p, entropy, information, confidence, correct = found[:, order]
    if broken := int((~np.isfinite(log_p)).sum()):
        raise BayesLoraError(
            f"the probabilities of {broken} of {len(log_p)} tokens are not finite, but must be: train with a smaller "
            "learning rate or in float32"
        )
    seconds = time.perf_counter() - started
    return TextEvaluation(
        log_p, entropy, information, confidence, correct > 0, row[order], vocabulary, seconds, samples
    )


def _batches(
    data: Dataset, tokenizer: Any, batch_size: int, vocabulary: int, model: nn.Module
) -> Iterator[tuple[NDArray[np.int64], dict[str, Tensor]]]:
    """Yield the numbers of some rows, the longest first, and their batch, padded on the right."""
    lengths = np.asarray([len(ids) for ids in data["input_ids"]])
    order = np.argsort(-lengths, kind="stable")
    pad, device = pad_id(tokenizer), device_of(model)
    start = 0
    while start < len(order):
        width = int(lengths[order[start]])
        numbers = order[start : start + max(1, min(batch_size, _MAX_NUMBERS // (width * vocabulary)))]
        start += len(numbers)
        columns = data[numbers.tolist()]
        fill = {"input_ids": pad, "attention_mask": 0, LABELS: IGNORED}
        batch = {
            name: torch.tensor([row + [value] * (width - len(row)) for row in columns[name]], device=device)
            for name, value in fill.items()
        }
        yield numbers, batch


def _scored(weights: Weights, batch: dict[str, Tensor]) -> Tensor:
    """Return (5, n) for the n labelled tokens: log-probability, entropy, information, confidence, correctness."""
    labels = batch[LABELS][:, 1:]
    places = (labels != IGNORED).nonzero(as_tuple=True)
    targets = labels[places]
    passes: list[range | None] = [range(d, d + 1) for d in range(weights.samples)] or [None]
    mean, expected = torch.zeros((), device=labels.device), torch.zeros((), device=labels.device)
    chosen = []
    for draw in passes:
        with weights.at(draw):
            log_p = _logits(weights.model, batch, places).float().log_softmax(dim=-1)
        chosen.append(log_p.gather(1, targets[:, None])[:, 0])
        p = log_p.exp()
        mean, expected = mean + p / len(passes), expected + torch.special.entr(p).sum(dim=-1) / len(passes)
    log_probability = torch.stack(chosen).logsumexp(dim=0) - math.log(len(passes))
    entropy = torch.special.entr(mean).sum(dim=-1)
    confidence, best = mean.max(dim=-1)
    information = (entropy - expected).clamp_min(0) if weights.samples else torch.zeros_like(entropy)
    return torch.stack([log_probability, entropy, information, confidence, (best == targets).float()])


def _logits(model: nn.Module, batch: dict[str, Tensor], places: tuple[Tensor, ...]) -> Tensor:
    """Return the logits (n, V) of the tokens after `places`, rows and columns."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    rows, columns = places
    if "logits_to_keep" not in forward_names(model):
        return model(**inputs).logits[rows, columns]
    kept, index = torch.unique(columns, return_inverse=True)
    return model(**inputs, logits_to_keep=kept).logits[rows, index]

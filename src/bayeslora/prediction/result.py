r"""What a prediction holds, and how it follows from the outputs of several draws of the weights.

For class probabilities $p_1, \dots, p_S$ of $S$ draws and their mean $\bar p$, the entropy of the prediction splits
into what the data leave open and what the weights leave open (Depeweg et al., 2018, arXiv:1710.07283):

$$ H(\bar p) = \tfrac1S \textstyle\sum_s H(p_s) + I. $$

`entropy` is the left side, `expected_entropy` the mean on the right and `mutual_information` is $I$: more data would
remove it. A deterministic prediction comes from one set of weights, so $I = 0$.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prediction:
    """Predictions for n examples in the order they came in; float64 (labels: int64) tensors on the CPU.

    Attributes:
        logits: (n, C) outputs of the model, or, with samples, the logarithms of `probabilities`; (n, 1) for
            regression, with samples their mean.
        probabilities: (n, C), rows sum to 1, with samples the mean over them; (n, 0) for regression, which has no
            classes.
        labels: (n,) ids of the most probable class; for regression the predicted values, float64.
        entropy: (n,) entropy of `probabilities` in nats; 0 for regression.
        mutual_information: (n,) the part of the entropy that comes from not knowing the weights, in nats, never
            negative; 0 for a deterministic prediction and for regression.
        expected_entropy: (n,) the other part, the mean entropy of the samples.
        std: (n,) for regression the standard deviation over the samples; 0 for a deterministic prediction and for
            classes.
        sample_probabilities: (S, n, C) of each sample, where asked for; None otherwise and for regression.
        sample_values: (S, n) of each sample for regression, where asked for; None otherwise and for classes.
    """

    logits: Tensor
    probabilities: Tensor
    labels: Tensor
    entropy: Tensor
    mutual_information: Tensor
    expected_entropy: Tensor
    std: Tensor
    sample_probabilities: Tensor | None = None
    sample_values: Tensor | None = None

    def __len__(self) -> int:
        return int(self.logits.shape[0])


def summarize(logits: Tensor) -> Prediction:
    """The `Prediction` of one deterministic pass with these (n, C) logits; C = 1 means regression.

    A logit of -inf is a class that the example does not have: its probability is 0.
    """
    logits = logits.to(torch.float64)
    if logits.shape[1] == 1:
        return _regression(logits.unsqueeze(0))
    probabilities = logits.softmax(dim=-1)
    entropy = _entropy(probabilities)
    zeros = torch.zeros_like(entropy)
    return Prediction(
        logits=logits,
        probabilities=probabilities,
        labels=probabilities.argmax(dim=-1),
        entropy=entropy,
        mutual_information=zeros,
        expected_entropy=entropy.clone(),
        std=zeros.clone(),
    )


def summarize_samples(logits: Tensor) -> Prediction:
    """The `Prediction` of S >= 1 samples with (S, n, C) logits, with per-sample outputs; C = 1 means regression."""
    logits = logits.to(torch.float64)
    if logits.shape[2] == 1:
        return _regression(logits)
    per_sample = logits.log_softmax(dim=-1)
    # In logarithms, so that a class that every sample thinks impossible keeps its order of magnitude.
    mean = per_sample.logsumexp(dim=0) - math.log(len(logits))
    sample_probabilities, probabilities = per_sample.exp(), mean.exp()
    entropy, expected = _entropy(probabilities), _entropy(sample_probabilities).mean(dim=0)
    return Prediction(
        logits=mean,
        probabilities=probabilities,
        labels=probabilities.argmax(dim=-1),
        entropy=entropy,
        # Jensen's inequality holds up to rounding.
        mutual_information=(entropy - expected).clamp_min(0),
        expected_entropy=expected,
        std=torch.zeros_like(entropy),
        sample_probabilities=sample_probabilities,
    )


def _regression(values: Tensor) -> Prediction:
    """From (S, n, 1) outputs."""
    values = values[..., 0]
    mean = values.mean(dim=0)
    zeros = torch.zeros_like(mean)
    return Prediction(
        logits=mean.unsqueeze(1),
        probabilities=mean.new_zeros(len(mean), 0),
        labels=mean,
        entropy=zeros,
        mutual_information=zeros.clone(),
        expected_entropy=zeros.clone(),
        std=values.std(dim=0, correction=0),
        sample_values=values,
    )


def _entropy(probabilities: Tensor) -> Tensor:
    # entr(0) = 0, where p * log(p) would be NaN.
    return torch.special.entr(probabilities).sum(dim=-1)

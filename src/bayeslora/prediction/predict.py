r"""Predictive distribution of an adapted model.

prediction = bayeslora.predict(model, loader, samples=10)     # a batch works as well
prediction.probabilities                                       # (n, C), the mean over ten draws of the weights
prediction.mutual_information                                  # (n,), the part that more training data would remove

For class probabilities $p_1, \dots, p_S$ of $S$ draws and their mean $\bar p$, the entropy of the prediction splits
into the uncertainty of the data and that of the weights (Depeweg et al., 2018, arXiv:1710.07283):

$$ H(\bar p) = \tfrac1S \textstyle\sum_s H(p_s) + I. $$

`entropy` is the left side, `expected_entropy` the mean on the right and `mutual_information` is $I$. A deterministic
prediction comes from one set of weights, so $I = 0$.

A model with several labels a row (`problem_type="multi_label_classification"`) answers yes or no for each label, with
a sigmoid for its probability, and each label has its own entropies.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bayeslora.errors import BayesLoraError, counted
from bayeslora.methods.layer import device_of, evaluation_mode
from bayeslora.prediction.predictor import (
    MULTI_LABEL,
    Logits,
    ModelPredictor,
    Predictable,
    Predictor,
    as_predictor,
    check_adapters,
    check_finite,
    check_one_label,
    check_samples,
    problem_type,
)

_LABEL_KEYS = ("labels", "label", "label_ids")
NO_BATCH = "the loader gave 0 batches, but at least 1 is needed: check the data set behind it"


@dataclass(frozen=True)
class Prediction:
    """Predictions for n examples, in the order of the input: float64 (labels: int64) tensors on the CPU.

    For a multi-label model, `probabilities` (n, C) has one probability per label, which need not sum to 1; `labels` is
    (n, C), 1 where the probability is above one half; `entropy`, `mutual_information`, `expected_entropy` and `std`
    are (n, C), with one number per label.

    Attributes:
        logits: (n, C) outputs of the model. With samples, the logits that correspond to `probabilities`: their
            logarithms, or their log-odds for a multi-label model. (n, 1) for regression, with samples their mean.
        probabilities: (n, C) class probabilities, averaged over the samples; rows sum to 1; (n, 0) for regression.
        labels: (n,) ids of the most probable class; for regression the predicted values, float64.
        entropy: (n,) entropy of `probabilities` in nats; 0 for regression.
        mutual_information: (n,) the part of `entropy` due to uncertainty about the weights, in nats, at least 0; 0 for
            a deterministic prediction and for regression.
        expected_entropy: (n,) the rest of `entropy`: the mean entropy of the samples.
        std: (n,) standard deviation over the samples for regression; 0 without samples and for classes.
        sample_probabilities: (S, n, C) probabilities of each sample, if `per_sample`; None for regression.
        sample_values: (S, n) predicted values of each sample, if `per_sample`; None for classes.
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


def predict(
    model: Predictable,
    loader_or_batch: Mapping[str, Any] | Iterable[Mapping[str, Any]],
    samples: int = 0,
    seed: int = 0,
    *,
    per_sample: bool = False,
    antithetic: bool = False,
    logits: Logits | None = None,
    optimizer: object | None = None,
) -> Prediction:
    """Return class probabilities (or regression values) and their uncertainty, for a batch or a loader of batches.

    Runs in evaluation mode without gradients on the model's device, and leaves every module in the mode it was in.
    Labels in a batch are ignored, so no loss is computed. Draw number d is the same function of its inputs for every
    batch, batch size, rank and process.

    Args:
        model: a sequence classifier or regressor, whose output is, or has, `logits` of shape (batch, C); a predictor
            such as `MCDropout` around one; or the posterior that `load_posterior(model, folder)` returns.
        loader_or_batch: a mapping from input names to tensors, or an iterable of such mappings (a `DataLoader`).
        samples: number of draws of the weights to average the probabilities over. 0 uses the mean weights, the only
            choice for an adapter without a posterior.
        seed: seed of the draws; the same seed gives the same prediction.
        per_sample: also return the output of each sample, in `sample_probabilities` or `sample_values`.
        antithetic: pair draws with opposite noise.
        logits: function from the model and a batch to class logits (batch, C), for models that do not return them,
            such as language models that choose among answers. A logit of -inf marks a class that the row does not
            have. Logits (batch, W, C), as from `word_logits`, give batch · W predictions, row by row. The function
            gets batches with repeated rows. It must use the model's logits, not its hidden states: the last block of a
            classifier may compute those of the first token only.
        optimizer: the `IVON` or `SWAG` that has trained the model; samples are drawn from its posterior.

    Raises:
        BayesLoraError: `samples` > 0 for a deterministic adapter, the optimizer has no posterior, the loader is empty,
            inputs are not tensors, logits are not finite or not of shape (batch, C), or the model predicts several
            numbers per row.
    """
    predictor = as_predictor(model) if optimizer is None else _drawn_by(optimizer, model)
    check_samples(predictor, samples)
    problem = None if logits is not None else problem_type(predictor.model)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise BayesLoraError(f"the seed is {seed!r}, but must be a whole number: give seed=0")
    collected = sampled_logits(predictor, loader_or_batch, samples, seed, antithetic, logits or _forward)
    prediction = _of_labels(collected) if problem == MULTI_LABEL else summarize(collected)
    if problem == "regression" and collected.shape[2] > 1:
        raise BayesLoraError(
            f"the model predicts {counted(collected.shape[2], 'number')} a row, but predict takes a regression "
            "of one: call the model yourself"
        )
    if samples == 0 and len(collected) == 1:
        prediction = replace(prediction, logits=collected[0])
    return prediction if per_sample else replace(prediction, sample_probabilities=None, sample_values=None)


def sampled_logits(
    predictor: Predictor,
    loader_or_batch: Mapping[str, Any] | Iterable[Mapping[str, Any]],
    samples: int,
    seed: int = 0,
    antithetic: bool = False,
    logits: Logits | None = None,
) -> Tensor:
    """Return the (S, n, C) logits of all samples and batches, float64 on the CPU; S = 1 for the mean weights.

    Raises:
        BayesLoraError: in the cases of `predict`, and for a multi-label model.
    """
    if logits is None:
        check_one_label(predictor.model)
        logits = _forward
    batches = [loader_or_batch] if isinstance(loader_or_batch, Mapping) else loader_or_batch
    device = device_of(predictor.model)
    read = _checked(logits, (2,) if logits is _forward else (2, 3))
    collected: list[Tensor] = []
    with evaluation_mode(predictor.model), torch.inference_mode():
        sample = predictor.sampler(samples, seed, antithetic, read)
        for batch in batches:
            found = sample(_inputs(batch, device)).flatten(1, -2)  # words one after the other
            collected.append(found.to(device="cpu", dtype=torch.float64))
    if not collected:
        raise BayesLoraError(NO_BATCH)
    # Unlike a tensor made in inference mode, a copy made outside of it can be used with autograd.
    found = torch.cat(collected, dim=1).clone()
    check_finite(found, predictor.model)
    check_adapters(predictor.model)
    return found


def _drawn_by(optimizer: object, model: Predictable) -> Predictor:
    if not isinstance(model, nn.Module):
        raise BayesLoraError(
            f"an optimizer and a {type(model).__name__} are given, but it draws a model's weights: give the model, "
            "or build the predictor around bayeslora.ModelPredictor(model, optimizer)"
        )
    return ModelPredictor(model, optimizer)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's random state, and restore it afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def labels_of(batches: Iterable[Mapping[str, Any]]) -> Tensor:
    """Return the class ids (n,) of all batches, int64 on the CPU.

    Raises:
        BayesLoraError: there are no batches, a batch lacks labels, or labels are not class ids.
    """
    found = _labels(batches)
    for labels in found:
        if labels.is_floating_point():
            raise BayesLoraError(f"the labels are {labels.dtype}, but must be class ids: give a classifier's data")
    return torch.cat([labels.to("cpu", torch.int64) for labels in found])


def values_of(batches: Iterable[Mapping[str, Any]]) -> Tensor:
    """Return (n,) labels of all batches as numbers, float64 on the CPU, for a regression.

    Raises:
        BayesLoraError: there are no batches, or a batch lacks labels.
    """
    return torch.cat([labels.to("cpu", torch.float64) for labels in _labels(batches)])


def _labels(batches: Iterable[Mapping[str, Any]]) -> list[Tensor]:
    """Return the flat labels of each batch."""
    found = []
    for batch in batches:
        given = next((batch[name] for name in _LABEL_KEYS if batch.get(name) is not None), None)
        if given is None:
            raise BayesLoraError(f"a batch has {', '.join(batch)}, but labels are needed too: give labelled data")
        found.append(torch.as_tensor(given).reshape(-1))
    if not found:
        raise BayesLoraError(NO_BATCH)
    return found


def summarize(logits: Tensor) -> Prediction:
    """Return the `Prediction` of S >= 1 samples with (S, n, C) logits; C = 1 means regression.

    A logit of -inf marks a class that the example does not have; its probability is 0.
    """
    logits = logits.to(torch.float64)
    if logits.shape[-1] == 1:
        return _regression(logits)
    per_sample = logits.log_softmax(dim=-1)
    # In logarithms, so that small numbers keep their order.
    mean = per_sample.logsumexp(dim=0) - math.log(len(per_sample))
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


def _of_labels(logits: Tensor) -> Prediction:
    """Return the `Prediction` of S >= 1 samples with (S, n, C) logits, one yes or no for each of C labels."""
    found = summarize(torch.stack([torch.zeros_like(logits), logits], dim=-1))  # the sigmoid of z is softmax (0, z)
    no, yes = found.logits.unbind(dim=-1)
    return replace(found, logits=yes - no, probabilities=yes.exp(), sample_probabilities=logits.double().sigmoid())


def _regression(values: Tensor) -> Prediction:
    """Return the `Prediction` of (S, n, 1) outputs."""
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


def _inputs(batch: Any, device: torch.device) -> dict[str, Tensor]:
    if not isinstance(batch, Mapping):
        raise BayesLoraError(
            f"a batch is a {type(batch).__name__}, but must be a mapping from input names to tensors: "
            "let the collator return the tokenizer's output"
        )
    inputs: dict[str, Tensor] = {}
    for name, value in batch.items():
        if name in _LABEL_KEYS or value is None:
            continue
        if not isinstance(value, Tensor):
            raise BayesLoraError(
                f"input {name!r} is a {type(value).__name__}, but must be a tensor: "
                'tokenize with return_tensors="pt" or drop the column'
            )
        inputs[name] = value.to(device)
    ids = inputs.get("input_ids")
    if ids is not None and (ids.ndim < 2 or not len(ids) or ids.is_floating_point()):
        raise BayesLoraError(
            f"input_ids are {str(ids.dtype).removeprefix('torch.')} of shape {tuple(ids.shape)}, but must be whole "
            "numbers of (rows, tokens), with at least one row: give a batch of the tokenizer's output"
        )
    return inputs


def _forward(model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
    output = model(**batch)
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    if hasattr(output, "logits"):
        return output.logits
    return output[0] if isinstance(output, tuple) and output else output


def _checked(read: Logits, dimensions: tuple[int, ...]) -> Logits:
    """Return `read` with a check of the number of dimensions of its logits, (batch, classes) by default."""

    def checked(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        found = read(model, batch)
        if not isinstance(found, Tensor) or found.ndim not in dimensions:
            seen = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"type {type(found).__name__}"
            raise BayesLoraError(
                f"the model's logits have {seen}, but must be (batch, classes): load a sequence classifier, or give "
                "logits=word_logits for the words of a token classifier"
            )
        return found

    return checked

"""The predictive distribution of an adapted model, as one function.

prediction = bayeslora.predict(model, loader, samples=10)     # a batch will do as well
prediction.probabilities                                       # (n, C), the mean over ten draws of the weights
prediction.mutual_information                                  # (n,), what more training data would remove
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from bayeslora.errors import BayesLoraError
from bayeslora.methods.sampling import has_posterior, posterior_mean
from bayeslora.prediction.batched_sampling import Folding
from bayeslora.prediction.cls_pooling import first_token_only
from bayeslora.prediction.result import Prediction, summarize, summarize_samples

_LABEL_KEYS = ("label", "labels", "label_ids")

Logits = Callable[[nn.Module, Mapping[str, Tensor]], Any]
"""From the model and a batch of B rows to class logits (B, C); -inf marks a class that a row does not have."""

Sampler = Callable[[Mapping[str, Tensor]], Tensor]
"""From a batch of B rows to (S, B, C) logits, one entry for each sample."""


@runtime_checkable
class Predictor(Protocol):
    """What `predict` predicts with: a model with a posterior, or any of the methods that wrap a finished one.

    Attributes:
        model: the module that is put in evaluation mode, and on whose device the batches go.
    """

    @property
    def model(self) -> nn.Module: ...

    def check_samples(self, samples: int) -> None:
        """Raise `BayesLoraError` where this number of samples cannot be drawn."""

    def sampler(self, samples: int, seed: int, antithetic: bool, read: Logits) -> Sampler:
        """A function from batches to the logits of each sample, S >= 1 of them, for one run over the data.

        It is called in evaluation mode without gradients. `read` gives the (B, C) logits of one pass.
        """


class Posterior:
    """A model as a predictor: its posterior mean, or draws from its posterior where it has one."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @property
    def model(self) -> nn.Module:
        return self._model

    def check_samples(self, samples: int) -> None:
        if samples > 0 and not has_posterior(self.model):
            kinds = sorted({str(getattr(c.peft_type, "value", c.peft_type)) for c in _peft_configs(self.model)})
            what = f"the adapter ({', '.join(kinds)})" if kinds else f"the model ({type(self.model).__name__})"
            raise BayesLoraError(
                f"samples is {samples}, but {what} is deterministic and has no posterior to sample from: use samples=0"
            )

    def sampler(self, samples: int, seed: int, antithetic: bool, read: Logits) -> Sampler:
        if samples == 0:
            return mean_sampler(self.model, read)
        folding = Folding(self.model, read, seed, antithetic)

        def draws(batch: Mapping[str, Tensor]) -> Tensor:
            with first_token_only(self.model):
                return folding.logits(batch, range(samples))

        return draws


def mean_sampler(model: nn.Module, read: Logits) -> Sampler:
    """The one "sample" of a predictor without samples: the model at its posterior mean."""

    def mean(batch: Mapping[str, Tensor]) -> Tensor:
        with posterior_mean(model):
            logits: Tensor = read(model, batch)
        return logits.unsqueeze(0)

    return mean


def predict(
    model: nn.Module | Predictor,
    loader_or_batch: Mapping[str, Any] | Iterable[Mapping[str, Any]],
    samples: int = 0,
    seed: int = 0,
    *,
    per_sample: bool = False,
    antithetic: bool = False,
    logits: Logits | None = None,
    optimizer: object | None = None,
) -> Prediction:
    """Class probabilities (or regression values) and their uncertainty, for a batch or a loader of batches.

    Runs in evaluation mode without gradients on the model's device, and leaves every module in the mode it was in.
    Labels in a batch are ignored, so no loss is computed. Draw number d is the same function of its inputs for every
    batch, batch size, rank and process.

    Args:
        model: a sequence classifier or regressor, a model whose output is, or has, `logits` of shape (batch, C); or a
            predictor such as `MCDropout` around one.
        loader_or_batch: a mapping from input names to tensors, or an iterable of such mappings (a `DataLoader`).
        samples: draws of the weights to average the probabilities over. 0 uses the mean weights, the only choice for
            an adapter without a posterior.
        seed: of the draws; the same seed gives the same prediction.
        per_sample: keep the outputs of each sample, too: `sample_probabilities` or `sample_values`.
        antithetic: draws in pairs of opposite noise.
        logits: from the model and a batch to class logits (batch, C), for models that do not give them as they are,
            such as language models that choose among answers. A logit of -inf is a class the row does not have. It
            is called on batches whose rows are repeated, as often as fit, and must work from the model's logits:
            hidden states of a classifier's last block may be there for the first token only.
        optimizer: an `IVON` that has trained the model, to draw from its posterior. One that was saved is a predictor
            of its own: give `load_posterior(model, folder)` for `model`.

    Raises:
        BayesLoraError: `samples` above 0 for a deterministic adapter, an optimizer without a posterior, no batch at
            all, inputs that are no tensors, or logits of another shape than (batch, C).
    """
    predictor = as_predictor(model) if optimizer is None else _drawn_by(optimizer, model)
    check_samples(predictor, samples)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise BayesLoraError(f"the seed is {seed!r}, a whole number is needed")
    collected = sampled_logits(predictor, loader_or_batch, samples, seed, antithetic, logits)
    single = samples == 0 and len(collected) == 1
    prediction = summarize(collected[0]) if single else summarize_samples(collected)
    if per_sample and single:
        return replace(prediction, **_single_sample(prediction))
    return prediction if per_sample else replace(prediction, sample_probabilities=None, sample_values=None)


def sampled_logits(
    predictor: Predictor,
    loader_or_batch: Mapping[str, Any] | Iterable[Mapping[str, Any]],
    samples: int,
    seed: int = 0,
    antithetic: bool = False,
    logits: Logits | None = None,
) -> Tensor:
    """(S, n, C) logits of each sample for all batches, float64 on the CPU; S = 1 for the mean weights."""
    batches = [loader_or_batch] if isinstance(loader_or_batch, Mapping) else loader_or_batch
    device = _device(predictor.model)
    read = _checked(logits or _forward)
    collected: list[Tensor] = []
    with evaluation_mode(predictor.model), torch.inference_mode():
        sample = predictor.sampler(samples, seed, antithetic, read)
        for batch in batches:
            collected.append(sample(_inputs(batch, device)).to(device="cpu", dtype=torch.float64))
    if not collected:
        raise BayesLoraError("the loader gave 0 batches, at least 1 is needed: check the data set behind it")
    # A tensor made in inference mode cannot enter autograd later; a copy made outside of it can.
    return torch.cat(collected, dim=1).clone()


def as_predictor(model: nn.Module | Predictor) -> Predictor:
    """The predictor itself, or the one that a model is."""
    if isinstance(model, nn.Module):
        return Posterior(model)
    if isinstance(model, Predictor):
        return model
    raise BayesLoraError(
        f"{type(model).__name__} is neither a model nor a predictor, one is needed: give a torch module, or one of "
        "bayeslora's predictors around it"
    )


def check_samples(model: nn.Module | Predictor, samples: int) -> None:
    """Raise unless `predict` can draw this many samples from the model, before any work is done.

    Raises:
        BayesLoraError: a negative or fractional number, or any samples of a model without a posterior.
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 0:
        raise BayesLoraError(f"samples is {samples!r}, a whole number of at least 0 is needed: 0 uses mean weights")
    as_predictor(model).check_samples(samples)


def _drawn_by(optimizer: object, model: nn.Module | Predictor) -> Predictor:
    from bayeslora.prediction.weights import WeightPosterior  # which is a predictor, as defined here

    if not isinstance(model, nn.Module):
        raise BayesLoraError(
            f"an optimizer is given beside a {type(model).__name__}, it draws the weights of a model: give the model, "
            "or build the predictor around bayeslora.WeightPosterior(model, optimizer)"
        )
    return WeightPosterior(model, optimizer)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, and outside every submodule is in the mode it was in before.

    `model.train()` afterwards would not do: parts of a model may be kept in evaluation mode on purpose.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _single_sample(prediction: Prediction) -> dict[str, Tensor]:
    if prediction.logits.shape[1] == 1:
        return {"sample_values": prediction.labels.unsqueeze(0)}
    return {"sample_probabilities": prediction.probabilities.unsqueeze(0)}


def _peft_configs(model: nn.Module) -> list[Any]:
    configs = getattr(model, "peft_config", None)
    return list(configs.values()) if isinstance(configs, Mapping) else []


def _device(model: nn.Module) -> torch.device:
    for tensor in model.parameters():
        return tensor.device
    return torch.device("cpu")


def _inputs(batch: Any, device: torch.device) -> dict[str, Tensor]:
    if not isinstance(batch, Mapping):
        raise BayesLoraError(
            f"a batch is a {type(batch).__name__}, a mapping from input names to tensors is needed: "
            "let the collator return what the tokenizer returns"
        )
    inputs: dict[str, Tensor] = {}
    for name, value in batch.items():
        if name in _LABEL_KEYS or value is None:
            continue
        if not isinstance(value, Tensor):
            raise BayesLoraError(
                f"input {name!r} is a {type(value).__name__}, a tensor is needed: "
                'tokenize with return_tensors="pt" or drop the column'
            )
        inputs[name] = value.to(device)
    return inputs


def _forward(model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
    output = model(**batch)
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    if hasattr(output, "logits"):
        return output.logits
    return output[0] if isinstance(output, tuple) and output else output


def _checked(read: Logits) -> Logits:
    """`read`, which raises unless it gives (batch, classes)."""

    def checked(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        found = read(model, batch)
        if not isinstance(found, Tensor) or found.ndim != 2:
            seen = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"type {type(found).__name__}"
            raise BayesLoraError(
                f"the model's logits have {seen}, (batch, classes) is needed: load the model as a sequence classifier"
            )
        return found

    return checked

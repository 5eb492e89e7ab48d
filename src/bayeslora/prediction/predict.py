r"""The predictive distribution of an adapted model, as one function.

    prediction = bayeslora.predict(model, batch)         # or a DataLoader
    prediction.probabilities                              # (n, C)

For class probabilities $p_1, \dots, p_S$ of $S$ weight samples and their mean $\bar p$, the entropy of the prediction
splits into what the data leave open and what the weights leave open (Depeweg et al., 2018, arXiv:1710.07283):

$$ H(\bar p) = \tfrac1S \textstyle\sum_s H(p_s) + I, $$

`entropy` is the left side and `mutual_information` is $I$. A deterministic adapter has one set of weights, so $I = 0$.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bayeslora.errors import BayesLoraError

_LABEL_KEYS = ("label", "labels", "label_ids")


@dataclass(frozen=True)
class Prediction:
    """Predictions for n examples in the order they came in; float64 (labels: int64) tensors on the CPU.

    Attributes:
        logits: (n, C) outputs of the model; (n, 1) for regression.
        probabilities: (n, C), rows sum to 1; (n, 0) for regression, which has no classes.
        labels: (n,) ids of the most probable class; for regression the predicted values, float64.
        entropy: (n,) entropy of `probabilities` in nats; 0 for regression.
        mutual_information: (n,) the part of the entropy that comes from not knowing the weights, in nats; 0 for a
            deterministic adapter.
    """

    logits: Tensor
    probabilities: Tensor
    labels: Tensor
    entropy: Tensor
    mutual_information: Tensor

    def __len__(self) -> int:
        return int(self.logits.shape[0])


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


def predict(
    model: nn.Module, loader_or_batch: Mapping[str, Any] | Iterable[Mapping[str, Any]], samples: int = 0
) -> Prediction:
    """Class probabilities (or regression values) and their uncertainty, for a batch or a loader of batches.

    Runs in evaluation mode without gradients on the model's device, and leaves every module in the mode it was in.
    Labels in a batch are ignored, so no loss is computed.

    Args:
        model: a sequence classifier or regressor: a model whose output is, or has, `logits` of shape (batch, C).
        loader_or_batch: a mapping from input names to tensors, or an iterable of such mappings (a `DataLoader`).
        samples: Monte-Carlo samples of the posterior. 0 uses the mean weights, the only choice for an adapter
            without a posterior.

    Raises:
        BayesLoraError: `samples` above 0 for a deterministic adapter, no batch at all, inputs that are no tensors,
            or logits of another shape than (batch, C).
    """
    check_samples(model, samples)
    batches = [loader_or_batch] if isinstance(loader_or_batch, Mapping) else loader_or_batch
    device = _device(model)
    collected: list[Tensor] = []
    with evaluation_mode(model), torch.inference_mode():
        for batch in batches:
            output = model(**_inputs(batch, device))
            collected.append(_logits(output).to(device="cpu", dtype=torch.float64))
    if not collected:
        raise BayesLoraError("the loader gave 0 batches, at least 1 is needed: check the data set behind it")
    # A tensor made in inference mode cannot enter autograd later; a copy made outside of it can.
    return summarize(torch.cat(collected).clone())


def summarize(logits: Tensor) -> Prediction:
    """The `Prediction` of one deterministic pass with these (n, C) logits; C = 1 means regression."""
    logits = logits.to(torch.float64)
    zeros = torch.zeros(len(logits), dtype=torch.float64)
    if logits.shape[1] == 1:
        return Prediction(logits, logits[:, :0], logits[:, 0], zeros, zeros.clone())
    probabilities = logits.softmax(dim=-1)
    # entr(0) = 0, where p * log(p) would be NaN.
    entropy = torch.special.entr(probabilities).sum(dim=-1)
    return Prediction(logits, probabilities, probabilities.argmax(dim=-1), entropy, zeros)


def check_samples(model: nn.Module, samples: int) -> None:
    """Raise unless `predict` can draw this many samples from the model, before any work is done.

    Raises:
        BayesLoraError: a negative or fractional number, or any samples of a model without a posterior.
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 0:
        raise BayesLoraError(f"samples is {samples!r}, a whole number of at least 0 is needed: 0 uses mean weights")
    if samples > 0:
        kinds = sorted({str(getattr(c.peft_type, "value", c.peft_type)) for c in _peft_configs(model)})
        what = f"the adapter ({', '.join(kinds)})" if kinds else f"the model ({type(model).__name__})"
        raise BayesLoraError(
            f"samples is {samples}, but {what} is deterministic and has no posterior to sample from: use samples=0"
        )


_check_samples = check_samples


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


def _logits(output: Any) -> Tensor:
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    elif hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, tuple) and output:
        output = output[0]
    if not isinstance(output, Tensor) or output.ndim != 2:
        seen = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"type {type(output).__name__}"
        raise BayesLoraError(
            f"the model's logits have {seen}, (batch, classes) is needed: load the model as a sequence classifier"
        )
    return output

r"""Prediction from a posterior over the weights that an optimizer has learned, for any adapter, or for none.

$$ p(y \mid x) \approx \frac1S \sum_{s=1}^{S} p(y \mid x, \theta_s), \qquad \theta_s \sim N(m, \sigma^2). $$
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from bayeslora._peft import BaseTunerLayer
from bayeslora.errors import BayesLoraError
from bayeslora.methods.sampling import posterior_mean
from bayeslora.optim import SavedPosterior, draws_of
from bayeslora.prediction.cls_pooling import first_token_only
from bayeslora.prediction.predict import Logits, Sampler, mean_sampler


class WeightPosterior:
    """A model whose weights are drawn, as a predictor: `bayeslora.predict(WeightPosterior(model, ivon), loader, 10)`.

    A draw is the same function for every batch, batch size and process. It takes a pass of its own, for all of the
    trained weights differ. 0 samples is the posterior mean.

    Args:
        model: whose parameters are drawn.
        source: an `IVON` that trains them, or a posterior that was saved.

    Raises:
        BayesLoraError: a source that keeps no posterior.
    """

    def __init__(self, model: nn.Module, source: object) -> None:
        self._model, self.source = model, draws_of(source)

    @property
    def model(self) -> nn.Module:
        return self._model

    def check_samples(self, samples: int) -> None:
        """Raise where a draw could not reach the computation: weights that are merged into the base's."""
        merged = (m for m in self.model.modules() if isinstance(m, BaseTunerLayer) and m.merged)
        if samples > 0 and next(merged, None) is not None:
            raise BayesLoraError(
                "the adapter is merged into the base weights, where only its mean is: call unmerge_adapter first"
            )

    def sampled(self, seed: int = 0, draw: int = 0, antithetic: bool = False) -> AbstractContextManager[None]:
        """Inside, the model computes with one draw: for `generate`, and whatever else `predict` does not do."""
        self.check_samples(1)
        return self.source.sampled(seed, draw, antithetic)

    def sampler(self, samples: int, seed: int, antithetic: bool, read: Logits) -> Sampler:
        if samples == 0:
            return mean_sampler(self.model, read)

        def draws(batch: Mapping[str, Tensor]) -> Tensor:
            found = []
            with posterior_mean(self.model), first_token_only(self.model):
                for draw in range(samples):
                    with self.source.sampled(seed, draw, antithetic):
                        logits: Tensor = read(self.model, batch)
                    found.append(logits)
            return torch.stack(found)

        return draws


def load_posterior(model: nn.Module, folder: str | os.PathLike[str]) -> WeightPosterior:
    """The posterior that `save_posterior` wrote to `folder`, as something to predict with.

    ```python
    model = PeftModel.from_pretrained(base, folder)
    prediction = bayeslora.predict(bayeslora.load_posterior(model, folder), batch, samples=10)
    ```

    Args:
        model: with the adapter of that folder loaded: its weights are the mean.
        folder: has `posterior.safetensors`.

    Raises:
        BayesLoraError: no such file, a damaged one, or one that does not fit the model.
    """
    return WeightPosterior(model, SavedPosterior(model, folder))

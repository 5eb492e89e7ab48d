"""Weights of a model at their mean or at a draw, for passes whose outputs are not class logits, such as text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from bayeslora.errors import BayesLoraError
from bayeslora.methods.variational import posterior_mean, sampling
from bayeslora.prediction.predictor import ModelPredictor, Predictable, as_predictor, check_samples


class Weights:
    """Set a model's weights to their mean, or to draws from the posterior of its adapter or of its optimizer.

    Draw number d is the same function as draw d of `predict` with the same seed.

    Args:
        given: a model, a saved posterior, or a `ModelPredictor`.
        samples: number of draws that will be asked for; 0 for the mean alone.
        seed: seed of the draws.
        antithetic: pair draws of opposite noise.

    Raises:
        BayesLoraError: another predictor is given, or samples are wanted but there is no posterior.
    """

    def __init__(self, given: Predictable, samples: int, seed: int = 0, antithetic: bool = False) -> None:
        predictor = as_predictor(given)
        if not isinstance(predictor, ModelPredictor):
            raise BayesLoraError(
                f"{type(predictor).__name__} was given, but text is generated under draws of one model's weights: "
                "give the model, or load_posterior(model, folder)"
            )
        check_samples(predictor, samples)
        self.model: nn.Module = predictor.model
        self.samples, self.seed, self.antithetic = samples, seed, antithetic
        self._source = predictor.source
        self.draws_share_a_pass = self._source is None
        """Whether one batch can hold rows of several draws."""

    @contextmanager
    def at(self, draws: range | None) -> Iterator[None]:
        """Set the weights to `draws`, for as many groups of rows of equal size; None is the mean."""
        with ExitStack() as contexts:
            if draws is not None and self._source is None:
                contexts.enter_context(sampling(self.model, "batch", self.seed, draws, self.antithetic))
            else:
                contexts.enter_context(posterior_mean(self.model))
            if draws is not None and self._source is not None:
                assert len(draws) == 1
                contexts.enter_context(self._source.sampled(self.seed, draws[0], self.antithetic))
            yield

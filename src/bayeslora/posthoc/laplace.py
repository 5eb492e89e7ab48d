r"""Laplace approximation of a finished classifier's last layer, by laplace-torch (Daxberger et al., 2021).

Around the weights $\theta^*$ of the trained head the posterior is $N(\theta^*, (H + \lambda I)^{-1})$
(arXiv:2106.14806), with H the generalized Gauss-Newton matrix over the training data and $\lambda$ the prior
precision, by default the one that maximizes the marginal likelihood. The features that the head sees are deterministic
and computed once, with any adapter; laplace-torch gets only them and the head, so any model with a linear head works.
Install it with `pip install bayeslora[laplace]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bayeslora._peft import BaseTunerLayer
from bayeslora.errors import BayesLoraError
from bayeslora.methods.variational import posterior_mean
from bayeslora.prediction import Logits, ModelPredictor, Sampler, labels_of, sampled_logits
from bayeslora.prediction.batched_sampling import restore_forward

_TOLERANCE = 1e-3


class LaplacePredictor:
    """Predictor with a last-layer Laplace approximation; call `fit` first.

    With 0 samples it uses the head as trained. A variational adapter below the head stays at its mean.

    Args:
        model: a classifier whose logits come from a linear layer, possibly those of one token.
        structure: structure of the curvature: `full` has (C (d + 1))² numbers for d features and C classes, `kron`
            factors it, `diag` keeps its diagonal.
        prior_precision: $\\lambda$ > 0; None chooses it by the marginal likelihood of the training data.

    Raises:
        BayesLoraError: laplace-torch is not installed.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: Literal["full", "kron", "diag"] = "kron",
        prior_precision: float | None = None,
    ) -> None:
        _laplace()
        if structure not in ("full", "kron", "diag"):
            raise BayesLoraError(f"structure is {structure!r}, but must be full, kron or diag: give 'kron'")
        if prior_precision is not None and not prior_precision > 0:
            raise BayesLoraError(f"prior_precision is {prior_precision}, but must be positive: give None to choose it")
        self.model, self.structure, self.prior_precision = model, structure, prior_precision
        self._head: nn.Linear | None = None
        self._posterior: Any = None

    def check_samples(self, samples: int) -> None:
        if samples and self._posterior is None:
            raise BayesLoraError(f"samples is {samples}, but the posterior is not fitted: call fit with training data")

    def fit(self, loader: Mapping[str, Any] | Iterable[Mapping[str, Any]]) -> LaplacePredictor:
        """Fit the posterior to the data that the model was trained on, and return self.

        Args:
            loader: a batch or batches with `labels`.

        Raises:
            BayesLoraError: labels are missing, or the logits do not come from a linear layer.
        """
        batches = [loader] if isinstance(loader, Mapping) else list(loader)
        labels = labels_of(batches)
        head, copied = self._find_head(batches[0])
        self._head = head
        with _identity(head):
            features = sampled_logits(ModelPredictor(self.model), batches, 0)[0].float()
        # On the CPU in float32 and with one layer to differentiate, for every model.
        data = DataLoader(TensorDataset(features, labels), batch_size=256)
        chosen = self.prior_precision or 1.0
        self._posterior = _laplace()(
            copied, "classification", subset_of_weights="all", hessian_structure=self.structure, prior_precision=chosen
        )
        self._posterior.fit(data)
        if self.prior_precision is None:
            self._posterior.optimize_prior_precision(method="marglik", pred_type="glm")
        return self

    def sampler(self, samples: int, seed: int, antithetic: bool, read: Logits) -> Sampler:
        if antithetic:
            raise BayesLoraError("antithetic is True, but Laplace draws cannot be paired: leave it out")
        if samples == 0:
            return ModelPredictor(self.model).sampler(0, seed, False, read)
        head = self._head
        assert head is not None  # check_samples
        drawn = self._posterior.sample(samples, generator=torch.Generator().manual_seed(seed)).detach()
        size = head.weight.numel()
        weights = drawn[:, :size].view(samples, *head.weight.shape).double()
        biases = drawn[:, size:].double() if head.bias is not None else drawn.new_zeros(samples, 1).double()

        def logits(batch: Mapping[str, Tensor]) -> Tensor:
            with posterior_mean(self.model), _identity(head):
                features = read(self.model, batch).cpu().double()
            return torch.einsum("bd,scd->sbc", features, weights) + biases.unsqueeze(1)

        return logits

    def _find_head(self, batch: Mapping[str, Any]) -> tuple[nn.Linear, nn.Linear]:
        """Return the layer that the logits come from, and a copy of it on the CPU in float32."""
        called: list[nn.Linear] = []
        handles = [
            module.register_forward_hook(lambda module, _args, _output: called.append(module))
            for module in self.model.modules()
            if isinstance(module, nn.Linear)
        ]
        try:
            expected = sampled_logits(ModelPredictor(self.model), batch, 0)[0]
        finally:
            for handle in handles:
                handle.remove()
        # An adapted layer's logits are a sum of two products, so neither gives them alone.
        layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        adapted = {part for layer in layers for part in cast(nn.Module, layer).modules()}
        head = called[-1] if called and called[-1] not in adapted else None
        if head is not None and head.out_features == expected.shape[1] > 1:
            copied = nn.Linear(head.in_features, head.out_features, bias=head.bias is not None)
            copied.load_state_dict({name: value.detach().cpu().float() for name, value in head.state_dict().items()})
            with _identity(head):
                features = sampled_logits(ModelPredictor(self.model), batch, 0)[0].float()
            if features.shape[1] == head.in_features:
                found = copied(features).double()
                if torch.allclose(found, expected, rtol=_TOLERANCE, atol=_TOLERANCE * float(expected.abs().max())):
                    return head, copied
        raise BayesLoraError(
            f"the logits of {type(self.model).__name__} do not come straight from a linear layer of two or more "
            "classes, but last-layer Laplace needs one: use a sequence classifier without an adapter on its head"
        )


@contextmanager
def _identity(head: nn.Module) -> Iterator[None]:
    """Make the head return its input, so that the model's logits are its features."""
    own = head.__dict__.get("forward")
    head.forward = lambda x: x
    try:
        yield
    finally:
        restore_forward(head, own)


def _laplace() -> Callable[..., Any]:
    try:
        from laplace import Laplace
    except ImportError as error:
        raise BayesLoraError(
            f"laplace-torch cannot be imported ({error}), but the Laplace approximation needs it: "
            "run pip install bayeslora[laplace]"
        ) from None
    found: Callable[..., Any] = Laplace
    return found

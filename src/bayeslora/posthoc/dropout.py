"""Monte-Carlo dropout: uncertainty for a finished model of any kind that was trained with dropout."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bayeslora.errors import BayesLoraError
from bayeslora.methods.layer import evaluation_mode
from bayeslora.methods.variational import posterior_mean
from bayeslora.posterior.saved import check_unmerged
from bayeslora.prediction import Logits, Sampler
from bayeslora.prediction.predict import seeded


class MCDropout:
    """Monte-Carlo dropout (Gal and Ghahramani, 2016, arXiv:1506.02142): average predictions made with dropout on.

    Every dropout module with a positive rate is active, in the adapter and in the base model. Dropout inside fused
    attention kernels, which is not a module, stays off. A variational adapter stays at its mean. A sample depends on
    the seed and, unlike a draw from a posterior, on how the data are batched. With 0 samples the model predicts
    without dropout.

    Args:
        model: a model trained with dropout.

    Raises:
        BayesLoraError: the model lacks dropout, so that every sample would be the same, or an adapter is merged.
    """

    def __init__(self, model: nn.Module) -> None:
        check_unmerged(model)
        self.model = model
        self._dropouts = [m for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
        rates = sorted({module.p for module in self._dropouts})
        if not any(rates):
            seen = "dropout modules of rate 0 only" if rates else "no dropout modules"
            raise BayesLoraError(
                f"the model has {seen}, but Monte-Carlo dropout needs a rate above 0: train with lora_dropout=0.1"
            )

    def check_samples(self, samples: int) -> None:
        """Accept any number of samples."""

    def sampler(self, samples: int, seed: int, antithetic: bool, read: Logits) -> Sampler:
        if antithetic:
            raise BayesLoraError("antithetic is True, but dropout masks cannot be paired: leave it out")

        def passes(batch: Mapping[str, Tensor]) -> Tensor:
            with posterior_mean(self.model):
                if samples == 0:
                    return torch.stack([read(self.model, batch)])
                device = next(iter(batch.values())).device
                with evaluation_mode(self.model), seeded(seed, device):
                    for module in self._dropouts:
                        module.train()
                    return torch.stack([read(self.model, batch) for _ in range(samples)])

        return passes

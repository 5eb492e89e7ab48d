"""The same steps as ivon-opt's, where that package is installed. It is compared with from outside, never read."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bayeslora.optim import IVON

ivon = pytest.importorskip("ivon", reason="ivon-opt is an optional comparison")


@pytest.mark.parametrize("clip_radius", [float("inf"), 0.05])
@pytest.mark.parametrize("rescale_lr", [True, False])
def test_steps_with_the_same_noise_are_the_same(clip_radius: float, rescale_lr: bool) -> None:
    options = {
        "lr": 0.05,
        "ess": 100.0,
        "hess_init": 0.7,
        "weight_decay": 0.01,
        "clip_radius": clip_radius,
        "rescale_lr": rescale_lr,
    }
    weight = nn.Parameter(torch.randn(6, 4, dtype=torch.float64))
    theirs = nn.Parameter(weight.detach().clone())
    optimizer = IVON([weight], betas=(0.9, 0.95), **options)
    reference = ivon.IVON([theirs], beta1=0.9, beta2=0.95, **options)
    for _ in range(5):
        with reference.sampled_params(train=True):
            drawn = theirs.detach().clone()
            reference.zero_grad()
            (theirs.sin() * 3 + theirs**2).sum().backward()
        # Their noise in place of ours: the perturbation is what is paired with the gradient.
        optimizer.sample()
        mean, _ = optimizer.posterior(weight)
        flat = optimizer._flattened()[0]
        flat._view(flat.perturbation, 0).copy_((drawn - mean) * options["ess"] ** 0.5)
        with torch.no_grad():
            weight.copy_(drawn)
        optimizer.zero_grad()
        (weight.sin() * 3 + weight**2).sum().backward()
        reference.step()
        optimizer.step()
        torch.testing.assert_close(weight.detach(), theirs.detach(), atol=1e-6, rtol=1e-6)

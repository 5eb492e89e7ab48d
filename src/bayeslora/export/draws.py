"""The matrices of one draw of an adapter's weights: the draw that `predict` and `generate` use for the same seed.

Draw number d depends on the seed and d only. So K exported draws are the ensemble whose mean
`predict(model, batch, samples=K, seed=seed)` returns, and K + 1 draws begin with the same K. Without noise, draw k of
an adapter with several cores is its member k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from bayeslora.errors import BayesLoraError
from bayeslora.methods.layer import BayesLayer
from bayeslora.methods.variational import VariationalLayer, has_posterior, member_count, posterior_mean, sampling
from bayeslora.posterior import Noise, PosteriorSource, posterior_source

Factors = Callable[[str, BayesLayer], tuple[Tensor, Tensor, Tensor]]
"""Function from a layer's path and the layer to A (r, d_in), diagonal (r,) and B (d_out, r), float32, unscaled."""


def check_draws(model: nn.Module, draws: int, seed: int, posterior: object | None) -> None:
    """Raise `BayesLoraError` if these draws cannot be taken."""
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise BayesLoraError(f"draws is {draws!r}, but must be a whole number of at least 1: omit it for the mean")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise BayesLoraError(f"the seed is {seed!r}, but must be a whole number: give another")
    if posterior is not None:
        posterior_source(posterior)
    elif not has_posterior(model):
        raise BayesLoraError(
            f"draws is {draws}, but the adapter is deterministic: leave draws out, or give the posterior that IVON "
            "learned"
        )


def check_members(model: nn.Module, adapter_name: str, draws: int | None) -> int:
    """Return K, the number of cores; raise `BayesLoraError` for a single one, or if draws are asked for as well."""
    count = member_count(model, adapter_name)
    if draws is not None:
        raise BayesLoraError(f"draws is {draws}, but members have no noise: give draws or members, not both")
    if count < 2:
        raise BayesLoraError("members is True, but the adapter has no more than one core: leave it out")
    return count


@contextmanager
def drawn(
    model: nn.Module, adapter_name: str, seed: int, draw: int, posterior: PosteriorSource | None, scale: float = 1.0
) -> Iterator[Factors]:
    """Run `model` with draw number `draw` inside the context; the context's value returns a layer's matrices.

    `scale` multiplies the standard deviations of an adapter's own posterior.
    """
    if posterior is not None:
        with posterior_mean(model), posterior_source(posterior).sampled(seed, draw):
            yield lambda _path, layer: layer.factors(adapter_name)
        return

    def factors(path: str, layer: BayesLayer) -> tuple[Tensor, Tensor, Tensor]:
        assert isinstance(layer, VariationalLayer)
        a = layer.drawn_A(adapter_name, Noise("batch", seed, path, [draw], scale=scale))
        return a, a.new_ones(len(a)), layer.B(adapter_name).float()

    with sampling(model, "batch", seed, [draw], scale=scale):
        yield factors

r"""IVON: a Gaussian posterior over the weights, with as many passes as Adam (Shen et al., 2024, arXiv:2402.17641).

Written from the equations. The posterior is $q = N(m, \sigma^2)$ element by element, $\sigma^2 = 1 / (\lambda (h +
\delta))$, where $\lambda$ is the effective sample size `ess` and $\delta$ the prior's precision divided by it,
`weight_decay`. In step t, with $\theta = m + \sigma \epsilon$ and $\hat g = \nabla \ell(\theta)$,

$$ \hat h = \hat g \, (\theta - m) / \sigma^2, \qquad g \leftarrow \beta_1 g + (1 - \beta_1) \hat g, $$
$$ h \leftarrow \beta_2 h + (1 - \beta_2) \hat h + \tfrac12 (1 - \beta_2)^2 (h - \hat h)^2 / (h + \delta), $$
$$ m \leftarrow m - \alpha \, \mathrm{clip}\big( (g / (1 - \beta_1^t) + \delta m) / (h + \delta), \pm \xi \big). $$

With S Monte-Carlo samples, $\hat g$ and $\hat h$ are means over S draws, each gradient times its own noise. $\alpha$
is the learning rate, times $h_0 + \delta$ with `rescale_lr`, so that the size of the first steps does not depend on
$h_0$.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bayeslora.errors import BayesLoraError
from bayeslora.optim._flat import FlatGroup
from bayeslora.posterior import GaussianParameter, Noise, drawn_weights


class IVON(Optimizer):
    """Variational online Newton: train the mean of a Gaussian over the weights, and learn its variance along the way.

    A training step is `sample()`, the backward pass, `step()`. Between `sample()` and `step()` the weights are a draw
    from the posterior; after `step()` they are its mean. With `mc_samples` above 1, repeat `sample()`, backward pass
    and `pair()` for each sample before `step()`, or give `step` a closure, which it calls for each sample.

    ```python
    optimizer = bayeslora.IVON(parameters, lr=0.1, ess=len(train_set))
    for batch in batches:
        optimizer.sample()
        loss(model, batch).backward()       # any number of micro-batches
        optimizer.step()
        optimizer.zero_grad()
    ```

    A draw depends only on the seed, the step, the sample and the parameter's position in the optimizer. All
    micro-batches and ranks of a step therefore share it, and gradients can be summed and averaged over them as usual.
    The random numbers come from the CPU, so they are the same on every device. `step` (or `pair`) reads the gradients,
    so clipping or unscaling them earlier also affects the estimate of the Hessian.

    The state of a parameter p, `state[p]`, holds `step`, `momentum` (g), `hessian` (h) and, for a 16-bit parameter,
    `mean` (m), in float32 (float64 for a 64-bit parameter). These are views of longer tensors: change them in place.

    Args:
        params: parameters or groups. Parameters that do not require gradients are never drawn; parameters without a
            gradient in a step are not updated in that step.
        lr: learning rate; much larger than Adam's, because no square root is taken: 0.1 to 2 is usual with
            `rescale_lr`.
        ess: effective sample size λ: for a mean loss, the number of training examples. A larger value makes the
            posterior narrower.
        hess_init: initial Hessian h, above 0; it determines σ if h changes slowly.
        betas: β1 and β2, for the running averages of the gradient and of the Hessian.
        weight_decay: δ, the prior precision divided by λ; decays the mean.
        clip_radius: ξ, the maximum change of an element per step, in units of the learning rate.
        mc_samples: S, the number of draws per step.
        rescale_lr: multiply the learning rate by `hess_init + weight_decay`.
        seed: seed of the draws; must be the same on all ranks.
        max_grad_norm: maximum norm of each sample's gradient over all groups, clipped before it is paired with its
            noise; None clips nothing.

    Raises:
        BayesLoraError: an option is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        ess: float,
        hess_init: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.99999),
        weight_decay: float = 1e-4,
        clip_radius: float = math.inf,
        mc_samples: int = 1,
        rescale_lr: bool = True,
        seed: int = 0,
        max_grad_norm: float | None = None,
    ) -> None:
        if isinstance(mc_samples, bool) or not isinstance(mc_samples, int) or mc_samples < 1:
            raise BayesLoraError(f"mc_samples is {mc_samples!r}, but must be a whole number of at least 1: give 1")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise BayesLoraError(f"max_grad_norm is {max_grad_norm}, but must be above 0: give None to clip nothing")
        self.mc_samples, self.seed, self.max_grad_norm = mc_samples, int(seed), max_grad_norm
        self._start()
        options = {"lr": lr, "ess": ess, "hess_init": hess_init, "betas": betas, "weight_decay": weight_decay}
        super().__init__(params, {**options, "clip_radius": clip_radius, "rescale_lr": rescale_lr})

    def _start(self) -> None:
        self._flat: list[FlatGroup] | None = None
        self._known: dict[int, tuple[FlatGroup, int]] = {}
        self._is_drawn = False
        self._paired = 0

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, whose options may differ from the others'; see `torch.optim.Optimizer.add_param_group`."""
        if self._is_drawn:
            raise BayesLoraError("the weights are a draw, but groups must be added at the mean: call restore() first")
        super().add_param_group(param_group)
        _check_group(self.param_groups[-1])
        self._flat, self._known = None, {}

    @property
    def steps_taken(self) -> int:
        """Number of optimizer steps so far: the largest of any parameter; continues after `load_state_dict`."""
        return int(max((float(flat.steps.max()) for flat in self._flattened()), default=0.0))

    @property
    def is_drawn(self) -> bool:
        """True while the weights are a draw and not the mean."""
        return self._is_drawn

    @torch.no_grad()
    def sample(self, step: int | None = None) -> None:
        """Set the weights to the next draw of this step; a draw that has not been paired yet is replaced.

        Args:
            step: number of the step whose noise is drawn, by default the number of steps taken.
        """
        self._put_mean()
        if self._paired >= self.mc_samples:
            self.restore()  # the last step was skipped, as mixed precision may do
        number = self.steps_taken if step is None else step
        self._is_drawn = True
        try:
            for index, flat in enumerate(self._flattened()):
                flat.read_mean()
                flat.draw(
                    Noise("batch", self.seed, f"ivon/{number}/{index}", draws=range(self._paired, self._paired + 1))
                )
        except BaseException:
            self.restore()
            raise

    @torch.no_grad()
    def pair(self, scale: float = 1.0) -> None:
        """Pair the gradients of the current draw with its noise, and set the weights back to the mean.

        Call it once for each of several samples; for a single sample, `step` does it. With several samples it clears
        `.grad`; after the last one, `.grad` is the mean over the samples, for reading only: `step` ignores it.

        Args:
            scale: loss scale of mixed precision, if the gradients have not been unscaled yet.

        Raises:
            BayesLoraError: the weights are not a draw.
        """
        self._pair(scale)
        self._put_mean()

    def _pair(self, scale: float = 1.0) -> None:
        if not self._is_drawn:
            raise BayesLoraError("the weights are the mean, but pairing needs a draw: call sample() first")
        if self.max_grad_norm is not None:
            gradients = [p for p in self._parameters() if p.requires_grad and p.grad is not None]
            nn.utils.clip_grad_norm_(gradients, self.max_grad_norm * scale)
        last = self._paired == self.mc_samples - 1
        for flat in self._flattened():
            flat.pair(scale, first=self._paired == 0, last=last and self._paired == 0)
        if self.mc_samples > 1:
            for flat in self._flattened():
                flat.replace_gradients(self.mc_samples / scale if last else None)
        self._paired += 1
        self._is_drawn = False

    def restore(self) -> None:
        """Set the weights back to the mean, and forget the draws and pairs since the last step."""
        self._put_mean()
        for flat in self._flat or ():
            flat.forget()
        self._paired = 0

    @torch.no_grad()
    def _put_mean(self) -> None:
        for flat in self._flat or ():
            flat.put_mean()
        self._is_drawn = False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update mean and Hessian from the gradients of this step's draws, and set the weights to the new mean.

        Args:
            closure: function that clears the gradients, computes the loss, calls backward and returns the loss. It is
                called once for each sample, with the weights drawn. If it raises, the weights return to the mean.

        Returns:
            None, or the mean of the closure's losses.

        Raises:
            BayesLoraError: there is no closure, and fewer than `mc_samples` draws were made and paired.
        """
        loss = self._losses(closure) if closure is not None else None
        if self._is_drawn:
            self._pair()
        if self._paired != self.mc_samples:
            if self._paired == 0 and not any(float(group["lr"]) for group in self.param_groups):
                self._flattened()  # torch.distributed.checkpoint creates an optimizer's state with such a step
                return loss
            made = self._paired
            self.restore()
            raise BayesLoraError(
                f"{made} of {self.mc_samples} draws of the weights were paired in this step, but all must be: call "
                "sample() before each forward pass (and pair() after each backward pass of several), give step() a "
                "closure, or let bayeslora.attach(trainer) do it"
            )
        for flat in self._flattened():
            flat.update(self.mc_samples)
        self._paired = 0
        return loss

    def _losses(self, closure: Callable[[], Any]) -> Any:
        losses = []
        self.restore()
        try:
            for _ in range(self.mc_samples):
                self.sample()
                with torch.enable_grad():
                    losses.append(closure())
                self.pair()
        except BaseException:
            self.restore()
            raise
        return None if losses[0] is None else sum(losses) / len(losses)

    @torch.no_grad()
    def posterior(self, parameter: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and standard deviation of one parameter, in its shape and in the precision of its state.

        Raises:
            BayesLoraError: the parameter does not belong to the optimizer.
        """
        place = self._places().get(id(parameter))
        if place is not None:
            return place[0].posterior(place[1], self._is_drawn)
        raise BayesLoraError(
            f"a parameter of shape {tuple(parameter.shape)} was given, but is not one that IVON trains: "
            "give one of the optimizer's"
        )

    @contextmanager
    def sampled(self, seed: int = 0, draw: int = 0, antithetic: bool = False) -> Iterator[None]:
        """Set the weights to a draw for prediction inside the context, and restore them bit for bit afterwards.

        Args:
            seed: seed of the draws; independent of the training seed.
            draw: number of the draw; the same seed and number give the same weights, also in another process.
            antithetic: give draws 2k and 2k + 1 opposite noise.

        Raises:
            BayesLoraError: a training step is in progress.
        """
        if self._is_drawn:
            raise BayesLoraError(
                "the weights are a draw of a training step, but must be the mean here: call step() or restore()"
            )
        # Every parameter uses up its share of the noise, so that freezing one does not change the others' draws.
        with drawn_weights(self.gaussians(), seed, draw, antithetic):
            yield

    def gaussians(self) -> list[GaussianParameter]:
        """Return the Gaussian of every parameter, in the optimizer's order."""
        found = []
        for parameter in self._parameters():
            gaussian = (parameter, *self.posterior(parameter)) if parameter.requires_grad else ()
            found.append(GaussianParameter(parameter.numel(), *gaussian))
        return found

    def _parameters(self) -> Iterator[nn.Parameter]:
        for group in self.param_groups:
            yield from group["params"]

    def _flattened(self) -> list[FlatGroup]:
        if self._flat is None:
            with torch.inference_mode(False), torch.no_grad():  # a prediction may make the state that training uses
                self._flat = [
                    FlatGroup(parameters, group, self.state)
                    for group in self.param_groups
                    for parameters in _alike(group["params"])
                ]
        return self._flat

    def _places(self) -> dict[int, tuple[FlatGroup, int]]:
        """Map each parameter's `id` to its group and its position there."""
        flattened = self._flattened()
        if not self._known:
            self._known = {id(p): (flat, index) for flat in flattened for index, p in enumerate(flat.parameters)}
        return self._known

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a saved state in its own precision, also for 16-bit parameters, so that training continues exactly."""
        if self._is_drawn:
            self.restore()
        super().load_state_dict(state_dict)
        # Torch has cast every tensor except `step` to the parameter's type.
        ids = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, parameter in zip(ids, self._parameters(), strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor) and self.state[parameter][name].dtype != value.dtype:
                    self.state[parameter][name] = value.to(parameter.device)

    def __getstate__(self) -> dict[str, Any]:
        own = {"mc_samples": self.mc_samples, "seed": self.seed, "max_grad_norm": self.max_grad_norm}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._start()
        super().__setstate__(state)


def _alike(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Divide the parameters, in order, by device, type and whether they are distributed tensors."""
    divided: dict[tuple[Any, ...], list[nn.Parameter]] = {}
    for parameter in parameters:
        kind = (parameter.device, parameter.dtype, hasattr(parameter, "device_mesh"))
        divided.setdefault(kind, []).append(parameter)
    return list(divided.values())


def _check_group(group: dict[str, Any]) -> None:
    def check(name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise BayesLoraError(f"{name} is {group[name]!r}, but must be {wanted}")

    check("lr", float(group["lr"]) >= 0, "at least 0: give lr=0.1")
    check("ess", 0 < group["ess"] < math.inf, "finite and above 0: give the number of training examples")
    check("hess_init", group["hess_init"] > 0, "above 0: give hess_init=1")
    check("betas", all(0 <= beta < 1 for beta in group["betas"]), "two numbers from 0 to below 1: give (0.9, 0.99999)")
    check("weight_decay", group["weight_decay"] >= 0, "at least 0: give weight_decay=1e-4")
    check("clip_radius", group["clip_radius"] > 0, "above 0: give math.inf to clip nothing")
    for parameter in group["params"]:
        if not parameter.is_floating_point():
            raise BayesLoraError(f"a parameter is {parameter.dtype}, but must be floating-point: leave it out")
        if type(parameter).__name__ == "FlatParameter":
            raise BayesLoraError(
                "a parameter is FSDP1's FlatParameter, but IVON needs each rank to know its part: use FSDP2"
            )

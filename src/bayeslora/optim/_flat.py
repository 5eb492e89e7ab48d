"""Flat buffers for the parameters of an optimizer group, so that a step is a few operations on long vectors.

The state of a parameter (`momentum`, `hessian`, …) is a view of a flat buffer. An update runs on whole buffers if all
parameters take part, and otherwise on the slices of those that do, with the same code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bayeslora.errors import BayesLoraError
from bayeslora.posterior import Noise
from bayeslora.posterior.draws import aligned, local, local_like

_PIECE = 65536
"""Elements that a CPU processes at a time: few enough to stay in its cache over several operations."""


class FlatGroup:
    """The parameters of an optimizer group that share a device and a type.

    Args:
        parameters: in the group's order.
        group: the optimizer's group, whose options are read at every step.
        state: the optimizer's state; existing entries are kept, missing ones are created.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], group: dict[str, Any], state: Any) -> None:
        self.parameters, self.group = list(parameters), group
        first = self.parameters[0]
        self.device = first.device
        self.dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        self.low_precision = first.dtype in (torch.bfloat16, torch.float16)
        self.sizes = [local(p).numel() for p in self.parameters]
        self.starts, self.length = aligned(self.sizes)
        self.hessian = self._buffer("hessian", state, float(group["hess_init"]))
        self.momentum = self._buffer("momentum", state, 0.0)
        self.steps = torch.zeros(len(self.parameters))
        for index, parameter in enumerate(self.parameters):
            if "step" in state[parameter]:
                self.steps[index] = float(state[parameter]["step"])
            state[parameter]["step"] = self.steps[index]
        # A low-precision weight keeps its mean in full precision as state; any other weight is its own mean.
        fresh = [index for index, p in enumerate(self.parameters) if self.low_precision and "mean" not in state[p]]
        self.mean = self._buffer("mean", state, 0.0) if self.low_precision else self._zeros()
        for index in fresh:
            self._view(self.mean, index).copy_(local(self.parameters[index].detach()))
        self.perturbation, self.gradient, self.scratch = self._zeros(), self._zeros(), self._zeros()
        lasting, every = (self.mean, self.gradient, self.scratch), range(len(self.parameters))
        self._kept_views = {id(flat): [self._view(flat, index) for index in every] for flat in lasting}
        self.paired: Tensor | None = None
        self.drawn: list[int] = []
        self.active: list[int] = []

    def _zeros(self) -> Tensor:
        return torch.zeros(self.length, dtype=self.dtype, device=self.device)

    def _buffer(self, name: str, state: Any, initial: float) -> Tensor:
        """Make a flat buffer, and make each parameter's state `name` a view of it."""
        flat = torch.full((self.length,), initial, dtype=self.dtype, device=self.device)
        for index, parameter in enumerate(self.parameters):
            view = self._view(flat, index)
            if name in state[parameter]:
                view.copy_(local(state[parameter][name]))
            state[parameter][name] = _like(parameter, view)
        return flat

    def _view(self, flat: Tensor, index: int) -> Tensor:
        start, shape = self.starts[index], local(self.parameters[index]).shape
        return flat[start : start + self.sizes[index]].view(shape)

    def _views(self, flat: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """Return the parameters' parts of a lasting buffer, kept because making them takes longer than copying."""
        views = self._kept_views[id(flat)]
        return views if len(indices) == len(views) else [views[index] for index in indices]

    def _weights(self, indices: Sequence[int]) -> list[Tensor]:
        return [local(self.parameters[index]) for index in indices]

    def _pieces(self, indices: Sequence[int], together: bool = True) -> list[slice]:
        """Return the slices that an operation runs over: one for each parameter, or pieces that fit the cache."""
        if len(indices) < len(self.parameters) or not together:
            return [slice(self.starts[i], self.starts[i] + self.sizes[i]) for i in indices]
        length = _PIECE if self.device.type == "cpu" else max(1, self.length)
        return [slice(start, start + length) for start in range(0, self.length, length)]

    def read_mean(self) -> None:
        """Read the mean from the parameters, which may have been changed since the last step."""
        indices = range(len(self.parameters))
        weights, means = self._weights(indices), self._views(self.mean, indices)
        if not self.low_precision:
            torch._foreach_copy_(means, weights)
            return
        for weight, mean in zip(weights, means, strict=True):
            mean.copy_(self._mean_of(weight, mean))

    def _mean_of(self, weight: Tensor, mean: Tensor) -> Tensor:
        """Return the mean of an undrawn weight: the weight itself, or the known mean where it rounds to the weight."""
        known = mean.to(weight.dtype) == weight
        return torch.where(known, mean, weight.to(mean.dtype)) if self.low_precision else weight

    def draw(self, source: Noise) -> None:
        """Set the parameters to the mean plus the posterior's deviation times standard normal numbers.

        A frozen parameter stays unchanged, but uses up its share of the numbers.
        """
        noise = self._noise(source)
        # The perturbation is stored times sqrt(ess); adding it to the mean divides that out at no cost.
        narrower = self.group["ess"] ** -0.5
        for piece in self._pieces(range(len(self.parameters))):
            drawn, moved = self.scratch[piece], self.perturbation[piece]
            deviation = torch.add(self.hessian[piece], self.group["weight_decay"], out=drawn).rsqrt_()
            torch.mul(noise[piece], deviation, out=moved)
            torch.add(self.mean[piece], moved, alpha=narrower, out=drawn)
        self.drawn = [index for index, p in enumerate(self.parameters) if p.requires_grad]
        if self.drawn:
            torch._foreach_copy_(self._weights(self.drawn), self._views(self.scratch, self.drawn))

    def _noise(self, source: Noise) -> Tensor:
        if not isinstance(self.parameters[0], DTensor):
            return source.normal(1, (self.length,), self.device)[0].to(self.dtype)
        # Every rank draws for whole parameters and keeps its shards, so that sharding does not change a draw.
        starts, length = aligned([p.numel() for p in self.parameters])
        whole, flat = source.normal(1, (length,), self.device)[0], self._zeros()
        for index, (parameter, start) in enumerate(zip(self.parameters, starts, strict=True)):
            part = whole[start : start + parameter.numel()].view(parameter.shape)
            self._view(flat, index).copy_(local_like(parameter, part))
        return flat

    def put_mean(self) -> None:
        """Set the drawn parameters back to the mean; float32 and float64 are restored bit for bit."""
        if self.drawn:
            torch._foreach_copy_(self._weights(self.drawn), self._views(self.mean, self.drawn))
        self.drawn = []

    def pair(self, scale: float, first: bool, last: bool) -> None:
        """Add the parameters' gradients, divided by `scale`, and their products with the draw's noise."""
        found = [index for index in self.drawn if self.parameters[index].grad is not None]
        self.active = found if first else sorted({*self.active, *found})
        into = self.gradient if first else self.scratch
        if len(found) < len(self.parameters):
            into.zero_()
        if found:
            gradients = [self._gradient_of(index) for index in found]
            torch._foreach_copy_(self._views(into, found), gradients)
        if scale != 1.0:
            into.div_(scale)
        if first:
            # After its last gradient a draw is no longer needed, so its buffer can take the product.
            self.paired = self.perturbation.mul_(into) if last else self.perturbation * into
            return
        assert self.paired is not None
        self.gradient.add_(into)
        self.paired.addcmul_(self.perturbation, into)

    def _gradient_of(self, index: int) -> Tensor:
        parameter = self.parameters[index]
        gradient = parameter.grad
        assert gradient is not None
        if gradient.is_sparse:
            raise BayesLoraError(
                "a parameter has a sparse gradient, but IVON needs a dense one: build the embedding with sparse=False"
            )
        if isinstance(parameter, DTensor) and isinstance(gradient, DTensor):
            if gradient.placements != parameter.placements:
                gradient = gradient.redistribute(placements=parameter.placements)
        return local(gradient)

    def replace_gradients(self, divisor: float | None) -> None:
        """Clear `.grad` of the drawn parameters; with a divisor, then set it to the paired gradients divided by it."""
        for index in self.drawn:
            self.parameters[index].grad = None
        if divisor is None:
            return
        for index in self.active:
            parameter = self.parameters[index]
            mean = (self._view(self.gradient, index) / divisor).to(parameter.dtype)
            parameter.grad = _like(parameter, mean)

    def posterior(self, index: int, is_drawn: bool) -> tuple[Tensor, Tensor]:
        """Return the mean and the standard deviation of one parameter."""
        parameter, mean = self.parameters[index], self._view(self.mean, index)
        if not is_drawn:
            mean = self._mean_of(local(parameter.detach()), mean)
        precision = (self._view(self.hessian, index) + self.group["weight_decay"]) * self.group["ess"]
        return _like(parameter, mean.clone()), _like(parameter, precision.rsqrt())

    def update(self, samples: int) -> None:
        """Update from the `samples` paired draws, and set the parameters to the new mean."""
        if not self.active:
            self.put_mean()
            return
        assert self.paired is not None
        options, active = self.group, self.active
        (beta1, beta2), decay, clip = options["betas"], options["weight_decay"], options["clip_radius"]
        rate = float(options["lr"]) * (options["hess_init"] + decay if options["rescale_lr"] else 1.0)
        self.steps[active] += 1
        counts = self.steps[active].tolist()
        pieces = self._pieces(active, together=len(set(counts)) == 1)
        corrections = [1 - beta1**count for count in counts]
        if len(set(counts)) == 1:
            corrections = corrections[:1] * len(pieces)
        for piece, correction in zip(pieces, corrections, strict=True):
            mean, hessian, momentum = self.mean[piece], self.hessian[piece], self.momentum[piece]
            gradient, difference, scratch = self.gradient[piece], self.paired[piece], self.scratch[piece]
            # theta - m is the perturbation over sqrt(ess), so g (theta - m) / sigma^2 is sqrt(ess) (h + delta) times
            # the paired product.
            torch.add(hessian, decay, out=scratch)
            torch.sub(hessian, difference.mul_(scratch), alpha=options["ess"] ** 0.5 / samples, out=difference)
            hessian.add_(difference, alpha=beta2 - 1)
            hessian.addcdiv_(difference.mul_(difference), scratch, value=0.5 * (1 - beta2) ** 2)
            if samples > 1:
                gradient.div_(samples)
            momentum.lerp_(gradient, 1 - beta1)
            # Moving the bias correction out of the bracket saves a pass.
            newton = torch.add(momentum, mean, alpha=decay * correction, out=gradient)
            newton.div_(torch.add(hessian, decay, out=scratch))
            if clip < math.inf:
                newton.clamp_(-clip * correction, clip * correction)
            mean.add_(newton, alpha=-rate / correction)
        self.drawn = sorted({*self.drawn, *active})
        self.put_mean()
        self.forget()

    def forget(self) -> None:
        """Drop the paired gradients."""
        self.active, self.paired = [], None


def _like(parameter: Tensor, part: Tensor) -> Tensor:
    """Return `part` as the local part of a tensor that is distributed like `parameter`."""
    if not isinstance(parameter, DTensor):
        return part
    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )

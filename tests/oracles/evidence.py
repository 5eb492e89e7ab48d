r"""Evidence of B-LoRA's gates for a model of one linear layer: a loop over rows and all labels, in plain autograd.

Closing a gate changes a tensor x by e. Over rows, and over labels y drawn from the model's own prediction p,
$\Delta(e) = \tfrac12\,\mathrm{E}[\langle \partial\ell_y/\partial x, e \rangle^2]$: to second order in e the divergence
between the predictions before and after.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
"""weight (d_out, d_in), A (r, d_in), E (r,), B (d_out, r); the input `in` and the activations as shifts from zero."""


def forward(x: Tensor, t: Mapping[str, Tensor], scaling: float) -> Tensor:
    """Algorithm 1 for one row of tokens, x (..., d_in), without quantizers; each activation has a shift."""
    x = x + t["in"]
    low = x @ t["A"].T + t["A_out"]
    low = low * t["E"] + t["E_out"]
    return x @ t["weight"].T + scaling * (low @ t["B"].T) + t["out"]


def activations(x: Tensor, t: Mapping[str, Tensor], scaling: float) -> Tensors:
    """The activations of all rows, by kind."""
    low = x @ t["A"].T
    zero = {kind: torch.zeros(()) for kind in ("in", "A_out", "E_out", "out")}
    return {"in": x, "A_out": low, "E_out": low * t["E"], "out": forward(x, {**t, **zero}, scaling)}


def losses(logits: Tensor, kind: str) -> list[tuple[Tensor, Tensor]]:
    """Probability and negative log-likelihood of every label of one row, for logits (classes,)."""
    if kind == "regression":
        # A Gaussian of variance 1/2 about each of k outputs, averaged over them; its two signs stand for it, because
        # only the square of a derivative counts.
        size = (2 / len(logits)) ** 0.5
        signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * len(logits)).reshape(-1, len(logits))
        return [(torch.tensor(1 / len(signs)), (size * sign * logits).sum()) for sign in signs]
    logarithms = torch.log_softmax(logits, 0)
    return [(logarithm.exp().detach(), -logarithm) for logarithm in logarithms]


def delta(
    head: Callable[[Tensor], Tensor], rows: Tensor, t: Tensors, scaling: float, name: str, errors: Tensor, kind: str
) -> float:
    """Δ of changing tensor `name` by `errors`, one for each row (an activation) or one for all (a weight).

    `head` maps the layer's output for one row to logits (classes,).
    """
    total = 0.0
    for index, row in enumerate(rows):
        tensors = {key: value.detach().clone() for key, value in t.items()}
        shape = activations(row, tensors, scaling)
        for shift in ("in", "A_out", "E_out", "out"):
            tensors[shift] = torch.zeros_like(shape[shift])
        tensors[name].requires_grad_()
        error = errors[index] if name in shape else errors
        logits = head(forward(row, tensors, scaling))
        for probability, loss in losses(logits, kind):
            (gradient,) = torch.autograd.grad(loss, tensors[name], retain_graph=True)
            total += float(probability * (gradient * error).sum() ** 2)
    return total / (2 * len(rows))


def component(t: Tensors, index: int) -> Tensor:
    """The change of E (r,) that leaves component `index` out."""
    error = torch.zeros_like(t["E"])
    error[index] = -t["E"][index]
    return error

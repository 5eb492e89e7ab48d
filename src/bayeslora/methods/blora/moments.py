"""Second moments of the inputs of a layer, as `rounding="gptq"` chooses the codes of its base weight by."""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    r"""Moments gathered in the forward and backward passes of one training step.

    `sums` (d_in, d_in) is $\sum_t |g_t|^2 x_t x_t^T$ over the tokens t, with the gradient $g_t$ of the loss by the
    layer's output: tokens count as much as the loss depends on them, and padding does not count.
    """

    def __init__(self, d_in: int, device: torch.device) -> None:
        self.sums = torch.zeros(d_in, d_in, device=device)

    def watch(self, inputs: Tensor, output: Tensor) -> None:
        """Add the moments of `inputs` (..., d_in) when the gradient reaches `output` (..., d_out)."""
        if not output.requires_grad:  # of a checkpointed layer the pass in the backward counts
            return
        x = inputs.detach().reshape(-1, inputs.shape[-1])

        def measure(gradient: Tensor) -> None:
            weighted = x.float() * gradient.float().reshape(len(x), -1).norm(dim=1, keepdim=True)
            self.sums.addmm_(weighted.T, weighted)

        output.register_hook(measure)

"""Modules that keep their precision."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Float32Module(nn.Module):
    """A module whose tensors stay float32 when the model around it is cast.

    Gate logits move by about 1e-3 from values near 6, which bfloat16 cannot represent: cast, they would freeze.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Module:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def cast_parameters(self, dtype: torch.dtype) -> None:
        """Cast all the same, for a caller who has asked PEFT not to keep adapters in float32."""
        for parameter in self.parameters():
            parameter.data = parameter.data.to(dtype)

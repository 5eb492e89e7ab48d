"""Mean, variance and deviations of a sequence of vectors, such as the weights of a run after some of its steps."""

from __future__ import annotations

import torch
from torch import Tensor


class IterateMoments:
    """Running moments of vectors of N numbers, and the last of the vectors, in float32 on the CPU.

    Args:
        rank: maximum number of vectors that are kept.
    """

    def __init__(self, rank: int) -> None:
        self.rank, self.count = rank, 0
        self.mean = self.squares = torch.zeros(0)
        self.kept: list[Tensor] = []

    def add(self, vector: Tensor) -> None:
        """Count one more vector (N,), which is not kept by reference."""
        vector = vector.detach().to(device="cpu", dtype=torch.float32, copy=True)
        if self.count == 0:
            self.mean, self.squares = torch.zeros_like(vector), torch.zeros_like(vector)
        self.count += 1
        # Sums of squares about the mean: the difference of two large means would lose a small variance.
        before = vector - self.mean
        self.mean += before / self.count
        self.squares += before * (vector - self.mean)
        self.kept = [*self.kept, vector][-self.rank :]

    def variance(self) -> Tensor:
        """Return the variance (N,) of all vectors, the mean of squared deviations."""
        return self.squares / self.count

    def deviations(self) -> Tensor:
        """Return the last K <= rank vectors minus the mean of all, (K, N)."""
        return torch.stack(self.kept) - self.mean

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that `restore` needs."""
        return {"mean": self.mean, "squares": self.squares, "kept": torch.stack(self.kept)}

    def restore(self, count: int, tensors: dict[str, Tensor]) -> None:
        """Continue from the `tensors` of `count` vectors."""
        self.count, self.mean, self.squares = count, tensors["mean"], tensors["squares"]
        self.kept = list(tensors["kept"])[-self.rank :]

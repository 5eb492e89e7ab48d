r"""Several cores on one pair of low-rank matrices: where they start, and which row of a batch sees which.

Rows of a training batch are dealt among the members, and a row sees one member in all layers. So a step costs what it
costs with one core.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from bayeslora.errors import BayesLoraError
from bayeslora.methods.tuner import step_generator

_SEED = 2026
"""Seed of the members' starts, which are the same in every layer, process and run."""


@functools.cache
def starting_cores(count: int, rank: int, spread: float, diagonal: bool, device: torch.device) -> Tensor:
    r"""Return the cores at which the members start, and at which their priors are centred.

    The first is the identity. For the others, a full core is the rotation $\exp(S)$ with a skew-symmetric $S$ whose
    entries have the standard deviation `spread` / $\sqrt{r}$. A rotation keeps the length of $A x$. A diagonal core
    has $\exp(g)$, with the logarithms g of the standard deviation `spread`.

    Args:
        count: members, at least 1.
        rank: r, at least 0.
        spread: distance of the members; 0 starts them at one point, where they stay.
        diagonal: vectors instead of matrices.
        device: of the result; the numbers are drawn on the CPU.

    Returns:
        (count, r, r) or (count, r) float32, without the first dimension for a single core; not to be changed.
    """
    with torch.inference_mode(False), torch.no_grad():  # a later pass with autograd uses the kept tensor
        cores = _drawn_starts(count, rank, spread, diagonal).to(device)
        return cores if count > 1 else cores[0]


def _drawn_starts(count: int, rank: int, spread: float, diagonal: bool) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(_SEED)
    shape = (count, rank) if diagonal else (count, rank, rank)
    drawn = spread * torch.randn(shape, generator=generator, device="cpu")
    drawn[0] = 0.0
    if diagonal:
        return drawn.exp()
    return torch.linalg.matrix_exp((drawn - drawn.mT) / (2.0 * max(1, rank)) ** 0.5)


class Deal:
    """Members of an adapter with several cores, dealt to the rows of each training batch.

    Each run of K consecutive rows of an optimizer step gets the K members in a random order, which depends on the seed
    and the step. Rows are counted over micro-batches and ranks: rank k of W has the rows k B … (k + 1) B - 1 of a pass
    over W B rows. So the deal is the same for any division of a step's rows, and after a resume.

    Args:
        cores: K, the number of members.
    """

    def __init__(self, cores: int) -> None:
        self.cores = cores
        self.members = torch.empty(0, dtype=torch.int64)  # of the rows of the present pass
        self.begin_step(0, 0)

    def begin_step(self, seed: int, step: int) -> None:
        """Start the deal of optimizer step `step`."""
        self._generator = step_generator(seed, step)
        self._order = torch.empty(0, dtype=torch.int64)
        self._dealt = self._passes = 0
        self._is_inside = False

    def begin_pass(self, rows: int, copies: int = 1) -> Tensor:
        """Deal members to the `rows` rows that this rank has in a forward pass, and return them (rows,).

        With `copies`, the pass has as many rows for each, one after all others; they have one member.
        """
        rank, ranks = _rank()
        start = self._dealt + rank * rows
        self._dealt += ranks * rows
        while len(self._order) < self._dealt:
            self._order = torch.cat([self._order, torch.randperm(self.cores, generator=self._generator)])
        dealt = self._order[start : start + rows]
        self.members = dealt.repeat(copies)
        self._passes += 1
        self._is_inside = True
        return dealt

    def end_pass(self) -> None:
        """Mark the end of a forward pass; a layer that runs after it is recomputed for a backward pass."""
        self._is_inside = False

    @property
    def is_mixed(self) -> bool:
        """True if the rows of the present pass have several members."""
        return len(set(self.members.tolist())) > 1

    def of_rows(self, count: int) -> Tensor:
        """Return the members (count,) of a layer's rows; each row of the batch may have several, one after the other.

        Raises:
            BayesLoraError: gradient checkpointing recomputes one of several passes, and it is unknown which.
        """
        if not self._is_inside:
            if not torch.is_grad_enabled():  # such as text that a trainer has written in between
                return in_turn(count, self.cores)
            if self._passes > 1:
                raise BayesLoraError(
                    f"{self._passes} forward passes came before one backward pass under gradient checkpointing, but "
                    "several cores allow one: call backward after each pass, or turn checkpointing off"
                )
            self._passes = 0
        rows = len(self.members)
        if rows and count % rows == 0:
            return self.members.repeat_interleave(count // rows)
        return in_turn(count, self.cores)  # such as the tokens that were routed to an expert


def in_turn(count: int, cores: int) -> Tensor:
    """Return the members (count,) of rows that are dealt in turn, from the first."""
    return torch.arange(count) % cores


def _rank() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1

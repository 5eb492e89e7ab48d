"""Processes of one run, as torchrun and `accelerate launch` start them: the first one writes, the others follow.

Outside of such a launch there is one process, which is the first, and nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from bayeslora.errors import BayesLoraError

T = TypeVar("T")


def count() -> int:
    """Return the number of processes of the run."""
    return dist.get_world_size() if _is_joined() else 1


def is_first() -> bool:
    """Return whether this process writes, scores and reports."""
    return not _is_joined() or dist.get_rank() == 0


def by_first(action: Callable[[], T]) -> T:
    """Return what `action` returns in the first process, in all of them; its BayesLoraError is raised in all."""
    if not _is_joined():
        return action()
    outcome: list[Any] = [None, None]
    if is_first():
        try:
            outcome[0] = action()
        except BayesLoraError as error:
            outcome[1] = error.args
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise BayesLoraError(*outcome[1])
    return outcome[0]  # type: ignore[no-any-return]


def together(action: Callable[[], T]) -> T:
    """Return what `action` returns; a BayesLoraError of any process is raised in all of them."""
    if not _is_joined():
        return action()
    found: T | None = None
    sentences: tuple[str, ...] = ()
    try:
        found = action()
    except BayesLoraError as error:
        sentences = error.args
    collected: list[Any] = [None] * count()
    dist.all_gather_object(collected, sentences)
    if any(collected):
        raise BayesLoraError(*dict.fromkeys(sentence for each in collected for sentence in each))
    return found  # type: ignore[return-value]


def any_of(flag: bool) -> bool:
    """Return whether `flag` is True in any process."""
    if not _is_joined():
        return flag
    value = torch.tensor(int(flag), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value)


def leave() -> None:
    """End the communication, so that the first process can go on for as long as it takes."""
    if _is_joined():
        dist.barrier()
        dist.destroy_process_group()


def _is_joined() -> bool:
    return dist.is_available() and dist.is_initialized()

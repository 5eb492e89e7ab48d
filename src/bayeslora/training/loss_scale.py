"""Correct the scale of a Trainer's loss by testing the model; the Trainer only reads the signature of its forward.

The Trainer counts n, the labels in all micro-batches and ranks of an optimizer step, and passes it as
`num_items_in_batch` to every model whose forward takes `**kwargs`. It expects the sum of the losses divided by n in
return, so it does not divide by the number of micro-batches, and it multiplies by the number of ranks. Language models
divide by n. Most classifiers of transformers ignore it and return the mean over one micro-batch, so their gradient is
micro-batches x ranks times too large. Adam and clipping hide that, but the penalty, added once, counts too little.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from bayeslora.prediction.predict import evaluation_mode


def correct_loss_scale(trainer: Trainer) -> None:
    """Set `trainer.model_accepts_loss_kwargs` to False if the loss of the first batch does not depend on n.

    The loss of a step is then the mean of its micro-batches' means. The model is not tested if a step has a single
    micro-batch on a single device, where both scales are the same, or if the loss is the caller's: a
    `compute_loss_func`, or a subclass with a `compute_loss`, such as TRL's trainers.
    """
    if trainer.compute_loss_func is not None or type(trainer).compute_loss is not Trainer.compute_loss:
        return
    collect = trainer.get_batch_samples
    is_known = False

    @functools.wraps(collect)
    def collect_and_test(*args: Any, **kwargs: Any) -> tuple[list[Any], Tensor | int | None]:
        nonlocal is_known
        batches, items = collect(*args, **kwargs)
        is_divided = len(batches) > 1 or trainer.args.world_size > 1 or trainer.args.n_gpu > 1
        if is_divided and items is not None and trainer.model_accepts_loss_kwargs and not is_known:
            once, twice = _losses(trainer, batches[0], [items, 2 * items])
            is_known = bool(once != 0)  # a batch without labels shows nothing: the next step tests again
            if is_known and torch.isclose(once, twice, rtol=1e-2, atol=0.0):
                trainer.model_accepts_loss_kwargs = False
        return batches, items

    trainer.get_batch_samples = collect_and_test  # type: ignore[method-assign]


def _losses(trainer: Trainer, batch: dict[str, Any], numbers: list[Tensor | int]) -> Tensor:
    """Return the loss of `batch`, summed over ranks, for each number of items; without labels it is 0.

    It is computed between two steps in evaluation mode, so at the posterior mean, and keeps the random state.
    """
    model = trainer.model
    assert model is not None
    devices = [trainer.args.device] if trainer.args.device.type == "cuda" else []
    losses = []
    with torch.no_grad(), evaluation_mode(model):
        for number in numbers:
            with torch.random.fork_rng(devices), trainer.compute_loss_context_manager():
                inputs = dict(trainer._prepare_inputs(batch))  # a copy: label smoothing takes the labels out
                loss: Any = trainer.compute_loss(model, inputs, num_items_in_batch=number)
                losses.append(loss.mean())
    total: Tensor = trainer.accelerator.reduce(torch.stack(losses).float().nan_to_num(0.0, 0.0, 0.0), "sum")
    return total

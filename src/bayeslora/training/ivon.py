"""IVON inside `transformers.Trainer`: how it is made, when it draws, and what makes sure that the mean comes back."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sized
from typing import Any

import torch
from peft import TaskType
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer

from bayeslora.errors import BayesLoraError
from bayeslora.methods.tuner import BayesTuner, tuner_of
from bayeslora.optim import IVON
from bayeslora.posterior import unwrapped
from bayeslora.posterior.draws import local
from bayeslora.training.groups import parameter_groups

OptimizerFactory = Callable[..., Optimizer]
"""From groups of parameters and, by name, `lr`, `ess` and `seed`, to an optimizer: `IVON`, or a partial of it."""

_LOSS_BY_TOKEN = (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM, TaskType.TOKEN_CLS)
_NAMES_BY_TOKEN = ("ForMaskedLM", "ForTokenClassification")

_LEAST_TRAVEL = 0.05
_LEAST_TRAVEL_OF = {"bayes_adalora": 0.5}
"""How far a weight should be able to get in a run. AdaLoRA's diagonal begins at zero, between factors of size 0.02: on
SST-2 a travel of 0.3 left MiniLM at 69%, 1.2 took it to 84%, 1.5 to 86%."""


class IvonLoop:
    """What `BayesLoop` is to one of this library's methods, for a model that IVON alone makes Bayesian: plain LoRA."""

    def __init__(self, optimizer: IVON, step: int = 0) -> None:
        self.optimizer, self.step = optimizer, step

    def step_begin(self) -> None:
        """Before the first micro-batch of an optimizer step: the weights become its draw."""
        self.optimizer.sample(self.step)

    def before_optimizer_step(self, scale: float = 1.0) -> None:
        """Nothing: the gradients are paired with the noise in the optimizer's step, when they have been unscaled."""

    def step_end(self) -> None:
        """After the optimizer's step."""
        self.step += 1

    def statistics(self) -> dict[str, float]:
        """What to log beside the loss."""
        return posterior_statistics(self.optimizer)


def posterior_statistics(optimizer: IVON) -> dict[str, float]:
    """Mean of the posterior's deviations, their coefficient of variation, and the median of |mean| / deviation.

    A variation near 0 says that the Hessian has hardly moved: all weights are then equally uncertain.
    """
    entries = optimizer.gaussians()
    known = [(e.mean, e.deviation) for e in entries if e.mean is not None and e.deviation is not None]
    if not known:
        return {}
    means = torch.cat([local(mean).flatten().float() for mean, _ in known])
    deviations = torch.cat([local(deviation).flatten().float() for _, deviation in known])
    return {
        "posterior_std": float(deviations.mean()),
        "posterior_std_variation": float(deviations.std() / deviations.mean()),
        "signal_to_noise": float((means.abs() / deviations).median()),
    }


def warn_of_short_travel(optimizer: IVON, steps: int, tuner: BayesTuner | None) -> None:
    """Warn where no weight can get far from its start in so many steps, whatever its gradients are.

    Args:
        optimizer: with the learning rates of the whole run.
        steps: of the run.
        tuner: of the adapter, where it is one of this library's.
    """
    methods = [] if tuner is None else [getattr(config, "method", "") for config in tuner.peft_config.values()]
    least = max((_LEAST_TRAVEL_OF.get(method, _LEAST_TRAVEL) for method in methods), default=_LEAST_TRAVEL)
    travel = steps * max(map(_largest_step, optimizer.param_groups))
    if travel < least:
        warnings.warn(
            f"IVON can move a weight by {travel:.2g} at most in {steps} steps (learning rate x (hess_init + "
            f"weight_decay) x clip_radius x steps), and this adapter needs about {least:g} to learn much: raise the "
            "learning rate or clip_radius, or train for longer",
            stacklevel=2,
        )


def _largest_step(group: dict[str, Any]) -> float:
    rate = float(group.get("initial_lr", group["lr"]))  # a schedule may begin at zero
    scale = group["hess_init"] + group["weight_decay"] if group["rescale_lr"] else 1.0
    return rate * scale * float(group["clip_radius"])


def uses_ivon(trainer: Trainer) -> bool:
    """Whether `trainer` was given an IVON, or its class, by its own arguments."""
    given = trainer.optimizer_cls_and_kwargs
    named = given[0] if given is not None else None
    return isinstance(unwrapped(trainer.optimizer), IVON) or (isinstance(named, type) and issubclass(named, IVON))


def factory_of(optimizer: str | OptimizerFactory) -> OptimizerFactory:
    """`"ivon"` or a callable as a callable; raises `BayesLoraError` for any other name."""
    if callable(optimizer):
        return optimizer
    if optimizer != "ivon":
        raise BayesLoraError(
            f"optimizer is {optimizer!r}, 'ivon' or a callable such as functools.partial(bayeslora.IVON, …) "
            "is needed: name others in TrainingArguments(optim=…)"
        )
    return IVON


def posterior_optimizer(
    trainer: Trainer, factory: OptimizerFactory, num_examples: int | None
) -> tuple[type, dict[str, Any]]:
    """What makes the Trainer build its optimizer with `factory`, over the method's groups.

    Rate, decay and seed are those of the Trainer's arguments and `ess` the number of training examples, each unless
    `factory` is a partial that has it.
    """

    class PosteriorOptimizer:
        def __call__(self, model: nn.Module, **unused: Any) -> Optimizer:
            args, own = trainer.args, dict(getattr(factory, "keywords", {}))
            lr, decay = own.pop("lr", args.learning_rate), own.pop("weight_decay", args.weight_decay)
            options: dict[str, Any] = {"lr": lr, "seed": args.seed, "ess": num_examples or training_examples(trainer)}
            options.update({name: own[name] for name in options if name in own})
            if options["ess"] is None:
                raise BayesLoraError(
                    "the number of training examples is unknown here, IVON needs it for the posterior's width: give "
                    "attach num_examples, the number of terms that the loss is a mean of over the whole training set"
                )
            return factory(parameter_groups(model, lr, decay), **options)

    return PosteriorOptimizer, {}


def training_examples(trainer: Trainer) -> int | None:
    """The number of training examples, where each of them is one term of the loss."""
    model, dataset = trainer.model, trainer.train_dataset
    assert model is not None
    root: Any = tuner_of(model) or getattr(model, "base_model", None)
    configs: dict[str, Any] = getattr(root, "peft_config", {})
    active = root.active_adapters[0] if configs else ""
    inner = root.model if configs else model
    task = getattr(configs.get(active), "task_type", None)
    generates = getattr(inner, "can_generate", None)
    by_token = task in _LOSS_BY_TOKEN or type(inner).__name__.endswith(_NAMES_BY_TOKEN)
    if by_token or (generates is not None and generates()) or not isinstance(dataset, Sized):
        return None
    return len(dataset)


def check_ivon(tuner: BayesTuner) -> None:
    """Raise where IVON does not fit the method of `tuner`: its steps have not the size that Adam's have."""
    roles = {tuner.role_of(name) for name, p in tuner.named_parameters() if p.requires_grad} - {"weights"}
    if roles:
        raise BayesLoraError(
            f"the adapter has {', '.join(sorted(roles))}, whose learning rates are made for Adam's steps, and IVON "
            "trains deterministic weights: use AdamW here, or an adapter such as LoRA with IVON"
        )


def check_trainer(optimizer: IVON) -> None:
    """Raise where a Trainer, which runs every batch once, could not drive `optimizer`."""
    if optimizer.mc_samples != 1:
        raise BayesLoraError(
            f"mc_samples is {optimizer.mc_samples}, but a Trainer runs each batch once, under one draw: use "
            "mc_samples=1 with larger batches, or a loop of your own"
        )


def restore_after_training(trainer: Trainer, restore: Callable[[], None]) -> None:
    """Leave `trainer.train` with the weights at their mean, whatever ends it."""
    train = trainer.train

    @functools.wraps(train)
    def train_and_restore(*args: Any, **kwargs: Any) -> Any:
        try:
            return train(*args, **kwargs)
        finally:
            restore()

    trainer.train = train_and_restore  # type: ignore[method-assign]

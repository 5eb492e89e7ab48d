"""Optimizers for a Trainer over the groups of the method's parameters: that of its arguments, or IVON."""

from __future__ import annotations

from collections.abc import Callable, Sized
from typing import Any, cast

from peft import TaskType
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, Trainer

from bayeslora.errors import BayesLoraError
from bayeslora.methods.tuner import tuner_of
from bayeslora.optim import IVON
from bayeslora.posterior import unwrapped
from bayeslora.training.groups import parameter_groups

OptimizerFactory = Callable[..., Optimizer]
"""Function from parameter groups and keywords `lr`, `ess` and `seed` to an optimizer: `IVON`, or a partial of it."""

_LOSS_BY_TOKEN = (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM, TaskType.TOKEN_CLS)
_NAMES_BY_TOKEN = ("ForMaskedLM", "ForTokenClassification")

_COMPARE_PAIRS = {"DPOTrainer", "RewardTrainer", "CPOTrainer", "ORPOTrainer"}


def uses_ivon(trainer: Trainer) -> bool:
    """Return True if `trainer` was constructed with an IVON, or with its class."""
    given = trainer.optimizer_cls_and_kwargs
    named = given[0] if given is not None else None
    return isinstance(unwrapped(trainer.optimizer), IVON) or (isinstance(named, type) and issubclass(named, IVON))


def grouped_optimizer(trainer: Trainer) -> tuple[type, dict[str, Any]]:
    """Return the `optimizer_cls_and_kwargs` for the optimizer of the Trainer's arguments over the method's groups."""

    def build(model: nn.Module) -> Optimizer:
        args = trainer.args
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args, cast(PreTrainedModel, model))
        options = {key: value for key, value in options.items() if key not in ("params", "model")}
        return optimizer_class(parameter_groups(model, args.learning_rate, args.weight_decay), **options)

    return _built_by(build)


def posterior_optimizer(
    trainer: Trainer, optimizer: str | OptimizerFactory, num_examples: int | None
) -> tuple[type, dict[str, Any]]:
    """Return the `optimizer_cls_and_kwargs` for `optimizer`, `"ivon"` or a factory, over the method's groups.

    Rate, decay and seed come from the Trainer's arguments and `ess` is the number of training examples, unless the
    factory is a partial that sets them.
    """
    if optimizer != "ivon" and not callable(optimizer):
        raise BayesLoraError(
            f"optimizer is {optimizer!r}, but must be 'ivon' or a callable such as functools.partial(bayeslora.IVON, "
            "…): name others in TrainingArguments(optim=…)"
        )
    factory = optimizer if callable(optimizer) else IVON

    def build(model: nn.Module) -> Optimizer:
        args, given = trainer.args, dict(getattr(factory, "keywords", {}))
        lr, decay = given.pop("lr", args.learning_rate), given.pop("weight_decay", args.weight_decay)
        options: dict[str, Any] = {"lr": lr, "seed": args.seed, "ess": num_examples or training_examples(trainer)}
        options.update({name: given[name] for name in options if name in given})
        if options["ess"] is None:
            raise BayesLoraError(
                "the number of training examples is unknown, but IVON's posterior depends on it: give attach "
                "num_examples, the number of terms that the loss is a mean of over the whole training set"
            )
        return factory(parameter_groups(model, lr, decay), **options)

    return _built_by(build)


def _built_by(build: Callable[[nn.Module], Optimizer]) -> tuple[type, dict[str, Any]]:
    """Wrap `build` as the Trainer expects it: a class without arguments whose instances make an optimizer."""

    class BuiltOptimizer:
        def __call__(self, model: nn.Module, **unused: Any) -> Optimizer:
            return build(model)

    return BuiltOptimizer, {}


def compares_pairs(trainer: Trainer) -> bool:
    """Return whether a term of the loss compares two rows, as TRL's trainers do that learn from preferences."""
    return any(kind.__name__ in _COMPARE_PAIRS for kind in type(trainer).__mro__)


def training_examples(trainer: Trainer) -> int | None:
    """Return the terms of the loss on the training set: an example is one, or its labels are; None if tokens are."""
    model, dataset = trainer.model, trainer.train_dataset
    assert model is not None
    root: Any = tuner_of(model) or getattr(model, "base_model", None)
    configs: dict[str, Any] = getattr(root, "peft_config", {})
    active = root.active_adapters[0] if configs else ""
    inner = root.model if configs else model
    task = getattr(configs.get(active), "task_type", None)
    generates = getattr(inner, "can_generate", None)
    if compares_pairs(trainer) and isinstance(dataset, Sized):
        return len(dataset)
    by_token = task in _LOSS_BY_TOKEN or type(inner).__name__.endswith(_NAMES_BY_TOKEN)
    if by_token or (generates is not None and generates()) or not isinstance(dataset, Sized):
        return None
    config, features = getattr(inner, "config", None), getattr(dataset, "features", None) or {}
    kind, labels = getattr(config, "problem_type", None), features.get("labels", features.get("label"))
    is_vector = str(getattr(getattr(labels, "feature", None), "dtype", "")).startswith("float")
    several = kind in ("multi_label_classification", "regression") or (kind is None and is_vector)
    return len(dataset) * (getattr(config, "num_labels", 1) if several else 1)

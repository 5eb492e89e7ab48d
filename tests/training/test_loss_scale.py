"""Gradient accumulation after `attach`: the gradient of the whole batch's loss, whatever kind of head computes it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import (
    BertForMultipleChoice,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaForSequenceClassification,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import bayeslora
from tests.conftest import VOCABULARY, build_tiny_bert, build_tiny_llama

ROWS, LENGTH = 32, 6
TARGETS = r".*\.(query|value|q_proj|v_proj)"


def _tokens(*shape: int) -> Tensor:
    return torch.randint(5, len(VOCABULARY), shape, generator=torch.Generator().manual_seed(0))


def _bert(head: type[PreTrainedModel], **options: Any) -> PreTrainedModel:
    config = build_tiny_bert(**options).config
    torch.manual_seed(0)
    return head(config)


def _llama_classifier() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForSequenceClassification(build_tiny_llama(num_labels=3, pad_token_id=0).config)


def _completions() -> Tensor:
    """Labels of a language model: another number of them in each row."""
    return torch.stack([torch.cat([torch.full((i % 5,), -100), row[i % 5 :]]) for i, row in enumerate(_tokens(32, 6))])


Head = tuple[Callable[[], PreTrainedModel], Callable[[], Tensor], bool]
HEADS: dict[str, Head] = {
    "classes": (lambda: _bert(BertForSequenceClassification, num_labels=3), lambda: _tokens(ROWS) % 3, False),
    "classes of a decoder": (_llama_classifier, lambda: _tokens(ROWS) % 3, False),
    "regression": (lambda: _bert(BertForSequenceClassification, num_labels=1), lambda: _tokens(ROWS) / 50.0, False),
    "several labels": (lambda: _bert(BertForSequenceClassification), lambda: _tokens(ROWS, 2) % 2 * 1.0, False),
    "tokens": (lambda: _bert(BertForTokenClassification), lambda: _tokens(ROWS, LENGTH) % 2, False),
    "choices": (lambda: _bert(BertForMultipleChoice), lambda: _tokens(ROWS) % 4, False),
    "next tokens": (build_tiny_llama, _completions, True),
}


def _data(kind: str) -> list[dict[str, Tensor]]:
    tokens = _tokens(ROWS, 4, LENGTH) if kind == "choices" else _tokens(ROWS, LENGTH)
    return [{"input_ids": row, "labels": label} for row, label in zip(tokens, HEADS[kind][1](), strict=True)]


def _adapted(base: PreTrainedModel, config: Any = None) -> nn.Module:
    torch.manual_seed(0)
    config = config or LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)
    return get_peft_model(base, config)


def _arguments(folder: Path, accumulation: int = 1, **options: Any) -> TrainingArguments:
    settings = {
        "per_device_train_batch_size": ROWS // accumulation,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 1,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **options,
    }
    return TrainingArguments(output_dir=str(folder), **settings)


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", HEADS)
def test_a_step_of_four_micro_batches_has_the_gradient_of_the_whole_batchs_loss(kind: str, tmp_path: Path) -> None:
    build, _, divides = HEADS[kind]
    data = _data(kind)
    model = _adapted(build())
    model(**{name: torch.stack([row[name] for row in data]) for name in data[0]}).loss.backward()
    expected = {name: p.detach() - 0.1 * p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    trainer = bayeslora.attach(Trainer(model, _arguments(tmp_path, 4), train_dataset=data))
    trainer.train()
    assert trainer.model_accepts_loss_kwargs is divides
    for name, value in _trained(model).items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("optimizer", [None, functools.partial(bayeslora.IVON, hess_init=0.5)], ids=["sgd", "ivon"])
def test_four_micro_batches_are_one_batch_against_the_penalty_and_for_ivon(optimizer: Any, tmp_path: Path) -> None:
    """Adapters with a divergence for SGD; plain LoRA under IVON, whose Hessian is a square of gradients."""
    ends = []
    for accumulation in (1, 4):
        divergence = {"r": 4, "target_modules": TARGETS, "task_type": "SEQ_CLS", "kl_weight": 5.0}
        config = bayeslora.MeLoraConfig(**divergence) if optimizer is None else None
        model = _adapted(HEADS["classes"][0](), config)
        arguments = _arguments(tmp_path, accumulation, max_steps=6)
        with bayeslora.posterior_mean(model):  # a draw is one for each micro-batch
            bayeslora.attach(Trainer(model, arguments, train_dataset=_data("classes")), optimizer=optimizer).train()
        ends.append(_trained(model))
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, atol=1e-6, rtol=1e-4, msg=name)


def test_asking_changes_no_random_number(tmp_path: Path) -> None:
    """With dropout, a run that asks ends bit for bit where one ends that is told."""
    ends = []
    for is_told in (False, True):
        model = _adapted(_bert(BertForSequenceClassification, hidden_dropout_prob=0.3))
        trainer = Trainer(model, _arguments(tmp_path, 4, max_steps=3), train_dataset=_data("several labels"))
        if is_told:
            trainer.model_accepts_loss_kwargs = False
        bayeslora.attach(trainer).train()
        ends.append(_trained(model))
    assert all(torch.equal(ends[1][name], value) for name, value in ends[0].items())


class Stream(IterableDataset):
    """Rows in their order, each of them to be had once an epoch."""

    def __init__(self, rows: list[dict[str, Tensor]]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.rows)


@pytest.mark.parametrize("kind", ["tokens", "next tokens"])
def test_a_batch_without_labels_says_nothing_and_the_next_step_asks(kind: str, tmp_path: Path) -> None:
    """Without labels the mean of a classifier is not a number, and the sum of a language model is zero for every n."""
    build, _, divides = HEADS[kind]
    rows = _data(kind)
    for row in rows[:16]:
        row["labels"] = torch.full_like(row["labels"], -100)
    model = _adapted(build())
    asked = []

    class Recorder(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            asked.append(trainer.model_accepts_loss_kwargs)

    arguments = _arguments(tmp_path, 8, per_device_train_batch_size=2, max_steps=2)  # the second step has the labels
    trainer = bayeslora.attach(Trainer(model, arguments, train_dataset=Stream(rows), callbacks=[Recorder()]))
    trainer.train()
    assert asked == [True, divides]


@pytest.mark.parametrize("how", ["function", "subclass"])
def test_a_loss_of_the_callers_own_is_not_asked(how: str, tmp_path: Path) -> None:
    calls = []

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        calls.append(num_items_in_batch)
        return nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch

    class Own(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, num_items_in_batch: Any = None, **kw: Any) -> Any:
            return loss(model(input_ids=inputs["input_ids"]), inputs["labels"], num_items_in_batch)

    model, arguments = _adapted(HEADS["classes"][0]()), _arguments(tmp_path, 4)
    if how == "subclass":
        trainer: Trainer = Own(model, arguments, train_dataset=_data("classes"))
    else:
        trainer = Trainer(model, arguments, train_dataset=_data("classes"), compute_loss_func=loss)
    bayeslora.attach(trainer).train()
    assert trainer.model_accepts_loss_kwargs
    assert calls == [ROWS] * 4

"""What the benchmarks share: a fine-tuned model from a task and a configuration, and runs that can be resumed."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

import bayeslora
from bayeslora.evaluation import (
    ChoiceTrainer,
    Task,
    choice_scoring,
    encode,
    encode_prompts,
    packaged_model,
    unpack_model,
)

# The base model's own dropout takes a quarter of a step on a CPU; no method has it in these benchmarks.
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# torch's fused attention spends more than half of a bfloat16 training step on a CPU in its backward pass.
ATTENTION = {"attn_implementation": "eager"}


@dataclass(frozen=True)
class Training:
    """How long and how fast, the same for every method that is compared."""

    steps: int
    learning_rate: float = 1e-3
    batch_size: int = 32
    max_length: int = 128


def classifier(task: Task, training: Training) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Dataset]]:
    """The packaged encoder with a new head, its tokenizer, and the encoded splits."""
    folder = packaged_model("minilm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=len(task.labels), **NO_DROPOUT, **ATTENTION
    )
    return model, tokenizer, encode(task, tokenizer, training.max_length)


def language_model(
    task: Task, training: Training
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Dataset]]:
    """The packaged language model, its tokenizer, and the splits as prompts that ask for a letter."""
    folder = unpack_model("smollm2", Path(tempfile.gettempdir()) / "bayeslora-smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **ATTENTION)
    classes = len(task.labels)
    encoded = {
        name: encode_prompts(split, tokenizer, classes=classes, max_length=training.max_length)
        for name, split in task.splits.items()
    }
    return model, tokenizer, encoded


def fine_tune(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Dataset,
    config: PeftConfig,
    training: Training,
    seed: int,
) -> tuple[nn.Module, dict[str, Any]]:
    """The adapted and trained model, with `seconds`, `parameters` and the `history` of its training.

    `seed` is that of the data's order; the head and the adapter start from torch's present state.
    """
    model = get_peft_model(base, config)
    parameters = bayeslora.cost.count_parameters(model)
    causal = "choice_mask" in data.column_names
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            scratch,
            max_steps=training.steps,
            per_device_train_batch_size=training.batch_size,
            learning_rate=training.learning_rate,
            warmup_steps=round(0.06 * training.steps),
            bf16=True,
            train_sampling_strategy="group_by_length",
            use_cpu=not torch.cuda.is_available(),
            seed=seed,
            logging_steps=20,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=not causal,
        )
        if causal:
            scoring = choice_scoring(data, tokenizer)
            trainer: Trainer = ChoiceTrainer(
                model, arguments, train_dataset=data, data_collator=scoring.collate, class_logits=scoring.logits
            )
        else:
            trainer = Trainer(model, arguments, train_dataset=data, data_collator=DataCollatorWithPadding(tokenizer))
        bayeslora.attach(trainer, num_examples=len(data) if bayeslora.methods.has_posterior(model) else None)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    return model, {"seconds": seconds, "parameters": parameters, "history": trainer.state.log_history}


def once(path: Path, run: Callable[[], dict[str, Any]]) -> None:
    """Do `run` and write its result to `path`, unless that has been done, or another process is at it."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(path.name + ".lock")
    try:
        os.close(os.open(lock, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    try:
        found = {**run(), "versions": {"torch": torch.__version__, "bayeslora": bayeslora.__version__}}
        beside = path.with_name(path.name + ".partial")
        beside.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        beside.rename(path)
    finally:
        lock.unlink()

"""Fine-tuning for multiple choice: the loss over an item's choices, with causal models, encoders and our adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PrinterCallback, TrainingArguments

import bayeslora
from bayeslora.data.tasks import Task
from bayeslora.errors import BayesLoraError
from bayeslora.evaluation import compute_metrics_for
from bayeslora.evaluation.choice_trainer import ChoiceTrainer
from bayeslora.evaluation.multiple_choice import choice_scoring, encode_pairs, encode_prompts
from tests.conftest import build_tiny_llama, build_tiny_tokenizer
from tests.evaluation.choice_items import split
from tests.evaluation.test_multiple_choice import build_tiny_bert_for_choices


def make_trainer(model: nn.Module, data: Any, tokenizer: Any, folder: Path, **options: Any) -> ChoiceTrainer:
    settings: dict[str, Any] = {
        "max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "report_to": "none", "use_cpu": True,
        "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1, "lr_scheduler_type": "constant",
    }  # fmt: skip
    scoring = choice_scoring(data, tokenizer)
    trainer = ChoiceTrainer(
        class_logits=scoring.logits,
        data_collator=scoring.collate,
        model=model,
        args=TrainingArguments(output_dir=str(folder), **{**settings, **options}),
        train_dataset=data,
        eval_dataset=data,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def adapted(config: Any = None) -> nn.Module:
    torch.manual_seed(0)
    default = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(build_tiny_llama(), config or default)


def test_the_loss_is_the_cross_entropy_over_an_items_own_choices(tmp_path: Path) -> None:
    tokenizer = build_tiny_tokenizer(causal=True)
    data = encode_prompts(split(16), tokenizer, classes=5)
    trainer = make_trainer(adapted(), data, tokenizer, tmp_path)
    scoring = choice_scoring(data, tokenizer)
    batch = scoring.collate(list(data))
    loss = trainer.compute_loss(trainer.model, batch).detach()
    expected = []
    for row in data:
        alone = trainer.model(input_ids=torch.tensor([row["input_ids"]])).logits[0, -1]
        letters = alone[list(scoring.logits.letter_ids)][: sum(row["choice_mask"])]  # type: ignore[attr-defined]
        expected.append(-letters.log_softmax(-1)[row["label"]])
    torch.testing.assert_close(loss, torch.stack(expected).mean(), atol=1e-5, rtol=0)
    task = Task("made", "multiple_choice", ("question", "choices"), "label", list("ABCDE"), "accuracy", {})
    trainer.compute_metrics = compute_metrics_for(task)
    scores = trainer.evaluate()
    assert scores["eval_loss"] == pytest.approx(float(loss), abs=1e-5)
    assert scores["eval_nll"] == pytest.approx(float(loss), abs=1e-5)
    hits = (scoring.logits(trainer.model, batch).argmax(-1) == batch["labels"]).float().mean()
    assert scores["eval_accuracy"] == pytest.approx(float(hits))


def test_micro_batches_give_the_step_of_one_batch(tmp_path: Path) -> None:
    tokenizer = build_tiny_tokenizer(causal=True)
    data = encode_prompts(split(16), tokenizer, classes=5)
    weights = []
    for size, count in ((8, 1), (2, 4)):
        model = adapted()
        make_trainer(
            model, data, tokenizer, tmp_path, max_steps=3, per_device_train_batch_size=size, max_grad_norm=0.1,
            gradient_accumulation_steps=count, optim="sgd", learning_rate=1.0,
        ).train()  # fmt: skip
        weights.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
    assert any(value.abs().max() > 0 for name, value in weights[0].items() if "lora_B" in name)
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["lora", "blora", "melora"])
def test_a_causal_model_learns_to_name_the_right_letter(method: str, tmp_path: Path) -> None:
    tokenizer = build_tiny_tokenizer(causal=True)
    data = encode_prompts(split(32, most=2), tokenizer, classes=2)
    options: dict[str, Any] = {"r": 8, "target_modules": ["q_proj", "v_proj", "o_proj"], "task_type": "CAUSAL_LM"}
    if method == "blora":
        # Of rows that it knows by heart the model is sure: to second order every gate is then free at any price, but
        # a budget says how many may close.
        options["target_bops"] = 0.6
    configs = {"lora": LoraConfig, "blora": bayeslora.BLoraConfig, "melora": bayeslora.MeLoraConfig}
    config = configs[method](**options)
    model = adapted(config)
    steps = 60
    trainer = make_trainer(model, data, tokenizer, tmp_path, max_steps=steps, per_device_train_batch_size=32)
    bayeslora.attach(trainer, num_examples=10_000)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.05
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(build_tiny_llama(), tmp_path / "adapter").eval()
    scoring = choice_scoring(data, tokenizer)
    batch = scoring.collate(list(data))
    model.eval()
    torch.testing.assert_close(scoring.logits(again, batch), scoring.logits(model, batch), atol=1e-5, rtol=0)


def test_an_encoder_learns_to_choose(tmp_path: Path, tiny_tokenizer: Any) -> None:
    data = encode_pairs(split(32, most=3), tiny_tokenizer, classes=3)
    config = LoraConfig(r=8, target_modules=["query", "value", "dense"], modules_to_save=["classifier"])
    model = get_peft_model(build_tiny_bert_for_choices(), config)
    trainer = make_trainer(model, data, tiny_tokenizer, tmp_path, max_steps=60, per_device_train_batch_size=32)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before - 0.2


def test_label_smoothing_is_refused(tmp_path: Path) -> None:
    tokenizer = build_tiny_tokenizer(causal=True)
    data = encode_prompts(split(4), tokenizer, classes=5)
    with pytest.raises(BayesLoraError, match="label_smoothing_factor is 0.1"):
        make_trainer(adapted(), data, tokenizer, tmp_path, label_smoothing_factor=0.1)


def test_a_diverged_model_stops_the_training(tmp_path: Path) -> None:
    tokenizer = build_tiny_tokenizer(causal=True)
    data = encode_prompts(split(4), tokenizer, classes=5)
    trainer = make_trainer(adapted(), data, tokenizer, tmp_path)
    with torch.no_grad():
        next(p for name, p in trainer.model.named_parameters() if "lora_B" in name).fill_(float("nan"))
    with pytest.raises(BayesLoraError, match="the logit of a correct answer is not finite"):
        trainer.train()

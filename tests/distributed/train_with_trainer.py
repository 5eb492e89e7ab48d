"""python -m torch.distributed.run --standalone --nproc-per-node 2 train_with_trainer.py OUT BATCH ACCUMULATION

Trains tiny models for six optimizer steps with Trainer, one for each of `KINDS`, and saves the trainable parameters,
the history and the evaluation loss of each rank to OUT/RANK.pt.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from torch import nn  # noqa: E402
from transformers import Trainer, TrainingArguments, set_seed  # noqa: E402

import bayeslora  # noqa: E402
from tests.conftest import build_tiny_bert, build_tiny_llama  # noqa: E402

KINDS = ("blora", "blora paper", "ivon", "language model")


def _model(kind: str) -> nn.Module:
    set_seed(0)
    if kind == "language model":
        targets = ["q_proj", "v_proj"]
        return get_peft_model(build_tiny_llama(), LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    options: dict[str, Any] = {"r": 4, "lora_alpha": 4, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    if kind == "ivon":
        return get_peft_model(build_tiny_bert(), LoraConfig(**options))
    if kind == "blora paper":
        gates: dict[str, Any] = {
            "gates": "paper",
            "calibration": "absmax",
            "bit_penalty": 1e-2,
            "rank_penalty": 1e-2,
        }
    else:  # the best range of a batch of activations is not the mean of those of its parts
        activations = dict.fromkeys(("A_out", "E_out", "out"), 32)
        gates = {"fixed_bits": activations, "target_bops": 0.75, "target_rank": 2.0}
    config = bayeslora.BLoraConfig(
        **gates,
        warmup_fraction=0.2,
        freeze_fraction=0.2,
        **options,
    )
    return get_peft_model(build_tiny_bert(), config)


def _train(kind: str, folder: str, batch: int, accumulation: int) -> dict[str, Any]:
    model = _model(kind)
    generator = torch.Generator().manual_seed(1)
    rows: list[dict[str, Any]] = []
    for index in range(48):
        tokens = torch.randint(5, 60, (8,), generator=generator)
        rows.append({"input_ids": tokens, "labels": tokens if kind == "language model" else index % 2})
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=6,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        use_cpu=True,
        ddp_backend="gloo",
        save_strategy="no",
        report_to="none",
        logging_steps=2,
        disable_tqdm=True,
        seed=0,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    bayeslora.attach(trainer, optimizer="ivon" if kind == "ivon" else None).train()
    parameters = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    evaluation_loss = trainer.evaluate()["eval_loss"]
    return {"parameters": parameters, "history": trainer.state.log_history, "evaluation loss": evaluation_loss}


def main(folder: str, batch: int, accumulation: int) -> None:
    results = {kind: _train(kind, folder, batch, accumulation) for kind in KINDS}
    torch.save(results, f"{folder}/{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))

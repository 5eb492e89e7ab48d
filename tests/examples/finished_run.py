"""The folder of a finished run, made without training."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import get_peft_model

import bayeslora
from bayeslora.runs.base import load_base, load_tokenizer, tokenizer_digest
from bayeslora.runs.info import RunInfo
from tests.cli.conftest import review_rows, write_jsonl


def make_run(folder: Path, base: Path, pairs: bool = False) -> Path:
    """The folder of a finished Me-LoRA run whose draws disagree."""
    rows = review_rows(40, seed=1)
    columns = ["text_a", "text_b"] if pairs else ["text"]
    for row in rows:
        text = row.pop("text")
        row |= {name: text for name in columns}
    file = write_jsonl(folder.parent / f"{folder.name}.jsonl", rows)
    tokenizer = load_tokenizer(str(base), str(base))
    torch.manual_seed(0)
    loaded = load_base(str(base), tokenizer, labels=["bad", "good"], kind="classification", dtype="float32")
    config = bayeslora.MeLoraConfig(
        r=4, lora_alpha=16, target_modules=["query", "value"], task_type="SEQ_CLS", init_weights=False, initial_std=1.5
    )
    model = get_peft_model(loaded.model, config).eval()
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.mul_(30)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    RunInfo(
        method="melora", model=str(base), task="reviews", kind="classification", metric="accuracy",
        text_columns=columns, label_column="label", labels=["bad", "good"], max_length=16, dtype="float32",
        base_fingerprint=loaded.fingerprint, base_name=model.peft_config["default"].base_model_name_or_path,
        files={"eval_file": str(file)}, tokenizer_digest=tokenizer_digest(tokenizer),
    ).save(folder)  # fmt: skip
    return folder

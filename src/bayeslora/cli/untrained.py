"""A language model as it is, for `evaluate` on multiple choice: zero-shot and few-shot scores need no training."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from bayeslora.cli.models import (
    RUN_FILE,
    RunInfo,
    head_for,
    hush,
    load_base,
    load_run,
    load_tokenizer,
    longest_input,
    ready,
    resolve_model,
)
from bayeslora.data.choices import CHOICE_FILES
from bayeslora.errors import BayesLoraError

METHOD = "none"


def run_info(given: dict[str, Any]) -> RunInfo:
    """The finished run in the folder that is given; or, for a base model on a multiple-choice task, a run of no steps.

    `--few-shot` takes the place of what the run was trained with.

    Raises:
        BayesLoraError: neither; or a base model that is no language model, whose head would be random.
    """
    folder = Path(given["folder"])
    if (folder / RUN_FILE).is_file() or given.get("task") not in CHOICE_FILES:
        info = RunInfo.load(folder)
        return dataclasses.replace(info, few_shot=given.get("few_shot", info.few_shot))
    name = str(given["folder"])
    if head_for("multiple_choice", resolve_model(name), name) != "letters":
        raise BayesLoraError(
            f"{name} is no run of `bayeslora train`, and no language model either, so it cannot answer untrained; "
            "name a run or a language model."
        )
    return RunInfo(
        method=METHOD,
        model=name,
        task=str(given["task"]),
        kind="multiple_choice",
        metric="accuracy",
        text_columns=["question", "choices"],
        label_column="label",
        labels=[],
        max_length=0,
        dtype="float32",
        base_fingerprint="",
        base_name=name,
        task_name=str(given["task"]),
        head="letters",
        few_shot=given.get("few_shot", 0),
    )


def load(given: dict[str, Any], info: RunInfo) -> tuple[torch.nn.Module, PreTrainedTokenizerBase, RunInfo]:
    """The model and the tokenizer of `run_info(given)`; and `info`, with a base model's longest prompt filled in."""
    if info.method != METHOD:
        model, tokenizer, _ = load_run(Path(given["folder"]), given.get("model"))
        return model, tokenizer, info
    hush()
    tokenizer = load_tokenizer(resolve_model(info.model), info.model)
    base = load_base(info.model, tokenizer, labels=[], regression=False, dtype=info.dtype, head=info.head)
    length = longest_input(base.model, tokenizer, None, info.head)
    return ready(base.model), tokenizer, dataclasses.replace(info, max_length=length)

"""A language model as it is, on multiple choice: zero-shot and few-shot scores need no training."""

from __future__ import annotations

from pathlib import Path

from bayeslora.errors import BayesLoraError
from bayeslora.runs.base import head_for, load_base, load_tokenizer, longest_input, ready, resolve_model
from bayeslora.runs.info import RunInfo
from bayeslora.runs.run import Run

UNTRAINED = "none"


def untrained_info(model: str, task: str, few_shot: int = 0) -> RunInfo:
    """Return the record of a run of no steps on a multiple-choice task; `load_untrained` fills in the longest prompt.

    Raises:
        BayesLoraError: a base model that is not a language model, whose head would be random.
    """
    if head_for("multiple_choice", resolve_model(model), model) != "letters":
        raise BayesLoraError(
            f"{model} is neither a run of `bayeslora train` nor a language model, so it cannot answer untrained: "
            "name a run or a language model"
        )
    return RunInfo(
        method=UNTRAINED,
        model=model,
        task=task,
        kind="multiple_choice",
        metric="accuracy",
        text_columns=["question", "choices"],
        label_column="label",
        labels=[],
        max_length=0,
        dtype="float32",
        base_fingerprint="",
        base_name=model,
        task_name=task,
        head="letters",
        few_shot=few_shot,
    )


def load_untrained(info: RunInfo) -> Run:
    """Return the base model of `untrained_info` as a run."""
    tokenizer = load_tokenizer(resolve_model(info.model), info.model)
    base = load_base(info.model, tokenizer, labels=[], regression=False, dtype=info.dtype, head=info.head)
    info.max_length = longest_input(base.model, tokenizer, None, info.head)
    return Run(Path(info.model), ready(base.model), tokenizer, info)

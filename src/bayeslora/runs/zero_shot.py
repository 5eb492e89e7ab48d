"""Zero-shot and few-shot scores of an untrained language model on multiple choice."""

from __future__ import annotations

from pathlib import Path

from bayeslora.data.known import KNOWN
from bayeslora.errors import BayesLoraError
from bayeslora.runs.base import (
    LANGUAGE_HEADS,
    DeviceMap,
    base_of,
    check_device_map,
    head_for,
    load_tokenizer,
    longest_input,
    ready,
    resolve_model,
)
from bayeslora.runs.info import RunInfo
from bayeslora.runs.run import Run

UNTRAINED = "none"


def untrained_info(model: str, task: str, few_shot: int = 0) -> RunInfo:
    """Describe an untrained model on a multiple-choice task as a run; `load_untrained` sets `max_length`.

    It answers as usual for the task.

    Raises:
        BayesLoraError: the base model is not a language model; its head would be random.
    """
    usual = KNOWN[task].cloze
    if head_for("multiple_choice", resolve_model(model), model) not in LANGUAGE_HEADS:
        raise BayesLoraError(
            f"{model} is not a run of `bayeslora train`, but an untrained model must be a language model: "
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
        head="cloze" if usual else "letters",
        context=usual.context if usual else "",
        normalization=usual.normalization if usual else "none",
        few_shot=few_shot,
    )


def load_untrained(info: RunInfo, device_map: DeviceMap | None = None) -> Run:
    """Load the base model of `untrained_info` as a run."""
    tokenizer = load_tokenizer(resolve_model(info.model), info.model)
    check_device_map(device_map)
    base = base_of(info, info.model, tokenizer, device_map)
    info.max_length = longest_input(base.model, tokenizer, None, info.head)
    return Run(Path(info.model), ready(base.model), tokenizer, info)

"""Read and write `run.json`: task, labels, columns, lengths, digests of the base model and the tokenizer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from bayeslora.data.choices import Cloze
from bayeslora.errors import BayesLoraError, Problems, option
from bayeslora.files import check_readable, save_json
from bayeslora.runs.digests import save_digests
from bayeslora.runs.schema import Mismatch, from_json
from bayeslora.vocabulary import Normalization, Scoring

RUN_FILE = "run.json"
UNKNOWN = "unknown"
"""Task of a folder without `run.json`."""

Head = Literal["sequence", "words", "choices", "letters", "cloze", "text", "seq2seq"]
"""Source of the class logits: a classifier (or regressor) of a text or pair, one of the words of a text, a scorer of
questions with a choice, or a language model's head, at the letters of the choices or at the tokens of their text;
`text` and `seq2seq` answer in their words."""
RunKind = Literal[
    "classification", "multi_label", "regression", "token_classification", "multiple_choice", "generation"
]


_SEVERAL = {"multi_label": "has several labels a row", "token_classification": "tags each word of a row"}


def check_one_label_a_row(kind: str, what: str) -> None:
    """Raise `BayesLoraError` for a kind of run with several answers a row, where `what` needs one."""
    if kind in _SEVERAL:
        raise BayesLoraError(f"the run {_SEVERAL[kind]}, but {what} needs one: use a run with one label")


def refuse(given: Mapping[str, Any], names: Sequence[str], reason: str) -> None:
    """Raise for each of the options `names` that is given; its message is the option and `reason`."""
    Problems(f"{option(name)} {reason}" for name in names if name in given).tell()


@dataclass
class RunInfo:
    """Everything needed to load a run; fields with a default may be missing from older folders.

    Attributes:
        method: a value of `bayeslora train --method`; `full` for any model without an adapter.
        model: folder or hub id of the base model.
        task: name of the task.
        kind: kind of the task, such as `"classification"` or `"generation"`.
        metric: name of the task's headline score.
        text_columns: names of the input columns: one, or two for pairs; `messages`, or `prompt` and `completion`, for
            generation; empty if unknown (a folder without `run.json`, and none given to `load`).
        label_column: name of the label column in the user's files, or several names joined by commas (`a,b`).
        labels: class names by id, or names of tags; empty for regression and generation.
        label_numbers: numbers that stand for the labels in the user's files, if they are not the class ids.
        max_length: maximum input length in tokens.
        dtype: dtype of the base model's weights.
        base_fingerprint: digest of the base model's weights; empty if unknown.
        base_name: `base_model_name_or_path` in the adapter's configuration.
        task_name: name to pass to `load_task`; None for a task from files.
        data_dir: folder with the data of a named task.
        head: head of the model, such as `"sequence"`; `"letters"`, `"cloze"` or `"text"` for causal language models.
        context: text before a choice, for a run that scores by cloze (`Cloze.context`).
        normalization: divisor of the log-likelihoods, for a run that scores by cloze (`Cloze.normalization`).
        train_split: training split that was chosen, for a named task that has several.
        few_shot: number of solved examples in each prompt.
        files: paths `train_file`, `eval_file` and `test_file`, for a task from files.
        evaluation_rows: numbers (from 0) of the rows of `train_file` that are held out; empty with an `eval_file`.
        train_digest: digest of `train_file`, if rows of it are held out; otherwise None.
        tokenizer_digest: digest of the tokenizer's vocabulary (`base.tokenizer_digest`); None skips the check.
    """

    method: str
    model: str
    task: str
    kind: RunKind
    metric: str
    text_columns: list[str]
    label_column: str
    labels: list[str]
    max_length: int
    dtype: str
    base_fingerprint: str
    base_name: str
    task_name: str | None = None
    data_dir: str | None = None
    head: Head = "sequence"
    context: str = ""
    normalization: Normalization = "none"
    train_split: str | None = None
    few_shot: int = 0
    files: dict[str, str] = field(default_factory=dict)
    evaluation_rows: list[int] = field(default_factory=list)
    train_digest: str | None = None
    tokenizer_digest: str | None = None
    label_numbers: dict[str, int] = field(default_factory=dict)

    @property
    def scoring(self) -> Scoring | None:
        """Return how a language model answers multiple choice, `"letters"` or `"cloze"`; None for other models."""
        if self.kind != "multiple_choice":
            return None
        return "letters" if self.head == "letters" else "cloze" if self.head == "cloze" else None

    @property
    def cloze(self) -> Cloze:
        """Return the rule by which a run with the head `"cloze"` scores the text of each choice."""
        return Cloze(self.context, self.normalization)

    def save(self, folder: Path) -> None:
        """Write `run.json` and the digests of the other files in `folder`, which must already be there."""
        save_digests(folder)
        save_json(folder / RUN_FILE, dataclasses.asdict(self))

    @classmethod
    def load(cls, folder: Path) -> RunInfo:
        """Read `run.json`.

        Raises:
            BayesLoraError: the folder is not a finished run, its file is damaged, or a newer version wrote it.
        """
        path = folder / RUN_FILE
        wanted = "but must be a folder that `bayeslora train` or `export` wrote: check the path"
        if not folder.is_dir():
            raise BayesLoraError(f"{folder} is not a folder, {wanted}")
        if not path.is_file():
            raise BayesLoraError(f"{folder} lacks {RUN_FILE}, {wanted}")
        check_readable(path)
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            known = {each.name: each for each in dataclasses.fields(cls)}
            if unknown := sorted({*content} - {*known}):
                raise BayesLoraError(
                    f"{path} has the field {unknown[0]!r}, but this version of bayeslora does not know it: "
                    "load the run with the version that wrote it"
                )
            if empty := [name for name in content if content[name] is None and known[name].default is not None]:
                raise ValueError(f"{empty[0]} is missing")
            return cast(RunInfo, from_json(cls, content))
        except BayesLoraError:
            raise
        except (OSError, ValueError, TypeError, RecursionError) as error:
            why: object = error
            if isinstance(error, Mismatch):
                why = f"{error.key.partition('[')[0]} has {repr(error.value)[:40]} where {error.wanted} is needed"
            raise BayesLoraError(f"{path} is damaged ({why}): train again or restore it from a copy") from error

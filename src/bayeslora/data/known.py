"""Published tasks with a name: one table of them, and their rows from a data folder or the hub."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from bayeslora.data.choices import ANSWER, CHOICES, LABEL, QUESTION, SUBJECT, Cloze
from bayeslora.data.labels import TaskKind
from bayeslora.data.tables import Table, read_table
from bayeslora.errors import BayesLoraError

TRAIN, VALIDATION, TEST, MISMATCHED = "train", "validation", "test", "validation_mismatched"
LABEL_TEXT = f"{LABEL}_text"


def _splits(
    train: tuple[str, ...] = ("train",), validation: tuple[str, ...] = ("dev", "validation"), **more: tuple[str, ...]
) -> dict[str, tuple[str, ...]]:
    return {TRAIN: train, VALIDATION: validation, **more, TEST: ("test",)}


@dataclass(frozen=True)
class Known:
    """One task, a line of the table.

    Attributes:
        name: also that of the task's folder in a data folder.
        hub: id of the data set on the hub; its loading must not need a script.
        config: configuration there, if it has several; `{}` is the last part of a name in `sizes`.
        columns: text columns there; for multiple choice, the question and then the choices, in one column or several.
        label: label column there: ids, names, or for multiple choice indices or marks of the choices.
        labels: class names, index = class id; empty for regression and multiple choice.
        metrics: the headline score, then other usual ones.
        kind: `"classification"`, `"regression"` or `"multiple_choice"`.
        splits: names of each split in a folder or on the hub; the first that exists is used.
        sizes: training files of a folder to choose from, instead of one; the first that exists is the default.
        gap: True for sentences with a gap instead of questions.
        unlabelled: True if files have rows labelled -1, for which annotators did not agree; they are dropped.
        cloze: of multiple choice that a language model answers by cloze by default, as in lm-evaluation-harness, whose
            scores others publish: how its choices are scored by their text. Otherwise it answers by letters.
    """

    name: str
    hub: str
    config: str | None
    columns: tuple[str, ...]
    label: str
    labels: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("accuracy",)
    kind: TaskKind = "classification"
    splits: Mapping[str, tuple[str, ...]] = field(default_factory=_splits)
    sizes: tuple[str, ...] = ()
    gap: bool = False
    unlabelled: bool = False
    cloze: Cloze | None = None

    @property
    def text_columns(self) -> tuple[str, ...]:
        """Text columns of a folder's files."""
        if self.kind == "multiple_choice":
            return QUESTION, CHOICES
        return ("text",) if len(self.columns) == 1 else ("text_a", "text_b")

    @property
    def answer(self) -> str:
        """Label column of a folder's files."""
        return ANSWER if self.kind == "multiple_choice" else LABEL


_GLUE, _ARC = "nyu-mll/glue", "allenai/ai2_arc"
_WINO, _OPEN = "allenai/winogrande", "allenai/openbookqa"
_TEXT, _PAIR, _NLI, _ITEM = ("text",), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question", "choices")
_TWO_WAY, _THREE_WAY = ("entailment", "not_entailment"), ("entailment", "neutral", "contradiction")
_TOPICS, _ANSWERS = ("World", "Sports", "Business", "Sci/Tech"), ("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM")
_WITH_F1, _CORRELATIONS = ("accuracy", "f1"), ("pearson", "spearman")
_MATCHED = _splits(
    validation=("dev_matched", "validation_matched", "dev", "validation"),
    **{MISMATCHED: ("dev_mismatched", "validation_mismatched")},
)
# Published without a development set, so the test set is the evaluation split unless a folder has another.
_NO_DEV = _splits(validation=("dev", "validation", "test"))
# MMLU's dev split has five examples per subject, for prompts and not for training.
_SUBJECTS = {"few_shot": ("dev",), TEST: ("test",)}
_SENTENCES, _GAP = ("train_sentences", "train"), ("sentence", "option1", "option2")
_SIZES = ("train_s", "train_xs", "train_m")
_CHOICE: Final = "multiple_choice"
# A choice answers a question or continues a sentence. OpenBookQA's differ much in length: a sum favours the shortest.
_ANSWER, _STEM, _STEM_BY_TOKEN = Cloze(), Cloze("{question}"), Cloze("{question}", "tokens")
_TABLE = (
    Known("mnli", _GLUE, "mnli", _NLI, "label", _THREE_WAY, splits=_MATCHED),
    Known("sst2", _GLUE, "sst2", ("sentence",), "label", ("negative", "positive"), splits=_splits(_SENTENCES)),
    Known("cola", _GLUE, "cola", ("sentence",), "label", ("unacceptable", "acceptable"), ("matthews_correlation",)),
    Known("qqp", _GLUE, "qqp", ("question1", "question2"), "label", ("not_duplicate", "duplicate"), _WITH_F1),
    Known("qnli", _GLUE, "qnli", ("question", "sentence"), "label", _TWO_WAY),
    Known("rte", _GLUE, "rte", _PAIR, "label", _TWO_WAY),
    Known("mrpc", _GLUE, "mrpc", _PAIR, "label", ("not_equivalent", "equivalent"), _WITH_F1),
    Known("stsb", _GLUE, "stsb", _PAIR, "label", (), _CORRELATIONS, "regression"),
    Known("snli", "stanfordnlp/snli", None, _NLI, "label", _THREE_WAY, unlabelled=True),
    Known("boolq", "google/boolq", None, ("question", "passage"), "answer", ("no", "yes")),
    Known("ag_news", "fancyzhx/ag_news", None, _TEXT, "label", _TOPICS, splits=_NO_DEV),
    Known("subj", "SetFit/subj", None, _TEXT, "label", ("objective", "subjective"), splits=_NO_DEV),
    Known("trec", "SetFit/TREC-QC", None, _TEXT, "label_coarse_original", _ANSWERS, splits=_NO_DEV),
    Known("winogrande", _WINO, "winogrande_{}", _GAP, "answer", kind=_CHOICE, sizes=_SIZES, gap=True, cloze=_STEM),
    Known("arc_easy", _ARC, "ARC-Easy", _ITEM, "answerKey", kind=_CHOICE, cloze=_ANSWER),
    Known("arc_challenge", _ARC, "ARC-Challenge", _ITEM, "answerKey", kind=_CHOICE, cloze=_ANSWER),
    Known("openbookqa", _OPEN, "main", ("question_stem", "choices"), "answerKey", kind=_CHOICE, cloze=_STEM_BY_TOKEN),
    Known("commonsenseqa", "tau/commonsense_qa", None, _ITEM, "answerKey", kind=_CHOICE),
    Known("piqa", "baber/piqa", None, ("goal", "sol1", "sol2"), "label", kind=_CHOICE, cloze=_ANSWER),
    Known("mmlu", "cais/mmlu", "all", _ITEM, "answer", kind=_CHOICE, splits=_SUBJECTS),
)
KNOWN = {known.name: known for known in _TABLE}


def known_tables(known: Known, data_dir: str | Path | None, train_split: str | None = None) -> dict[str, Table]:
    """Return the rows of each split with the columns of a data folder: texts or choices, and label or answer.

    Raises:
        BayesLoraError: the training file is unknown, a file is missing or malformed, or the hub cannot be read.
    """
    if train_split is not None and train_split not in known.sizes:
        if TRAIN in known.splits and not known.sizes:
            raise BayesLoraError(f"{known.name} has one training split, but {train_split!r} was given: leave it out")
        files = ", ".join(known.sizes) or "none"
        raise BayesLoraError(f"the training split is {train_split!r}, but {known.name} has {files}: name one, or none")
    if data_dir is None:
        tables = _hub(known, train_split or next(iter(known.sizes), ""))
    else:
        tables = _folder(known, Path(data_dir), (train_split,) if train_split else known.sizes)
    if data_dir is None or known.unlabelled:
        tables = {split: _labelled(table, known) for split, table in tables.items()}
        # The hub has test splits with hidden labels.
        tables = {split: table for split, table in tables.items() if len(table) or not _optional(split, known)}
    for table in tables.values():
        if not len(table):
            raise BayesLoraError(f"{table.path} has 0 rows with a label, but at least 1 is needed: check the data")
    return tables


def _optional(split: str, known: Known) -> bool:
    return split in (TEST, MISMATCHED) and VALIDATION in known.splits


def _names(known: Known, available: Collection[str], train: tuple[str, ...] = ()) -> dict[str, str]:
    """Return the name of each split: the first available one, or the first of all if the split is needed.

    `train` replaces the possible names of the training split.
    """
    names: dict[str, str] = {}
    for split, options in {**known.splits, **({TRAIN: train} if train else {})}.items():
        found = next((name for name in options if name in available and name not in names.values()), None)
        if found or not _optional(split, known):
            names[split] = found or options[0]
    return names


def _folder(known: Known, data_dir: Path, train: tuple[str, ...]) -> dict[str, Table]:
    folder = data_dir / known.name
    if not folder.is_dir():
        raise BayesLoraError(
            f"{folder} is not a folder, but one with a file for each split of {known.name} is needed: check data_dir"
        )
    names = _names(known, {path.stem for path in folder.glob("*.jsonl")}, train)
    wanted, optional = (*known.text_columns, known.answer), (LABEL_TEXT, SUBJECT, "id")
    return {split: read_table(folder / f"{name}.jsonl", wanted, optional) for split, name in names.items()}


def _hub(known: Known, size: str) -> dict[str, Table]:
    import datasets

    config = known.config and known.config.format(size.removeprefix("train_"))
    try:
        loaded = datasets.load_dataset(known.hub, config)
        splits = {split: loaded[name] for split, name in _names(known, loaded).items()}
    except Exception as error:  # without a connection, the hub's clients raise a dozen unrelated types
        files = " and ".join(f"{known.name}/{name}.jsonl" for name in _names(known, (), known.sizes).values())
        raise BayesLoraError(
            f"{known.name} is read from {known.hub}, but could not be loaded ({type(error).__name__}): "
            f"give data_dir, a folder with {files}, to work without it"
        ) from error
    tables = {}
    for split, data in splits.items():
        columns = _items(data, known) if known.kind == "multiple_choice" else _texts(data, known)
        places = [f"row {number}" for number in range(1, len(data) + 1)]
        tables[split] = Table(Path(known.hub, config or "", split), columns, places)
    return tables


def _texts(data: Any, known: Known) -> dict[str, list[Any]]:
    columns = {ours: list(data[theirs]) for ours, theirs in zip(known.text_columns, known.columns, strict=True)}
    columns[LABEL] = [int(value) if isinstance(value, bool) else value for value in data[known.label]]
    feature = data.features[known.label]
    if hasattr(feature, "int2str"):
        columns[LABEL_TEXT] = [feature.int2str(value) if value >= 0 else "" for value in columns[LABEL]]
    return columns


def _items(data: Any, known: Known) -> dict[str, list[Any]]:
    """Return the columns of multiple-choice rows.

    On the hub, choices are a list, a dict of texts and marks (`A` or `1`), or several columns, marked from `1`. An
    answer is an index or a mark.
    """
    question, *options = known.columns
    items = list(data[options[0]]) if len(options) == 1 else [*zip(*(data[name] for name in options), strict=True)]
    choices = [list(item["text"] if isinstance(item, dict) else item) for item in items]
    marks = [item["label"] if isinstance(item, dict) else ["1", "2"] for item in items]
    answers = [found.index(key) if key in found else key for found, key in zip(marks, data[known.label], strict=True)]
    columns = {QUESTION: list(data[question]), CHOICES: choices, ANSWER: answers}
    if SUBJECT in data.column_names:
        columns[SUBJECT] = list(data[SUBJECT])
    if known.gap:  # the hub has dropped the ids of twins, but twins share their options
        columns["id"] = ["|".join(sorted(texts)) + "-" for texts in choices]
    return columns


def _labelled(table: Table, known: Known) -> Table:
    """Return the rows that have a label; the hub hides one as -1 or an empty string."""
    labels = table.columns[known.answer]
    kept = [row for row, label in enumerate(labels) if label not in (-1, "")]
    return table.select(kept)

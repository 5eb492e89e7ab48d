"""Write the model card of a run: its scores, sizes and costs, and how to load it."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from bayeslora.methods.registry import package_of
from bayeslora.model_card import CARD_FILE, front_matter, public_name, source_of_base
from bayeslora.report import text
from bayeslora.report.page import environment, write_files
from bayeslora.runs.digests import ADAPTER_CONFIG, adapter_config
from bayeslora.runs.info import RUN_FILE, RunInfo
from bayeslora.runs.names import order_matrices, shortest_labels
from bayeslora.runs.record import RunRecord, read_run

# Auto class and the hub's pipeline tag by PEFT's task type, and by ours for multiple choice, which PEFT lacks.
_TASK_TYPES = {
    "SEQ_CLS": ("AutoModelForSequenceClassification", "text-classification"),
    "CAUSAL_LM": ("AutoModelForCausalLM", "text-generation"),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", "text2text-generation"),
    "TOKEN_CLS": ("AutoModelForTokenClassification", "token-classification"),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", "question-answering"),
    "FEATURE_EXTRACTION": ("AutoModel", "feature-extraction"),
    "MULTIPLE_CHOICE": ("AutoModelForMultipleChoice", "multiple-choice"),
}


def write_model_card(output_dir: Path) -> Path:
    """Write the model card `output_dir/README.md` from `metrics.json` and, if there is one, `adapter_config.json`.

    The front matter holds metadata for model hubs, including the scores. For a method of this library, the loading
    code imports `bayeslora` first, because PEFT raises a bare KeyError for a method that is not registered.

    Raises:
        BayesLoraError: `metrics.json` is missing or malformed, or `adapter_config.json` cannot be read.
    """
    folder = Path(output_dir)
    run = read_run(folder)
    config = adapter_config(folder) if (folder / ADAPTER_CONFIG).exists() else {}
    info = RunInfo.load(folder) if (folder / RUN_FILE).is_file() else None
    generates = info is not None and info.kind == "generation"
    task_type = "CAUSAL_LM" if generates else _task_type(config, info)
    auto_class, pipeline_tag = _TASK_TYPES.get(task_type, ("AutoModel", None))
    base = public_name(str(config.get("base_model_name_or_path") or run.model), run.model)
    adapter = bool(run.layers)
    tasks = [run.task] if info is None or info.task_name else []
    context = {
        "run": run,
        "front_matter": front_matter(
            f"{run.title} on {run.task}",
            base,
            library="peft" if adapter else "transformers",
            tags=["bayeslora", run.method, *tasks, *(["lora"] if adapter else [])],
            pipeline_tag=pipeline_tag,
            task=run.task,
            dataset=run.dataset,
            split=run.split or "validation",
            scores=run.scores,
        ),
        "base": base,
        "source": source_of_base(base),
        "adapter": adapter,
        "needs_import": package_of(run.method),
        "auto_class": auto_class,
        "with_labels": task_type in ("SEQ_CLS", "TOKEN_CLS") and bool(run.labels),
        "regression": task_type == "SEQ_CLS" and not run.labels,
        "example": _example(info),
        "generates": generates,
        "tags_words": info is not None and info.kind == "token_classification",
        "table": _by_matrix(run),
        "kinds": run.kinds if run.is_quantized else [],
        "literal": lambda value: json.dumps(value, ensure_ascii=False),
    }
    card = environment().get_template("card.md.j2").render(context)
    return write_files(folder, {CARD_FILE: card.encode()})[0]


def _task_type(config: dict[str, Any], info: RunInfo | None) -> str:
    """Return PEFT's task type, or ours for multiple choice."""
    if info is not None and info.head == "words":  # also of a whole model
        return "TOKEN_CLS"
    mapping = config.get("auto_mapping") or {}
    if not config.get("task_type") and str(mapping.get("base_model_class", "")).endswith("ForMultipleChoice"):
        return "MULTIPLE_CHOICE"
    return str(config.get("task_type") or "SEQ_CLS")


def _example(info: RunInfo | None) -> str:
    """Return an example row for `Run.predict` as Python source."""
    if info is not None and info.kind == "token_classification":
        return '"a text", ["or", "its", "words"]'
    if info is not None and info.kind == "multiple_choice":
        return '{"question": "a question", "choices": ["one answer", "another"]}'
    return '"a text"' if info is None or len(info.text_columns) < 2 else '("a text", "its pair")'


def _by_matrix(run: RunRecord) -> list[dict[str, Any]]:
    """Return one row per matrix (query, key, …): number of layers, mean and range of rank, median width by kind."""
    groups = defaultdict(list)
    for layer in run.layers:
        groups[layer.address.matrix].append(layer)
    labels = shortest_labels(groups)
    rows = []
    for matrix in order_matrices(groups):
        layers = groups[matrix]
        ranks = [layer.rank for layer in layers]
        low, high = min(ranks), max(ranks)
        widths = {kind: [layer.bits[kind] for layer in layers if kind in layer.bits] for kind in run.kinds}
        medians = {kind: text.compact(statistics.median(found) if found else None) for kind, found in widths.items()}
        spread = f"{text.compact(statistics.fmean(ranks))} ({low}–{high})" if low < high else str(low)
        rows.append({"matrix": labels[matrix], "count": len(layers), "rank": spread, "bits": medians})
    return rows

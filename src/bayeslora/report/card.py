"""The model card: what the adapter is, how good, how small, and how to load it in a process of its own."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from bayeslora.errors import BayesLoraError
from bayeslora.report import text
from bayeslora.report.page import environment
from bayeslora.runs.names import order_matrices, shortest_labels
from bayeslora.runs.record import RunRecord, read_run, write_bytes

CARD_NAME = "README.md"
_AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
    "MULTIPLE_CHOICE": "AutoModelForMultipleChoice",
}
_PIPELINE_TAGS = {
    "SEQ_CLS": "text-classification",
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
    "MULTIPLE_CHOICE": "multiple-choice",
}
# Methods that PEFT knows by itself; every other one needs `import bayeslora` before its folder can be read.
_PLAIN_PEFT = frozenset({"lora"})


def write_model_card(output_dir: Path) -> Path:
    """Write ``output_dir/README.md`` from ``metrics.json`` and, where there is one, ``adapter_config.json``.

    The front matter carries ``library_name``, ``base_model`` and ``tags`` as model hubs read them. For a method of
    this library the loading code imports ``bayeslora`` first, because PEFT looks the method up by name while it reads
    the folder and a process that has not registered it stops with a bare KeyError.

    Raises:
        BayesLoraError: ``metrics.json`` is missing or malformed, or ``adapter_config.json`` cannot be read.
    """
    folder = Path(output_dir)
    run = read_run(folder)
    config = _adapter_config(folder)
    task_type = _task_type(config)
    base = str(config.get("base_model_name_or_path") or run.model)
    adapter = run.method != "full"
    context = {
        "run": run,
        "front_matter": _front_matter(run, base, task_type, adapter),
        "base": base,
        "adapter": adapter,
        "needs_import": adapter and run.method not in _PLAIN_PEFT,
        "auto_class": _AUTO_CLASSES.get(task_type, "AutoModel"),
        "with_labels": task_type in ("SEQ_CLS", "TOKEN_CLS") and bool(run.labels),
        "regression": task_type == "SEQ_CLS" and not run.labels,
        # One text a batch is what a classifier takes; these take a prompt, or a pair for each choice.
        "causal": task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM", "MULTIPLE_CHOICE"),
        "table": _by_matrix(run),
        "kinds": run.kinds if run.is_quantized else [],
        "literal": lambda value: json.dumps(value, ensure_ascii=False),
    }
    card = environment().get_template("card.md.j2").render(context)
    return write_bytes(folder / CARD_NAME, card.encode("utf-8"))


def _adapter_config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    if not path.exists():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BayesLoraError(f"{path} cannot be read as JSON ({error}); save the adapter again.") from error
    if not isinstance(config, dict):
        raise BayesLoraError(f"{path} holds a {type(config).__name__}, not an object; save the adapter again.")
    return config


def _task_type(config: dict[str, Any]) -> str:
    """PEFT's name of the task; for multiple choice, which it has none for, ours."""
    mapping = config.get("auto_mapping") or {}
    if not config.get("task_type") and str(mapping.get("base_model_class", "")).endswith("ForMultipleChoice"):
        return "MULTIPLE_CHOICE"
    return str(config.get("task_type") or "SEQ_CLS")


def _front_matter(run: RunRecord, base: str, task_type: str, adapter: bool) -> str:
    import yaml

    tags = ["bayeslora", run.method, run.task] + (["lora"] if adapter and run.method != "lora" else [])
    fields: dict[str, Any] = {"library_name": "peft" if adapter else "transformers", "base_model": base}
    if task_type in _PIPELINE_TAGS:
        fields["pipeline_tag"] = _PIPELINE_TAGS[task_type]
    fields["tags"] = list(dict.fromkeys(tags))
    # A line break in a name would let it write lines of its own into the front matter.
    fields = {k: [_one_line(x) for x in v] if isinstance(v, list) else _one_line(v) for k, v in fields.items()}
    return str(yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=100_000)).rstrip()


def _one_line(value: str) -> str:
    return " ".join(value.split())


def _by_matrix(run: RunRecord) -> list[dict[str, Any]]:
    """One row a matrix (query, key, …): how many there are, mean and range of rank, median width by kind."""
    groups = defaultdict(list)
    for layer in run.layers:
        groups[layer.address.matrix].append(layer)
    labels = shortest_labels(groups)
    rows = []
    for matrix in order_matrices(groups):
        layers = groups[matrix]
        ranks = [layer.rank for layer in layers]
        low, high = min(ranks), max(ranks)
        widths = {
            kind: text.compact(statistics.median(x.bits[kind] for x in layers if kind in x.bits))
            if any(kind in x.bits for x in layers)
            else "–"
            for kind in run.kinds
        }
        spread = f"{text.compact(statistics.fmean(ranks))} ({low}–{high})" if low < high else str(low)
        rows.append({"matrix": labels[matrix], "count": len(layers), "rank": spread, "bits": widths})
    return rows

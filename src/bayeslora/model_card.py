"""Front matter of model cards for model hubs, for adapters and exports."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

CARD_FILE = "README.md"


def front_matter(
    name: str,
    base_model: str,
    *,
    library: str,
    tags: Iterable[str],
    relation: str | None = None,
    pipeline_tag: str | None = None,
    task: str = "",
    dataset: str | None = None,
    split: str = "validation",
    scores: Mapping[str, float] | None = None,
) -> str:
    """Return the YAML between the dashes; `scores` become a `model-index`, which a hub displays.

    Args:
        name: of the model in the index.
        base_model: hub id, package or folder name.
        library: that loads the model, `peft` or `transformers`.
        tags: duplicates are removed.
        relation: to the base model, such as `merge`.
        pipeline_tag: the hub's name of the kind of task.
        task: name of the task that `scores` were measured on.
        dataset: hub id of its data set, if it has one.
        split: of that data set.
        scores: by the hub's names of metrics; values that are not finite are left out.
    """
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type=pipeline_tag or "text-classification",
            dataset_type=dataset or _one_line(task),
            dataset_name=_one_line(task),
            dataset_split=split,
            metric_type=_one_line(metric),
            metric_value=value,
        )
        for metric, value in (scores or {}).items()
        if math.isfinite(value)
    ]
    data = ModelCardData(
        base_model=_one_line(base_model),
        base_model_relation=relation,
        datasets=[dataset] if dataset else None,
        library_name=library,
        pipeline_tag=pipeline_tag,
        tags=list(dict.fromkeys(map(_one_line, tags))),
        model_name=_one_line(name),
        eval_results=results or None,
    )
    return str(data.to_yaml())


def public_name(*names: str) -> str:
    """Return the first name that is valid on other machines (a hub id or a package).

    If all are local paths, which a card must not reveal, return the last part of the first. If that is `model`, as
    in a package, return the part before it.
    """
    path = Path(names[0])
    last = path.parent.name if path.name == "model" and path.parent.name else path.name
    return next((name for name in names if not _is_path(name)), last)


def _is_path(name: str) -> bool:
    path = Path(name)
    return path.is_absolute() or path.exists() or name.startswith((".", "~")) or name.count("/") > 1


def _one_line(value: str) -> str:
    """Replace line breaks, with which a name could add fields to the front matter."""
    return " ".join(value.split())

"""Front matter of model cards, as model hubs read it, for adapters and exports alike."""

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
    """Return the YAML between the dashes; `scores` become a `model-index`, which makes a hub show them.

    Args:
        name: the model's, in the index.
        base_model: hub id, package or folder name.
        library: that loads the model, `peft` or `transformers`.
        tags: repeated ones are left out.
        relation: to the base model, such as `merge`.
        pipeline_tag: the hub's name of the kind of task.
        task: name of the task that `scores` were measured on.
        dataset: hub id of its data set, if it has one.
        split: of that data set.
        scores: by the hub's names of metrics; those that are not finite are left out.
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
    """Return the first of a model's names that means something elsewhere: a hub id or a package.

    Where all are paths on this machine, which a card must not tell, it is the name of the first folder.
    """
    return next((name for name in names if not _is_path(name)), Path(names[0]).name)


def _is_path(name: str) -> bool:
    path = Path(name)
    return path.is_absolute() or path.exists() or name.startswith((".", "~")) or name.count("/") > 1


def _one_line(value: str) -> str:
    """A line break in a name would let it write lines of its own into the front matter."""
    return " ".join(value.split())

"""Model cards: their front matter, those of the formats that PEFT or this library loads, and what all say alike."""

from __future__ import annotations

import importlib.metadata
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bayeslora.errors import BayesLoraError, counted

CARD_FILE = "README.md"

_TITLES = {
    "lora": "plain LoRA for {base}",
    "packed": "packed adapter for {base}",
    "integer": "{base} as integers",
}
_WHAT = {
    "lora": "An adapter for `{base}`, trained with the method `{method}` of bayeslora, as a plain LoRA of PEFT: "
    "what lies between its factors is folded into them, and a posterior is used at its mean or at one draw.",
    "packed": "An adapter for `{base}`, trained with the method `{method}` of bayeslora. Every tensor takes the bits "
    "that it has learned, and closed ranks are cut.",
    "integer": "`{base}` with an adapter that was trained with the method `{method}` of bayeslora, as one model of "
    "integer codes at the learned widths, with static ranges.",
}
_NEEDS = {"lora": "transformers peft", "packed": "bayeslora", "integer": "bayeslora"}
_PACKED = "The adapter computes what the trained one computes, to the rounding of sums in floating point."
CARDED = tuple(_TITLES)
"""Formats that `write_card` has a card for; the others write their own."""

_AS_A_RUN = """
## With its tokenizer and labels

They are in this folder too. With `pip install bayeslora`:

```python
import bayeslora

run = bayeslora.load(".")  # also finds a base that is an installed Python package
```
"""

_LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")
_FROM_THE_RUN = ("license", "datasets", "pipeline_tag", "language")


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

    If all are local paths, which a card must not reveal, return the package that the first is in, or its last part; of
    one that ends in `model`, the part before that.
    """
    path = Path(names[0])
    last = path.parent.name if path.name == "model" and path.parent.name else path.name
    return next((name for name in names if not _is_path(name)), None) or _package_around(path) or last


def _package_around(path: Path) -> str | None:
    """Return the name under which pip installed what `path` is in."""
    for folder in path.parents:
        if folder.name in ("site-packages", "dist-packages"):
            top = path.relative_to(folder).parts[0]
            return next(iter(importlib.metadata.packages_distributions().get(top, [])), None)
    return None


def source_of_base(name: str) -> str:
    """Return Python for what `from_pretrained` takes: of an installed package, the folder that pip has put there."""
    files = [file for found in importlib.metadata.distributions(name=name or "/") for file in found.files or []]
    weights = next((file for file in files if file.name == "model.safetensors"), None)
    if weights is None:
        return json.dumps(name, ensure_ascii=False)
    return f'distribution("{name}").locate_file("{weights.parent.as_posix()}")'


def _is_path(name: str) -> bool:
    path = Path(name)
    return path.is_absolute() or path.exists() or name.startswith((".", "~")) or name.count("/") > 1


def _one_line(value: str) -> str:
    """Replace line breaks, with which a name could add fields to the front matter."""
    return " ".join(value.split())


def write_card(folder: Path, form: str, base_model: Any, config: Any, measured: Mapping[str, Any]) -> None:
    """Write `README.md`: what the folder holds, how to load it, its error and its source.

    Args:
        folder: of the export.
        form: `lora`, `packed` or `integer`.
        base_model: with its adapter inside.
        config: of the adapter.
        measured: what the export returns.
    """
    base = base_name(config, base_model)
    method = getattr(config, "method", "lora")
    title = _TITLES[form].format(base=f"`{base}`")
    front = front_matter(
        title.replace("`", ""),
        base,
        library="transformers" if form == "integer" else "peft",
        relation="quantized" if form == "integer" else "adapter",
        tags=["bayeslora", method, form],
    )
    text = f"""---
{front}
---

# {title[0].upper()}{title[1:]}

{_WHAT[form].format(base=base, method=method)}

## How to load it

With `pip install {_NEEDS[form]}`, in this folder:

```python
{_program(form, base, base_model)}
```

## Error

{_PACKED if form == "packed" else error_of(measured)}
"""
    (folder / CARD_FILE).write_text(text, encoding="utf-8")


def _program(form: str, base: str, base_model: Any) -> str:
    if form == "integer":
        return 'import bayeslora\n\nmodel = bayeslora.load_integer(".")'
    family = type(base_model).__name__
    first = "import bayeslora  # PEFT then knows the method\n" if form == "packed" else ""
    if not hasattr(base_model, "save_pretrained"):
        return f"""{first}from peft import PeftModel

model = PeftModel.from_pretrained(base, ".").eval()  # base: the {family} that was adapted"""
    labels = getattr(getattr(base_model, "config", None), "num_labels", None)
    is_classifier = family.endswith(("ForSequenceClassification", "ForTokenClassification"))
    size = f", num_labels={labels}" if is_classifier and labels is not None else ""
    source = source_of_base(base)
    lines = ("" if source.startswith('"') else "from importlib.metadata import distribution\n\n") + first
    return f"""{lines}from peft import PeftModel
from transformers import {family}

name = {source}
base = {family}.from_pretrained(name{size})
model = PeftModel.from_pretrained(base, ".").eval()"""


def base_name(config: Any, base_model: Any) -> str:
    """Return the public name of the model that an adapter with this config was trained on."""
    path = config.base_model_name_or_path or getattr(base_model, "name_or_path", "")
    return public_name(str(path)) if path else type(base_model).__name__


def error_of(measured: Mapping[str, Any], how: str = "", answers: str = "answers") -> str:
    """Return a paragraph with the measured differences from the trained model.

    Args:
        measured: what an export returns.
        how: it was measured, such as ` in onnxruntime`.
        answers: what a model predicts at each position.
    """
    said = []
    if measured.get("divergence") is not None:
        largest = f", and the largest {measured['max_divergence']:.2g}" if "max_divergence" in measured else ""
        said.append(
            f"{measured['changed']:.2%} of the {answers} change. The mean Kullback-Leibler divergence is "
            f"{measured['divergence']:.2g} nats{largest}."
        )
    if measured.get("max_output_error") is not None:
        said.append(
            f"The largest difference in outputs is {measured['max_output_error']:.3g}, where the largest output is "
            f"{measured['max_output']:.3g}."
        )
    if "loss_after" in measured:
        said.append(
            f"The loss of a token is {measured['loss_before']:.4f} before and {measured['loss_after']:.4f} after."
        )
    if not said:
        return "The difference from the trained model was not measured."
    on = f" on {counted(measured['rows'], 'row')}" if "rows" in measured else ""
    on = " on the base's dummy inputs, not on your data," if measured.get("dummy_inputs") else on
    return f"Measured{on}{how} beside the trained model: {' '.join(said)}"


def check_license(name: str) -> None:
    """Raise `BayesLoraError` unless `name` could be the hub's name of a license."""
    if not _LICENSE.fullmatch(name):
        raise BayesLoraError(f"license is {name!r}, but must be the hub's name of one: give one such as apache-2.0")


def complete_card(
    folder: Path,
    source: Path,
    license: str | None = None,  # noqa: A002 - the hub's name
    *,
    loads_as_run: bool = False,
) -> None:
    """Add to the card of an export what the card of its run says of data, task, language and license.

    Args:
        folder: of the export.
        source: of the run; one without a card adds nothing.
        license: the hub's name of one, such as `apache-2.0`, in place of the run's.
        loads_as_run: say how `bayeslora.load` reads the folder.
    """
    from huggingface_hub import ModelCard

    card = ModelCard.load(folder / CARD_FILE, ignore_metadata_errors=True)
    if (source / CARD_FILE).is_file():
        known = ModelCard.load(source / CARD_FILE, ignore_metadata_errors=True).data
        for name in _FROM_THE_RUN:
            if getattr(card.data, name, None) is None and getattr(known, name, None) is not None:
                setattr(card.data, name, getattr(known, name))
    if license is not None:
        card.data.license = license
    if loads_as_run:
        card.text += _AS_A_RUN
    card.save(folder / CARD_FILE)

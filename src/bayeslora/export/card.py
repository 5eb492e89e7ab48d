"""Cards of the formats that PEFT or this library loads, what all cards say alike, and what they have from the run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from torch import nn
from transformers import PreTrainedModel

from bayeslora.errors import BayesLoraError, counted
from bayeslora.model_card import CARD_FILE, front_matter, public_name

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
"""Formats that `bayeslora.export` writes no card for."""

_LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")
_FROM_THE_RUN = ("license", "datasets", "pipeline_tag", "language")


def write_card(folder: Path, form: str, base_model: nn.Module, config: Any, measured: Mapping[str, Any]) -> None:
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


def _program(form: str, base: str, base_model: nn.Module) -> str:
    if form == "integer":
        return 'import bayeslora\n\nmodel = bayeslora.load_integer(".")'
    family = type(base_model).__name__
    first = "import bayeslora  # PEFT then knows the method\n" if form == "packed" else ""
    if not isinstance(base_model, PreTrainedModel):
        return f"""{first}from peft import PeftModel

model = PeftModel.from_pretrained(base, ".").eval()  # base: the {family} that was adapted"""
    labels = getattr(getattr(base_model, "config", None), "num_labels", None)
    is_classifier = family.endswith(("ForSequenceClassification", "ForTokenClassification"))
    size = f", num_labels={labels}" if is_classifier and labels is not None else ""
    return f"""{first}from peft import PeftModel
from transformers import {family}

base = {family}.from_pretrained("{base}"{size})
model = PeftModel.from_pretrained(base, ".").eval()"""


def base_name(config: Any, base_model: nn.Module) -> str:
    """Return the public name of the model that an adapter with this config was trained on."""
    path = config.base_model_name_or_path or getattr(base_model, "name_or_path", "")
    return public_name(str(path)) if path else type(base_model).__name__


def error_of(measured: Mapping[str, Any], how: str = "", answers: str = "answers") -> str:
    """Return the sentences on the measured difference from the trained model.

    Args:
        measured: what an export returns.
        how: it was measured, such as `, with the weights in float32,`.
        answers: what a model predicts at each position.
    """
    if measured.get("divergence") is not None:
        rows = counted(measured["rows"], "row") if "rows" in measured else "training rows"
        return (
            f"Measured on {rows}{how} beside the trained model: {measured['changed']:.2%} of the {answers} change. "
            f"The mean Kullback-Leibler divergence is {measured['divergence']:.2g} nats."
        )
    if measured.get("max_output_error") is None:
        return "The difference from the trained model was not measured."
    return (
        f"The largest difference in outputs from the trained model is {measured['max_output_error']:.3g}, where the "
        f"largest output is {measured['max_output']:.3g}."
    )


def check_license(name: str) -> None:
    """Raise `BayesLoraError` unless `name` could be the hub's name of a license."""
    if not _LICENSE.fullmatch(name):
        raise BayesLoraError(f"license is {name!r}, but must be the hub's name of one: give one such as apache-2.0")


def complete_card(folder: Path, source: Path, license: str | None = None) -> None:  # noqa: A002 - the hub's name
    """Add to the card of an export what the card of its run says of data, task, language and license.

    Args:
        folder: of the export.
        source: of the run; one without a card adds nothing.
        license: the hub's name of one, such as `apache-2.0`, in place of the run's.
    """
    card = ModelCard.load(folder / CARD_FILE, ignore_metadata_errors=True)
    if (source / CARD_FILE).is_file():
        known = ModelCard.load(source / CARD_FILE, ignore_metadata_errors=True).data
        for name in _FROM_THE_RUN:
            if getattr(card.data, name, None) is None and getattr(known, name, None) is not None:
                setattr(card.data, name, getattr(known, name))
    if license is not None:
        card.data.license = license
    card.save(folder / CARD_FILE)

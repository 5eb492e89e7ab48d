"""The card of an ONNX folder: what it is, how to run it without this library, its error and its source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bayeslora.model_card import CARD_FILE, base_name, error_of, front_matter

_FIELDS = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
_UNLIMITED = 1 << 20


Page = tuple[str, str, str, str]
"""What `write_page` takes of a kind of graph: `pipeline_tag`, `files`, `program` and `answers`."""


def encoder_page(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    inputs: Sequence[str],
    measured: Mapping[str, Any],
) -> Page:
    """Return the page of an encoder, whose graph has these inputs.

    `max_length` is the number of tokens of a text, by default as many as model and tokenizer take.
    """
    length = max_length or min(tokenizer.model_max_length, int(model.config.max_position_embeddings), _UNLIMITED)
    files = f"""| `model.onnx` | the graph: {", ".join(inputs)}, int64 (batch, length), to logits, float32 \
(batch, {model.config.num_labels}) |
| `config.json` | the model's configuration, with the names of the labels |
| `tokenizer.json` | the tokenizer |"""
    return "text-classification", files, _code(tokenizer, length, inputs, measured), "answers"


def write_page(
    folder: Path,
    model: PreTrainedModel,
    config: Any,
    measured: Mapping[str, Any],
    pipeline_tag: str,
    files: str,
    program: str,
    answers: str,
) -> None:
    """Write `README.md` from the parts in which graphs differ.

    Args:
        folder: of the graph.
        model: that was written.
        config: of the adapter.
        measured: sizes and errors, as the export returns them.
        pipeline_tag: the hub's name for what the model does.
        files: rows of the table of files, and what there is to say about them.
        program: that runs the graph.
        answers: what the model predicts at each position.
    """
    base = base_name(config, model)
    method, is_learned = getattr(config, "method", "lora"), measured["widened"] is not None
    front = front_matter(
        f"{base} as ONNX",
        base,
        library="onnx",
        relation="quantized" if is_learned else "merge",
        pipeline_tag=pipeline_tag,
        tags=["bayeslora", method, "onnx", "onnxruntime"],
    )
    text = f"""---
{front}
---

# `{base}` as ONNX

{_described(method, base, measured, is_learned)}

| file | |
|---|---|
{files}

## How to run it

With `pip install onnxruntime tokenizers`, in this folder:

```python
{program}
```

## Error

{error_of(measured, " in onnxruntime", answers)}
"""
    (folder / CARD_FILE).write_text(text, encoding="utf-8")


def _described(method: str, base: str, measured: Mapping[str, Any], is_learned: bool) -> str:
    """Return a paragraph that says what the graph is, and in which bits it computes."""
    said = f"`{base}` with an adapter that was trained with the method `{method}` of bayeslora"
    size = f"The graph takes {measured['file_bytes']:,} bytes; the model in float32 {measured['float32_bytes']:,}."
    if not is_learned:
        return f"{said}, merged into its weights in float32; a posterior is merged at its mean. {size}"
    return f"""{said}. The graph has the learned quantizers: weights are integer codes, and
each activation has the static range that was learned. {size}

Bits that were learned, and with which the graph computes instead: {measured["widened"]}. Layers without an adapter
did not learn any; they have {_UNADAPTED[measured["unadapted"]]}."""


_UNADAPTED = {
    "float32": "float32 weights",
    "int8 weights": "8-bit weights with a range for each row",
    "int8 weights and inputs": "8-bit weights with a range for each row, and 8-bit inputs in static ranges",
}


def _code(tokenizer: PreTrainedTokenizerBase, length: int, inputs: Sequence[str], measured: Mapping[str, Any]) -> str:
    """Return a program that needs onnxruntime, tokenizers and NumPy."""
    padding = [f'pad_id={tokenizer.pad_token_id}, pad_token="{tokenizer.pad_token}"']
    padding += ['direction="left"'] if tokenizer.padding_side == "left" else []
    cut = ', direction="left"' if tokenizer.truncation_side == "left" else ""
    feeds = "\n".join(f'        "{name}": [row.{_FIELDS[name]} for row in rows],' for name in inputs)
    answer = "labels[str(row.argmax())]" if measured.get("changed") is not None else "row"
    return f"""import json

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("tokenizer.json")
tokenizer.enable_truncation({length}{cut})
tokenizer.enable_padding({", ".join(padding)})
session = onnxruntime.InferenceSession("model.onnx")
labels = json.load(open("config.json", encoding="utf-8"))["id2label"]


def logits(texts):
    rows = tokenizer.encode_batch(texts)
    feeds = {{
{feeds}
    }}
    return session.run(["logits"], {{name: np.array(values) for name, values in feeds.items()}})[0]


texts = ["The film is a joy.", "The film is a bore."]  # or pairs: [("A text.", "Another."), …]
for text, row in zip(texts, logits(texts)):
    print(text, {answer})"""


def named_tokens(named: int | list[int] | None) -> list[int]:
    """Return the tokens that a setting names, in order; `generate` forces the first of them."""
    return sorted(named if isinstance(named, list) else [] if named is None else [named])

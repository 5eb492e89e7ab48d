"""The card of a GGUF folder: what it is, how llama.cpp runs it, its error and its source."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bayeslora.export.gguf.reader import ADAPTER_FILE, MODEL_FILE
from bayeslora.model_card import CARD_FILE, error_of, front_matter

_FILES = {
    MODEL_FILE: "the model, with its tokenizer",
    ADAPTER_FILE: "the adapter: a LoRA",
    "config.json": "the configuration for Transformers; llama.cpp does not read it",
}
_RELATIONS = {"beside": "quantized", "merged": "merge", "only": "adapter"}


def write_card(folder: Path, base: str, method: str, form: str, measured: Mapping[str, Any]) -> None:
    """Write `README.md` of a base's public name, the adapter's method and form, and what the export returns."""
    front = front_matter(
        f"{base} as GGUF",
        base,
        library="gguf",
        relation=_RELATIONS[form],
        pipeline_tag="text-generation",
        tags=["bayeslora", method, "gguf", "llama.cpp"],
    )
    files = "\n".join(f"| `{name}` | {said} |" for name, said in _FILES.items() if (folder / name).is_file())
    text = f"""---
{front}
---

# `{base}` as GGUF

{_described(base, method, form, measured)}

| file | |
|---|---|
{files}

## How to run it

With llama.cpp, in this folder:

    {_command(form)}

## Error

{_error(measured)}
"""
    (folder / CARD_FILE).write_text(text, encoding="utf-8")


def _described(base: str, method: str, form: str, measured: Mapping[str, Any]) -> str:
    if form == "only":
        return (
            f"The adapter alone, trained on `{base}` with the method `{method}` of bayeslora. It needs a GGUF file of "
            "the base."
        )
    how = ", merged into its weights" if form == "merged" else ", in a file of its own"
    text = (
        f"`{base}` with an adapter that was trained with the method `{method}` of bayeslora{how}; a posterior is used "
        f"at its mean. The files take {measured['file_bytes']:,} bytes; the model in float32 "
        f"{measured['float32_bytes']:,}. Types of the matrices: {measured['types']}."
    )
    if measured["widened"]:
        text += f" Learned widths of weights in more bits: {measured['widened']}."
    if measured["left_out"]:
        text += f" Learned quantizers that are left out: {measured['left_out']}."
    return text


def _command(form: str) -> str:
    model = "BASE.gguf" if form == "only" else MODEL_FILE
    adapter = "" if form == "merged" else f" --lora {ADAPTER_FILE}"
    return f'llama-cli -m {model}{adapter} --temp 0 -p "The film is"'


def _error(measured: Mapping[str, Any]) -> str:
    said = error_of(measured, " with the weights in the files in float32", "next tokens")
    more = " llama.cpp also rounds the inputs of its products, to 8 bits in blocks; that is not in these figures."
    return said if measured["divergence"] is None else said + more

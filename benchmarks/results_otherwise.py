"""The tables of `otherwise.py`: a classifier and a language model in the forms of this library and of others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from records import markdown_table

FILE, DECODER_FILE = "otherwise.json", "otherwise-decoder.json"
HEAD = [
    "",
    "MB on disk",
    "accuracy",
    "changed answers: of the LoRA's",
    "of its own model's",
    "rows per second: one",
    "32",
    "seconds to first answer",
    "peak MB",
]
DECODER_HEAD = [
    "",
    "MB on disk",
    "NLL",
    "changed next tokens: of the LoRA's",
    "of its own model's",
    "tokens per second",
    "seconds to first token",
    "peak MB",
]


def otherwise_table(results: Path) -> str:
    """What each form of a classifier costs and answers; nothing if it has not been run."""
    path = results / FILE
    if not path.is_file():
        return ""
    found = json.loads(path.read_text(encoding="utf-8"))
    return f"{markdown_table(HEAD, [_row(each) for each in found['variants'].values()])}\n{_caption(found)}"


def decoder_table(results: Path) -> str:
    """The same of a language model."""
    path = results / DECODER_FILE
    if not path.is_file():
        return ""
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = [_decoder_row(each) for each in found["variants"].values()]
    return f"{markdown_table(DECODER_HEAD, rows)}\n{_decoder_caption(found)}"


def _row(found: Mapping[str, Any]) -> list[str]:
    rates = [f"{found[f'rows_per_second_{load}']:.0f} (× {found[f'over_lora_{load}']:.2f})" for load in ("1", "32")]
    return [
        found["title"],
        f"{found['bytes'] / 1e6:.1f}",
        f"{found['accuracy']:.1f}",
        f"{found['changed']:.1f}%",
        f"{found['changed_by_export']:.1f}%",
        *rates,
        f"{found['first_answer_seconds']:.1f}",
        f"{found['peak_bytes'] / 1e6:.0f}",
    ]


def _decoder_row(found: Mapping[str, Any]) -> list[str]:
    return [
        found["title"],
        f"{found['bytes'] / 1e6:.1f}",
        f"{found['nll']:.3f}",
        f"{found['changed']:.1f}%",
        f"{found['changed_by_export']:.1f}%",
        f"{found['tokens_per_second']:.1f} (× {found['over_merged']:.2f})",
        f"{found['first_token_seconds']:.1f}",
        f"{found['peak_bytes'] / 1e6:.0f}",
    ]


def _caption(found: Mapping[str, Any]) -> str:
    return _lines(
        found,
        f"One run of `python benchmarks/otherwise.py`: MiniLM-L6, {found['trained']['lora']['steps']} steps of the "
        f"demo, {found['rows']} test reviews, {found['rounds']} rounds {_machine(found)} × is the ratio to the first "
        "line in the same round. B-LoRA's own model is the packed one, and that of all others is the LoRA. Peaks are "
        "of a process that has read one text and 32.",
    )


def _decoder_caption(found: Mapping[str, Any]) -> str:
    trained = found["trained"]
    return _lines(
        found,
        f"One run of `python benchmarks/otherwise.py --decoder`: SmolLM2-135M, adapters after {found['steps']} steps, "
        f"so the scores say what a form loses and nothing of the methods: the LoRA has an NLL of "
        f"{trained['lora']['nll']:.3f} nats, and B-LoRA {_by_bits(trained)}, on {found['rows']} test reviews. One "
        f"sequence, {found['rounds']} rounds {_machine(found)} × is the ratio to the first line in the same round. "
        "NLL and changes of llama.cpp are those of the weights in its files.",
    )


def _by_bits(trained: Mapping[str, Any]) -> str:
    """NLLs of the trained B-LoRAs."""
    bits = {"blora": 8, "blora4": 4}
    return " and ".join(f"{trained[name]['nll']:.3f} at {bits[name]} bits" for name in bits if name in trained)


def _machine(found: Mapping[str, Any]) -> str:
    """Where it was measured, and by which clock."""
    machine = found["machine"]
    return (
        f"on {machine['processor']} with {', '.join(machine['instructions'])}, one thread. Seconds are those of the "
        "processor, because the machine was busy with other work;"
    )


def _lines(found: Mapping[str, Any], caption: str) -> str:
    """The caption, and what was left out."""
    return "\n".join([caption, *(f"Left out: {name} ({why})." for name, why in found["left_out"].items())]) + "\n"

"""The figures of `otherwise.py` from answers that are known, and what a variant's process says."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from otherwise import BASELINE, VARIANTS, rates, scores
from peft import LoraConfig, get_peft_model
from results_otherwise import decoder_table, otherwise_table

from bayeslora import export
from tests.benchmarks.conftest import BENCHMARKS
from tests.conftest import build_tiny_bert, build_tiny_tokenizer

SHARED = {
    "rounds": 5,
    "left_out": {"openvino": "openvino is missing"},
    "machine": {"processor": "A processor", "instructions": ["avx2"]},
}


class Reader:
    """Takes `seconds` for a text, more in every second call, and answers with the classes of `answers`."""

    def __init__(self, seconds: float, answers: Sequence[int] = ()) -> None:
        self.seconds, self.answers, self.calls = seconds, list(answers), 0

    def ask(self, batches: Sequence[Sequence[str]]) -> dict[str, Any]:
        self.calls += 1
        rows = sum(map(len, batches))
        return {
            "seconds": rows * self.seconds * (1 + (self.calls - 1) // 2 % 2),
            "logits": [[float(answer == label) for label in (0, 1)] for answer in self.answers[:rows]],
        }


def test_rates_are_medians_over_rounds_without_the_first() -> None:
    loads = {"1": [["a"], ["b"]], "32": [["a"] * 32]}
    readers = {BASELINE: Reader(0.1), "integer": Reader(0.025)}
    found = rates(readers, loads, rounds=3)
    assert readers["integer"].calls == 2 * 4  # the first round counts for nothing
    assert found["integer"]["rows_per_second_1"] == pytest.approx(20)  # 20, 40 and 20
    assert found["integer"]["over_lora_32"] == pytest.approx(4) and found[BASELINE]["over_lora_1"] == 1


def test_changes_are_counted_from_the_lora_and_from_the_own_model() -> None:
    labels = [0] * 20 + [1] * 20
    own = [0] * 18 + [1] * 22  # the B-LoRA differs from the LoRA, which is right everywhere, in two rows
    exported = [1] + own[1:]
    readers = {BASELINE: Reader(1, labels), "packed": Reader(1, own), "blora-onnx": Reader(1, exported)}
    for reader in readers.values():
        reader.ask = _by_rows(reader)  # type: ignore[method-assign]
    found = scores(readers, [str(row) for row in range(40)], labels)
    assert found[BASELINE] == {"accuracy": 100, "changed": 0, "changed_by_export": 0}
    assert found["packed"] == {"accuracy": 95, "changed": 5, "changed_by_export": 0}
    assert found["blora-onnx"] == {"accuracy": 92.5, "changed": 7.5, "changed_by_export": 2.5}


def _by_rows(reader: Reader) -> Any:
    """Answers rows by their texts, which are numbers."""

    def ask(batches: Sequence[Sequence[str]]) -> dict[str, Any]:
        assert [len(batch) for batch in batches] == [32, 8]
        chosen = [reader.answers[int(text)] for batch in batches for text in batch]
        return {"logits": [[float(answer == label) for label in (0, 1)] for answer in chosen]}

    return ask


@pytest.mark.parametrize("runtime", ["onnxruntime", pytest.param("merged", marks=pytest.mark.slow)])
def test_a_process_answers_as_the_model_does(runtime: str, tmp_path: Path) -> None:
    """Texts of unequal length in a batch, in a process that reads the folder; what it prints is only answers."""
    model, tokenizer = build_tiny_bert().eval(), build_tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    if runtime == "merged":
        model.save_pretrained(tmp_path / "model")
    else:
        pytest.importorskip("onnxruntime")
        adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["query"]))
        export(adapted, tmp_path / "model", format="onnx", tokenizer=tokenizer)  # B is 0
    texts = ["good film", "the film was bad and the plot cold", "good"]
    script = Path(BENCHMARKS) / "otherwise_worker.py"
    command = [sys.executable, script, runtime, tmp_path / "model", tmp_path / "tokenizer.json", 16, texts[0]]
    asked = json.dumps({"batches": [texts[:2], texts[2:]]}) + "\n"
    done = subprocess.run(list(map(str, command)), input=asked, capture_output=True, text=True, check=True)
    first, second = map(json.loads, done.stdout.splitlines())
    expected = []
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            expected.append(model(input_ids=ids).logits[0].numpy())
    assert np.allclose(first["logits"], expected[:1], atol=1e-5)
    assert np.allclose(second["logits"], expected, atol=1e-5)
    assert 0 < first["seconds"] < first["since_start"] < second["since_start"] and second["peak"] > 20e6


def test_the_table_has_a_line_for_each_variant(tmp_path: Path) -> None:
    assert otherwise_table(tmp_path) == ""
    figures = {
        "bytes": 91e6,
        "accuracy": 78.91,
        "changed": 0.0,
        "changed_by_export": 1.56,
        "first_answer_seconds": 4.2,
    }
    figures |= {"rows_per_second_1": 41.2, "over_lora_1": 1.0, "rows_per_second_32": 90.0, "over_lora_32": 2.345}
    variant = {"title": VARIANTS[BASELINE].title, **figures, "peak_bytes": 512.4e6}
    found = {
        "rows": 64,
        "trained": {"lora": {"steps": 100}},
        **SHARED,
        "variants": {BASELINE: variant},
    }
    (tmp_path / "otherwise.json").write_text(json.dumps(found))
    table = otherwise_table(tmp_path)
    line = "| LoRA, unmerged, float32 | 91.0 | 78.9 | 0.0% | 1.6% | 41 (× 1.00) | 90 (× 2.35) | 4.2 | 512 |"
    assert line.replace("2.35", f"{2.345:.2f}") in table
    assert "100 steps of the demo, 64 test reviews, 5 rounds on A processor with avx2" in table
    assert "openvino is missing" in table


def test_the_decoders_table_has_a_line_for_each_variant(tmp_path: Path) -> None:
    assert decoder_table(tmp_path) == ""
    figures = {"bytes": 146e6, "nll": 3.21, "changed": 1.0, "changed_by_export": 0.5, "tokens_per_second": 45.04}
    variant = {**figures, "title": "GGUF", "over_merged": 2, "first_token_seconds": 1.5, "peak_bytes": 300e6}
    trained = {"lora": {"nll": 3.2}, "blora": {"nll": 3.3}}
    found = {**SHARED, "rows": 8, "steps": 12, "trained": trained, "variants": {"q8": variant}}
    (tmp_path / "otherwise-decoder.json").write_text(json.dumps(found))
    table = decoder_table(tmp_path)
    assert "| GGUF | 146.0 | 3.210 | 1.0% | 0.5% | 45.0 (× 2.00) | 1.5 | 300 |" in table
    assert "an NLL of 3.200 nats, and B-LoRA 3.300 at 8 bits, on 8 test reviews" in table


@pytest.mark.parametrize("name", list(VARIANTS))
def test_every_variant_has_a_form_and_a_runtime(name: str) -> None:
    from otherwise_models import WRITERS
    from otherwise_worker import RUNTIMES

    assert VARIANTS[name].form in WRITERS and VARIANTS[name].runtime in RUNTIMES

"""lm-evaluation-harness on local data: live adapters through the wrapper, exported ones with its own command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import bayeslora
from tests.conftest import WORDS
from tests.methods.reference import layers_of

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "lm_eval"
ROWS = 20


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory, tiny_causal_folder: Path) -> Path:
    """Rows, a B-LoRA adapter that changes the answers, and its export."""
    folder = tmp_path_factory.mktemp("lm-eval")
    generator = torch.Generator().manual_seed(0)
    words = [WORDS[i] for i in torch.randint(len(WORDS), (ROWS * 12,), generator=generator)]
    rows = []
    for start in range(0, len(words), 12):
        part = words[start : start + 12]
        choices = [" ".join(part[i : i + 2]) for i in (4, 6, 8, 10)]
        rows.append({"question": " ".join(part[:4]), "choices": choices, "answer": start // 12 % 4})
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    config = bayeslora.BLoraConfig(
        r=4, lora_alpha=32, target_modules=["q_proj", "up_proj"], init_weights=False, mode="ra", task_type="CAUSAL_LM"
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_causal_folder), config).eval()
    with torch.no_grad():
        for layer in layers_of(model):
            layer.blora_E["default"].uniform_(1, 3)
    model.save_pretrained(folder / "live")
    bayeslora.export(model, folder / "lora", uniform=True)
    return folder


def scores(command: list[str], setting: Path, base: Path, adapter: Path, out: Path) -> dict[str, Any]:
    """The results that lm-eval writes, with the answers to each row under `answers`."""
    model = f"pretrained={base},dtype=float32,peft={adapter}"
    options = ["run", "--model", "hf", "--model_args", model, "--tasks", "local_choices", "--device", "cpu"]
    options += ["--include_path", str(EXAMPLES), "--metadata", json.dumps({"file": str(setting / "rows.jsonl")})]
    options += ["--batch_size", "8", "--output_path", str(out), "--log_samples"]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(setting / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = out.rglob("results_*.json")
    (samples,) = out.rglob("samples_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    answers = [[float(answer[0]) for answer in line["filtered_resps"]] for line in sorted(lines, key=by_number)]
    return {**json.loads(found.read_text())["results"]["local_choices"], "answers": torch.tensor(answers)}


def by_number(line: dict[str, Any]) -> int:
    return int(line["doc_id"])


@pytest.mark.slow
def test_live_and_exported_adapters_answer_alike(setting: Path, tiny_causal_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    own = [sys.executable, "-m", "lm_eval"]
    wrapped = [sys.executable, str(EXAMPLES / "run.py")]
    live = scores(wrapped, setting, tiny_causal_folder, setting / "live", tmp_path / "live")
    exported = scores(own, setting, tiny_causal_folder, setting / "lora", tmp_path / "lora")
    assert live["acc,none"] == exported["acc,none"]
    torch.testing.assert_close(live["answers"], exported["answers"], atol=1e-4, rtol=0)
    torch.testing.assert_close(live["answers"], by_hand(setting, tiny_causal_folder), atol=1e-4, rtol=0)
    base = by_hand(setting, tiny_causal_folder, disabled=True)
    assert live["answers"].shape == (ROWS, 4) and (live["answers"] - base).abs().max() > 0.1


@torch.no_grad()
def by_hand(setting: Path, base: Path, disabled: bool = False) -> torch.Tensor:
    """(rows, choices) log-probabilities of the choices, computed with (or without) the adapter and no harness."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), setting / "live").eval()
    if disabled:
        model = model.unload()
    found = []
    for line in (setting / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]
        for choice in row["choices"]:
            whole = tokenizer(f"Question: {row['question']}\nAnswer: {choice}")["input_ids"]
            log_p = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
            found.append(sum(log_p[at - 1, whole[at]] for at in range(len(prompt), len(whole))))
    return torch.tensor(found).view(ROWS, -1)

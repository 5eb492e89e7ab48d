"""The language model of `otherwise.py`: rounded files, figures from known answers, and the runtimes' answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from bayeslora import export
from tests.benchmarks.conftest import BENCHMARKS
from tests.conftest import build_tiny_llama, build_tiny_tokenizer

gguf = pytest.importorskip("gguf")

from otherwise_decoder import BASELINE, Q4, Q8, VARIANTS, WRITERS, rates, round_file, round_weights, scores  # noqa: E402
from otherwise_writer import read  # noqa: E402


class Writer:
    """Takes a second for the prompt and `seconds` for each token."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def ask(self, prompt: list[int], tokens: int) -> dict[str, Any]:
        return {"cpu_seconds": 1 + tokens * self.seconds}


def test_rates_leave_out_the_prompt() -> None:
    found = rates({BASELINE: Writer(0.1), "q8": Writer(0.02)}, [1, 2], rounds=3, tokens=11)
    assert found["q8"]["tokens_per_second"] == pytest.approx(50)
    assert found["q8"]["over_merged"] == pytest.approx(5) and found[BASELINE]["over_merged"] == 1


def test_texts_are_scored_token_by_token() -> None:
    probabilities = np.array([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6], [0.1, 0.8, 0.1]])
    found = read(np.log(probabilities) + 7, [0, 1, 2])
    assert found["best"] == [0, 2, 1] and found["loss"] == pytest.approx(-np.log(0.3 * 0.6))
    other = {"best": [0, 2, 0], "loss": 0.0}
    assert scores([found, found], [other, found], [found, found]) == pytest.approx([found["loss"] / 2, 100 / 6, 0])


@pytest.mark.parametrize("kind", [Q8, Q4])
def test_matrices_are_rounded_and_all_else_is_kept(kind: Any, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    weights = {name: generator.normal(size=(6, 64)).astype(np.float16) for name in ("token_embd.weight", "blk.0.ffn")}
    writer = gguf.GGUFWriter(tmp_path / "in.gguf", "llama")
    writer.add_block_count(1)
    writer.add_token_list(["a", "b"])
    for name, values in weights.items():
        writer.add_tensor(name, values)
    writer.add_tensor("norm", np.arange(5, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    round_file(tmp_path / "in.gguf", tmp_path / "out.gguf", kind)
    before, after = (gguf.GGUFReader(tmp_path / name) for name in ("in.gguf", "out.gguf"))
    own = [name for name in before.fields if not name.startswith("GGUF.")]
    assert own and all(after.fields[name].contents() == before.fields[name].contents() for name in own)
    tensors = {each.name: each for each in after.tensors}
    assert tensors["token_embd.weight"].tensor_type == Q8 and tensors["blk.0.ffn"].tensor_type == kind
    assert np.array_equal(tensors["norm"].data, np.arange(5))
    for name, values in weights.items():
        found = gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type)
        # Half a step, or a whole one at the end that Q4_0 lacks; steps are rounded to half precision.
        share = 0.5 / 127 if tensors[name].tensor_type == Q8 else 1 / 8
        largest = np.abs(values.astype(np.float32)).reshape(6, 2, 32).max(2)
        errors = np.abs(found - values.astype(np.float32)).reshape(6, 2, 32).max(2)
        assert (errors < share * largest + 0.001 * largest).all() and errors.min() > 0


@pytest.mark.parametrize("runtime", ["onnxruntime", pytest.param("torch", marks=pytest.mark.slow)])
def test_a_process_writes_what_the_model_writes(runtime: str, tmp_path: Path) -> None:
    model = get_peft_model(build_tiny_llama(), LoraConfig(r=2, init_lora_weights=False)).eval()
    ids = [7, 9, 11, 5]
    with torch.no_grad():
        expected = read(model(input_ids=torch.tensor([ids])).logits[0].numpy(), ids)
        whole = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=5, min_new_tokens=5, do_sample=False)
    if runtime == "torch":
        model.merge_and_unload().save_pretrained(tmp_path)
    else:
        pytest.importorskip("onnxruntime")
        export(model, tmp_path, format="onnx", tokenizer=build_tiny_tokenizer())
    asked = [{"text": ids}, {"prompt": ids, "tokens": 5}]
    command = [sys.executable, str(Path(BENCHMARKS) / "otherwise_writer.py"), runtime, str(tmp_path)]
    lines = "".join(json.dumps(each) + "\n" for each in asked)
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=True)
    ready, text, written = map(json.loads, done.stdout.splitlines())
    assert ready == {} and text["best"] == expected["best"]
    assert text["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert written["tokens"] == whole[0, len(ids) :].tolist() and written["since_start"] > text["cpu_seconds"] > 0


def test_weights_are_rounded_in_the_model_as_in_a_file() -> None:
    """And a second rounding changes nothing, so a file of them holds what a LoRA was trained beside."""
    model = build_tiny_llama(hidden_size=64, intermediate_size=96, vocab_size=64)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    round_weights(model, Q4)
    once = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    changed = [name for name, values in once.items() if not torch.equal(values, before[name])]
    assert changed == [name for name, values in before.items() if values.ndim == 2]
    round_weights(model, Q4)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, once[name], rtol=2e-3, atol=1e-6, msg=name)


def test_every_variant_has_a_form() -> None:
    assert {each.form for each in VARIANTS.values()} <= set(WRITERS)

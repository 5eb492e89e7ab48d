"""The benchmark of quantization-aware training: what rounds, from when on, and what a file holds."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerState

from tests.benchmarks.test_rounding import rows
from tests.conftest import build_tiny_bert

pytest.importorskip("torchao")
import qat  # noqa: E402


@pytest.mark.parametrize("begin", [0.0, 0.5])
def test_a_file_has_the_cost_of_the_same_rounding(tmp_path: Path, tiny_bert_folder: Path, begin: float) -> None:
    (tmp_path / "mrpc").mkdir()
    (tmp_path / "mrpc" / "train.jsonl").write_text(rows(40), encoding="utf-8")
    (tmp_path / "mrpc" / "dev.jsonl").write_text(rows(16), encoding="utf-8")
    (tmp_path / "mrpc" / "test.jsonl").write_text(rows(16), encoding="utf-8")
    given = Namespace(
        data_dir=tmp_path, tasks=["mrpc"], seeds=[1], settings=list(qat.SETTINGS), begin=[begin], select=False,
        model=str(tiny_bert_folder), steps=2, results=tmp_path,
    )  # fmt: skip
    jobs = qat.jobs(given)
    assert len(jobs) == 4 and all(path.parent == tmp_path / "qat" for path in jobs)
    found = [qat.run(job) for job in list(jobs.values())[1:3]]
    assert json.loads(json.dumps(found)) and {"accuracy", "nll"} <= found[0]["scores"].keys()
    shares = [each["relative_bops"]["attention"] for each in found]
    assert shares[1] < shares[0] < 0.2
    assert found[0]["begin"] == begin and found[0]["setting"] == "W4A4/8"


def test_rounding_begins_at_its_step_and_trains_what_a_merge_computes() -> None:
    config = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False)
    model = get_peft_model(build_tiny_bert(), config)
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = model(input_ids=ids).logits
    callback = qat.BeginRounding(model, (2, 8, 8), 0.5)
    torch.testing.assert_close(model(input_ids=ids).logits, plain)
    for step, rounds in ((4, False), (5, True)):
        callback.on_step_begin(None, TrainerState(global_step=step, max_steps=10), None)
        assert all(each.is_rounding == rounds for each in callback.passes)
    rounded = model(input_ids=ids).logits
    assert not torch.allclose(rounded, plain, atol=1e-6)
    rounded.sum().backward()
    (layer,) = callback.passes[0].layer
    assert layer.lora_A["default"].weight.grad.abs().sum() > 0
    merged = layer.get_base_layer().weight + layer.get_delta_weight("default")
    assert all(len(row.unique()) <= 4 for row in callback.passes[0].weight(merged).detach())

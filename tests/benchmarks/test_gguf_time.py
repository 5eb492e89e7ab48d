"""The figures of `gguf_time.py` from answers that are known."""

from __future__ import annotations

import math

import pytest
import torch
from gguf_time import agreement, rates


class Model:
    """Takes a second of processor time for the prompt and `seconds` for each token."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def ask(self, prompt: list[int], tokens: int) -> dict[str, float]:
        return {"cpu_seconds": 1 + tokens * self.seconds}


def test_agreement_of_two_prompts() -> None:
    log_probs = torch.tensor([0.5, 0.3, 0.2]).log()
    own = [{"log_probs": log_probs, "tokens": torch.tensor([0, 1, 2, 2])} for _ in range(2)]
    same = {"top": [[0, math.log(0.5)], [1, math.log(0.3) + 0.1]], "tokens": [0, 1, 2, 2]}
    other = {"top": [[1, math.log(0.3)], [0, math.log(0.5) - 0.3]], "tokens": [0, 2, 2, 2]}
    found = agreement(own, [same, other])
    assert found["mean_difference_of_top_20"] == pytest.approx((0.1 + 0.3) / 4, abs=1e-6)
    assert found["max_difference_of_top_20"] == pytest.approx(0.3, abs=1e-6)
    assert found["same_next_token"] == 0.5 and found["same_text_until"] == (1 + 0.25) / 2


def test_rates_leave_out_the_prompt() -> None:
    found = rates({"beside": Model(0.02), "merged": Model(0.01)}, [1, 2], rounds=3, tokens=11)
    assert found["beside"]["tokens_per_cpu_second"] == pytest.approx(50)
    assert found["merged"]["tokens_per_cpu_second"] == pytest.approx(100)
    assert found["beside"]["ratio_to_merged"] == pytest.approx(0.5)

"""Multiple-choice items in the words of the tiny tokenizer, with two to five choices."""

from __future__ import annotations

import random
from typing import Any

from datasets import Dataset

WORDS = "cat dog sat ran mat tree house red blue green".split()


def items(count: int, seed: int = 0, most: int = 5) -> list[dict[str, Any]]:
    """Rows with `question`, `choices` (2 to `most`) and `label`: the right choice is the question's first word."""
    generator = random.Random(seed)
    rows = []
    for _ in range(count):
        choices = generator.sample(WORDS, generator.randint(2, most))
        label = generator.randrange(len(choices))
        rest = " ".join(generator.choices("good bad fine dull warm cold".split(), k=generator.randint(1, 6)))
        rows.append({"question": f"{choices[label]} {rest}", "choices": choices, "label": label})
    return rows


def split(count: int, seed: int = 0, most: int = 5) -> Dataset:
    return Dataset.from_list(items(count, seed, most))

"""Detection on the results page: lines are means of the files, and the best score is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from results_ood import ood_section

from .files import TRAINING, write


def run(method: str, seed: int, task: str = "mrpc", **aurocs: float) -> dict[str, Any]:
    """Scores by features and of the method itself, on two kinds of text that differ by 0.1."""

    def kinds(names: list[str]) -> dict[str, Any]:
        return {
            kind: {name: {"auroc": aurocs[name] - lower, "aupr": 0.5, "fpr95": 0.5} for name in names}
            for kind, lower in (("plots", 0.0), ("news", 0.1))
        }

    by_features = [name for name in ("energy", "mahalanobis") if name in aurocs]
    forms = {"features": {"detection": kinds(by_features)}, method: {"detection": kinds(["entropy"])}}
    rows = {"in": 500, "plots": 500, "news": 400}
    named = {"task": task, "method": method, "seed": seed, "options": {}, "training": TRAINING}
    return {**named, "rows": rows, "forms": forms}


def test_lines_are_means_over_seeds_and_the_best_score_is_named(tmp_path: Path) -> None:
    runs = [run("lora", seed, entropy=0.6 + seed / 10, energy=0.5, mahalanobis=0.9) for seed in range(2)]
    write(tmp_path, *runs, run("melora", 0, entropy=0.7, energy=0.4, mahalanobis=0.8))
    text = ood_section(tmp_path)
    assert "### MRPC" in text and "Rotten" not in text
    assert "| score | seeds | plots | news | mean |" in text
    assert "| LoRA: entropy | 2 | 0.650 ± 0.071 | 0.550 ± 0.071 | 0.600 ± 0.071 |" in text
    assert "| LoRA, features: Mahalanobis | 2 | 0.900 ± 0.000 | 0.800 ± 0.000 | 0.850 ± 0.000 |" in text
    assert "| Me-LoRA, features: energy | 1 | 0.400 | 0.300 | 0.350 |" in text
    assert "500 ordinary rows. Best on average: LoRA, features: Mahalanobis (0.850)." in text


def test_without_files_nothing_is_claimed(tmp_path: Path) -> None:
    assert ood_section(tmp_path) == "Not run.\n"

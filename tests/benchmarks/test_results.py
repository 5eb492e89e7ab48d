"""The results page: its numbers are those of the files, what is missing is listed, the committed one is current."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from records import IVON_SETTINGS, RESULTS
from results import DOCS, FIGURES, WITH_TABLES, page, write
from results_choice import _probabilities, choice_page, choice_tables, with_tables
from results_frontier import bytes_table, layer_bytes
from results_glue import glue_section, missing, score_table
from results_sections import importance_section, mmlu_section, nested_tables

from bayeslora.errors import BayesLoraError

from .files import TRAINING, layer, run
from .files import write as write_runs


def test_the_committed_page_is_what_the_generator_writes() -> None:
    figures = [name for name in FIGURES if (DOCS / "figures" / f"{name}.png").exists()]
    committed = (DOCS / "results.md").read_text(encoding="utf-8")
    assert page(RESULTS, figures) == committed, "run `python benchmarks/results.py` and commit what it writes"
    advice = (DOCS / "choose.md").read_text(encoding="utf-8")
    assert choice_page(RESULTS) == advice, "run `python benchmarks/results.py` and commit what it writes"
    tables = choice_tables(RESULTS)
    for name in WITH_TABLES:
        text = (DOCS / name).read_text(encoding="utf-8")
        assert with_tables(text, tables) == text, f"run `python benchmarks/results.py` and commit {name}"


def test_a_table_between_marks_is_written_anew_and_nothing_else() -> None:
    text = "a\n<!-- table: bits -->\nold\n<!-- end of table -->\nb\n"
    new = with_tables(text, {"bits": "| new |\n"})
    assert new == "a\n<!-- table: bits -->\n\n| new |\n\n<!-- end of table -->\nb\n"
    assert with_tables(new, {"bits": "| new |\n"}) == new


def test_learned_ranks_are_compared_with_the_lora_of_the_same_seed(tmp_path: Path) -> None:
    seeds = {0: (0.80, 0.81), 1: (0.70, 0.73)}
    runs = [run(method, seed, points) for seed, both in seeds.items() for method, points in zip(
        ("lora", "evidence-ra"), both, strict=True)]  # fmt: skip
    other = {"task": "rte", "scores": {"accuracy": 0.6, "nll": 0.55, "ece": 0.02}}
    write_runs(
        tmp_path / "glue", *runs, run("lora", 2, 0.2), run("lora", 0, 0.7, task="rte"), run("evidence-ra", 0, **other)
    )
    table = choice_tables(tmp_path)["ranks"].split("\n\n")[-1]
    assert "| Minus LoRA, r = 8 | MRPC | RTE | mean |" in table
    assert "| B-LoRA, mean rank 1.5: points | +2.0 (2) | -10.0 (1) | -4.0 |" in table
    assert "| B-LoRA, mean rank 1.5: NLL | +0.0% | +10.0% | +5.0% |" in table


def test_a_row_of_fewer_seeds_than_loras_says_so() -> None:
    def runs(name: str, *nll: float) -> list[Any]:
        return [{"forms": {name: {"scores": {"nll": each}}}} for each in nll]

    rows = {"tuned": runs("tuned", 0.4, 0.5), "tfb": runs("tfb", 0.45), "tuned-ensemble": runs("tuned-ensemble", 0.3)}
    table = _probabilities({"mrpc": rows}, "nll")
    assert "| LoRA | 0.450 |" in table and "| TFB (`bayesianize`) | 0.450 (1) |" in table
    assert "| ensemble of 3 LoRAs | 0.300 |" in table


def test_a_cell_is_mean_and_deviation_over_seeds_beside_the_papers_number() -> None:
    runs = [run("lora", seed, accuracy) for seed, accuracy in enumerate((0.70, 0.80, 0.90))]
    assert "80.00 ± 10.00 (89.95)" in score_table(runs)
    assert "| MRPC |" in score_table(runs)


def test_costs_and_samples_are_in_the_table_of_the_task(tmp_path: Path) -> None:
    sampled = {"samples": 10, "scores": {"accuracy": 0.85, "f1": 0.9, "nll": 0.4, "ece": 0.02}}
    write_runs(tmp_path / "glue", run("melora", sampled=sampled))
    text = glue_section(tmp_path)
    row = "| 1 | 80.00 | 90.00 | 0.500 | 0.050 | 20.0% | 25.0% | 60.0% | 70.0% | 1,000 | 900 |"
    assert f"| Me-LoRA, learned variances, mean {row}" in text
    assert "| Me-LoRA, learned variances, 10 samples | 1 | 85.00 |" in text
    assert "345 steps of 32 rows" in text


def test_seeds_that_a_mean_does_not_describe_are_told_one_by_one(tmp_path: Path) -> None:
    write_runs(tmp_path / "glue", *(run("lora", seed, points) for seed, points in enumerate((0.78, 0.82, 0.21))))
    write_runs(tmp_path / "glue", *(run("full", seed, points) for seed, points in enumerate((0.70, 0.80, 0.75))))
    assert "Far apart between seeds: LoRA r = 8: 78.00, 82.00, 21.00.\n" in glue_section(tmp_path) + "\n"


def test_runs_of_different_length_are_refused(tmp_path: Path) -> None:
    write_runs(tmp_path / "glue", run("lora", 0), run("full", 0, training={**TRAINING, "steps": 260}))
    with pytest.raises(BayesLoraError, match="mrpc-lora-0.json"):
        glue_section(tmp_path)


def test_what_has_not_been_run_is_listed() -> None:
    rows = {"lora": "LoRA", "full": "full"}
    assert missing([run("lora", 0)], rows, ["mrpc", "rte"]) == ["- LoRA: MRPC (seed 1, 2), RTE", "- full: all"]
    assert missing([run("lora", seed) for seed in range(3)], {"lora": "LoRA"}, ["mrpc"]) == []


def ablation(importance: str, accuracy: float) -> dict:
    ivon = {"name": "ivon", **IVON_SETTINGS["paper"]}
    own = {"options": {"importance": importance}, "optimizer": ivon, "posterior": {"posterior_std_variation": 0.0003}}
    return run("bayes_adalora", 0, accuracy, **own)


def test_the_ablation_says_whether_magnitude_alone_does_it(tmp_path: Path) -> None:
    other = {**ablation("snr_abs", 0.9), "seed": 1}
    write_runs(tmp_path / "importance", ablation("snr_abs", 0.8), ablation("magnitude", 0.79), other)
    text = importance_section(tmp_path)
    assert "| MRPC | paper | magnitude | 1 | 79.00 | 0.0003 |" in text
    assert "| MRPC | paper | does not hold | -1.00 points, seeds of both: 1 |" in text


def test_mmlu_has_both_numbers_of_examples(tmp_path: Path) -> None:
    subset = {"subset": {"per_subject": 10, "max_length": 1024}, "trained_on": ["arc_easy"], "task": "mmlu"}
    for row, points in (("qlora", 0.30), ("blora-ra", 0.31), ("blora-q+ra", 0.25)):
        shots = {"0": {"accuracy": points}, "5": {"accuracy": points + 0.02}}
        write_runs(tmp_path / "mmlu", run(row, shots=shots, **subset))
    text = mmlu_section(tmp_path)
    assert "| QLoRA (NF4 base) | 1 | 30.00 | 32.00 |" in text
    assert "0-shot: ranks alone are at most 0.5 points below QLoRA (NF4 base) | holds | +1.00 points" in text
    assert "5-shot: bits cost more than 0.5 points | holds | -6.00 points" in text
    assert "guessing" in text  # all within 8.7 points, two standard errors of 100 questions
    write_runs(tmp_path / "mmlu", run("lora", shots={"0": {"accuracy": 0.4}, "5": {"accuracy": 0.3}}, **subset))
    assert "guessing" not in mmlu_section(tmp_path)


def test_a_timing_file_has_a_table_for_every_clock() -> None:
    clocks = {"wall": {"ivon": {"seconds": 2.5}}, "cpu": {"ivon": {"seconds": 1.5}}}
    wall, cpu = nested_tables("variants", clocks)
    assert wall.startswith("variants, wall:") and "| ivon | 2.5 |" in wall
    assert cpu.startswith("variants, cpu:") and "| ivon | 1.5 |" in cpu


def test_a_layers_bytes_are_its_codes_ranges_and_bias() -> None:
    """By hand: 16 codes of W0 at 2 bits, rank 3 of A at 4 and B at 8; bias, channels, rows of A, five other ranges."""
    found = layer(0, "query", rank=3, weight=2, A=4, B=8, E=32)
    assert layer_bytes(found) == 16 * 2 / 8 + 12 * 4 / 8 + 3 * 4 + 12 + 4 * (4 + 4 + 3 + 5)


def test_bytes_are_compared_with_the_best_rounding_that_is_no_larger(tmp_path: Path) -> None:
    size = 6 * layer_bytes(layer(0, "query"))
    options = {"bops_scope": "attention", "target_bops": 0.1}
    write_runs(tmp_path / "frontier", run("evidence-q+ra", accuracy=0.83, options=options))
    roundings = [
        {"setting": name, "scope": "attention", "output_bits": 8, "bytes": {"layers": size * share},
         "scores": {"accuracy": accuracy, "nll": 0.5}}
        for name, share, accuracy in (("W2A8", 0.5, 0.6), ("W4A8", 1.0, 0.7), ("W8A8", 1.1, 0.9))
    ]  # fmt: skip
    write_runs(tmp_path / "rounding", run(rounded=roundings))
    assert f"| MRPC | Attention | {size / 1e6:.2f} | 70.0 (1) | 83.0 (1) |" in bytes_table(tmp_path)


def test_a_page_of_a_few_runs_comes_with_its_figures(tmp_path: Path) -> None:
    quantized = [layer(block, name, 4, A=2) for block in (0, 1) for name in ("query", "key", "value")]
    write_runs(tmp_path / "results" / "glue", run("lora"), run("blora-q+ra", layers=quantized))
    (tmp_path / "results" / "train_step.json").write_text(
        json.dumps({"rounds": 3, "variants": {"lora": {"seconds": 1.5}}}), encoding="utf-8"
    )
    stale = tmp_path / "docs" / "figures" / "results-mmlu.png"
    stale.parent.mkdir(parents=True)
    stale.touch()
    write(tmp_path / "results", tmp_path / "docs")
    text = (tmp_path / "docs" / "results.md").read_text(encoding="utf-8")
    drawn = {path.stem for path in (tmp_path / "docs" / "figures").glob("*.png")}
    assert drawn == {"results-ranks", "results-bits", "results-score-bops"}
    assert all(f"figures/{name}.png" in text for name in drawn) and "results-mmlu" not in text
    assert "| lora | 1.5 |" in text

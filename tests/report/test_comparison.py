"""Runs side by side: which count as seeds of one setting, and what their table says."""

from __future__ import annotations

import csv
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bayeslora.errors import BayesLoraError
from bayeslora.report import write_comparison
from bayeslora.report.comparison import (
    group_row,
    group_runs,
    mean_and_deviation,
    pooled_reliability,
    reliability_of,
    run_row,
)
from bayeslora.report.comparison_figures import Point, reliability_figure, score_figure
from bayeslora.runs.record import read_run
from tests.report.synthetic import make_metrics, write_run


def run(folder: Path, config: str | None = None, **metrics: Any) -> Path:
    return write_run(folder, make_metrics(**metrics), [], config)


def grouped(folders: list[Path]) -> list[tuple[str, list[int | None]]]:
    """Label and seeds of each setting."""
    return [(group.label, [r.seed for r in group.runs]) for group in group_runs([read_run(f) for f in folders])]


def test_seeds_of_one_setting_become_mean_and_sample_deviation(tmp_path: Path) -> None:
    folders = [
        run(tmp_path / f"blora-{seed}", f"r: 8\nseed: {seed}\noutput_dir: runs/{seed}\n", seed=seed, accuracy=accuracy)
        for seed, accuracy in ((0, 0.80), (1, 0.82), (2, 0.87))
    ]
    folders.append(run(tmp_path / "lora", "r: 8\nseed: 0\n", method="lora", accuracy=0.81))
    table = write_comparison(folders, tmp_path / "out")
    blora, lora = table["groups"]
    assert blora["seeds"] == [0, 1, 2] and blora["setting"] == "B-LoRA"
    # Mean .83; deviations -.03, -.01, .04: sum of squares .0026, over n - 1 = 2.
    assert blora["score"] == {"mean": pytest.approx(0.83), "sd": pytest.approx(math.sqrt(0.0013)), "n": 3}
    assert lora["score"] == {"mean": pytest.approx(0.81), "sd": None, "n": 1}
    assert [row["folder"] for row in table["runs"]] == [str(folder) for folder in folders]
    text = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert "| B-LoRA | rotten_tomatoes | accuracy | 3 | 0.830 ± 0.036 |" in text
    assert "| LoRA |" in text and "18.4 %" in text
    assert json.loads((tmp_path / "out" / "table.json").read_text(encoding="utf-8")) == table


def test_a_different_option_task_or_length_is_a_different_setting(tmp_path: Path) -> None:
    folders = [
        run(tmp_path / "a", "r: 8\nmethod: blora\nseed: 0\n", seed=0),
        run(tmp_path / "b", "r: 4\nmethod: blora\nseed: 1\n", seed=1),
        run(tmp_path / "c", "r: 8\nmethod: blora\nseed: 2\n", seed=2, task="mrpc"),
        run(tmp_path / "d", "r: 8\nmethod: blora\nseed: 3\n", seed=3, steps=99),
        run(tmp_path / "e", "r: 8\nmethod: blora\nseed: 4\n", seed=4),
    ]
    groups = grouped(folders)
    assert [seeds for _, seeds in groups] == [[0, 4], [1], [2], [3]]
    labels = [label for label, _ in groups]
    assert labels == ["B-LoRA (r=8, steps=750)", "B-LoRA (r=4, steps=750)", "B-LoRA", "B-LoRA (r=8, steps=99)"]


def test_nested_options_and_spelling_of_the_seed_are_seen_through(tmp_path: Path) -> None:
    folders = [
        run(tmp_path / str(seed), f"training:\n  lr: 0.1\n  data-seed: {seed}\noutput-dir: x{seed}\n", seed=seed)
        for seed in range(2)
    ]
    assert grouped(folders) == [("B-LoRA", [0, 1])]


def test_a_repeated_seed_is_no_seed_and_is_not_averaged(tmp_path: Path) -> None:
    folders = [run(tmp_path / name, "r: 8\nseed: 0\n", seed=0) for name in ("first", "second")]
    assert grouped(folders) == [("B-LoRA (first)", [0]), ("B-LoRA (second)", [0])]


def test_without_a_config_the_adapters_own_options_count_but_not_what_it_learned(tmp_path: Path) -> None:
    folders = []
    for seed, (r, pattern) in enumerate(((8, {"q": 1}), (8, {"q": 5}), (16, {}))):
        folders.append(run(tmp_path / str(seed), seed=seed))
        (folders[-1] / "adapter_config.json").write_text(json.dumps({"r": r, "rank_pattern": pattern}))
    assert [seeds for _, seeds in grouped(folders)] == [[0, 1], [2]]


def test_a_row_holds_the_runs_own_numbers(tmp_path: Path) -> None:
    metrics = make_metrics()
    metrics["layers"] = [
        {"name": f"layer.{i}.query", "rank": rank, "initial_rank": 8, "bits": {"weight": 8, "A": a, "E": 2, "B": 4}}
        for i, (rank, a) in enumerate(((1, 2), (4, 16)))
    ]
    row = run_row(read_run(write_run(tmp_path / "run", metrics, [])))
    assert row["mean_rank"] == 2.5
    assert row["adapter_median_bits"] == 3.0  # of 2, 2, 4 and 16, 2, 4; W0's 8 is not the adapter's
    assert (row["score"], row["metric"], row["attention_bops"]) == (0.842, "accuracy", 0.1843)
    assert row["trainable_parameters"] == 112_128 and row["train_seconds"] == 251.3


def test_full_fine_tuning_has_no_ranks_and_no_adapter_bits(tmp_path: Path) -> None:
    (group,) = group_runs([read_run(run(tmp_path / "full", method="full"))])
    row = group_row(group)
    assert row["mean_rank"] is None and row["adapter_median_bits"] is None and row["score"]["n"] == 1


def test_the_figures_are_pngs_and_left_out_where_nothing_can_be_drawn(tmp_path: Path) -> None:
    drawn = write_comparison([run(tmp_path / "a"), run(tmp_path / "b", method="lora")], tmp_path / "out")
    assert drawn["figures"] == ["score_bops.png", "reliability.png"]
    for name in drawn["figures"]:
        with Image.open(tmp_path / "out" / name) as image:
            image.load()
            assert image.width > 600
    bare = write_comparison([run(tmp_path / "c", relative_bops={}, reliability=None)], tmp_path / "bare")
    assert bare["figures"] == []
    assert {path.name for path in (tmp_path / "bare").iterdir()} == {
        f"table.{e}" for e in ("csv", "json", "md", "tex")
    }


def test_figures_for_print_are_beside_the_others_and_have_no_date(tmp_path: Path) -> None:
    folders = [run(tmp_path / "a"), run(tmp_path / "b", method="lora")]
    for name in ("out", "again"):
        drawn = write_comparison(folders, tmp_path / name)["figures"]
    for name in drawn:
        first, again = ((tmp_path / out / name).with_suffix(".pdf").read_bytes() for out in ("out", "again"))
        assert first == again and first.startswith(b"%PDF")


def _two_settings(tmp_path: Path) -> list[Path]:
    accuracies = {"lora": (0.80, 0.82, 0.87), "blora": (0.83, 0.84, 0.88)}
    return [
        run(tmp_path / f"{method}-{seed}", f"r: 8\nseed: {seed}\n", seed=seed, method=method, accuracy=accuracy)
        for method, values in accuracies.items()
        for seed, accuracy in enumerate(values)
    ]


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    """Differences .03, .02, .01: mean .02, deviation .01, and Student's t at 2 degrees of freedom is 4.3027."""
    folders = _two_settings(tmp_path)
    table = write_comparison([folders[0], *reversed(folders[1:])], tmp_path / "out")
    (row,) = table["differences"]
    assert (row["setting"], row["baseline"], sorted(row["seeds"])) == ("B-LoRA", "LoRA", [0, 1, 2])
    half = 4.302653 * 0.01 / math.sqrt(3)
    assert row["score"] == pytest.approx({"mean": 0.02, "low": 0.02 - half, "high": 0.02 + half}, abs=1e-6)
    text = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert "## Scores minus those of LoRA with the same seed: mean and 95 % interval" in text
    assert "| 3 | +0.020 (−0.005 to +0.045) |" in text


def test_settings_of_other_seeds_or_tasks_have_no_difference(tmp_path: Path) -> None:
    folders = [run(tmp_path / "a", seed=0), run(tmp_path / "b", seed=1, method="lora")]
    folders.append(run(tmp_path / "c", seed=0, method="lora", task="mrpc"))
    assert write_comparison(folders, tmp_path / "out")["differences"] == []
    one = write_comparison([folders[0], run(tmp_path / "d", seed=0, method="lora")], tmp_path / "one")
    assert one["differences"][0]["score"]["low"] is None


def test_the_table_for_print_has_every_cell_and_escapes_what_latex_reads(tmp_path: Path) -> None:
    folders = _two_settings(tmp_path)
    write_comparison(folders, tmp_path / "out")
    text = (tmp_path / "out" / "table.tex").read_text(encoding="utf-8")
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 5
    assert r"B-LoRA & rotten\_tomatoes & accuracy & 3 & 0.850 $\pm$ 0.026 &" in text
    assert r"18.4 \%" in text and r"+0.020 ($-$0.005 to +0.045)" in text
    for body in re.findall(r"\\midrule\n(.*?)\n\\bottomrule", text, flags=re.DOTALL):
        for line in body.splitlines():
            assert line.endswith(r" \\") and "_" not in line.replace(r"\_", "")


def test_the_csv_has_a_row_for_every_run_with_its_numbers_in_full(tmp_path: Path) -> None:
    folders = _two_settings(tmp_path)
    table = write_comparison(folders, tmp_path / "out")
    with open(tmp_path / "out" / "table.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["folder"] for row in rows] == [str(folder) for folder in folders]
    for row, run_ in zip(rows, table["runs"], strict=True):
        assert float(row["score"]) == run_["score"] and float(row["attention_bops"]) == run_["attention_bops"]


def test_reliability_of_seeds_is_pooled_by_count(tmp_path: Path) -> None:
    def bins(count: int, accuracy: float) -> dict[str, Any]:
        return {"bins": [{"lower": 0.5, "upper": 1.0, "count": count, "confidence": 0.9, "accuracy": accuracy}]}

    runs = [read_run(run(tmp_path / str(n), reliability=bins(n, accuracy))) for n, accuracy in ((10, 1.0), (30, 0.6))]
    (pooled,) = pooled_reliability(runs).bins
    assert (pooled.count, pooled.accuracy, pooled.confidence) == (40, pytest.approx(0.7), pytest.approx(0.9))


def test_one_value_has_no_deviation_and_no_value_no_mean() -> None:
    assert mean_and_deviation([2.0, 4.0]) == {"mean": 3.0, "sd": pytest.approx(math.sqrt(2)), "n": 2}
    assert mean_and_deviation([2.0]) == {"mean": 2.0, "sd": None, "n": 1}
    assert mean_and_deviation([]) is None


def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    folder = run(tmp_path / "a")
    with pytest.raises(BayesLoraError, match="0 folders"):
        write_comparison([], tmp_path / "out")
    with pytest.raises(BayesLoraError, match="named twice"):
        write_comparison([folder, tmp_path / "." / "a"], tmp_path / "out")
    with pytest.raises(BayesLoraError, match=r"cannot read .*metrics\.json"):
        write_comparison([folder, tmp_path / "nowhere"], tmp_path / "out")
    broken = run(tmp_path / "broken", config="a: [1\n")
    with pytest.raises(BayesLoraError, match=r"config\.yaml cannot be read"):
        write_comparison([broken], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(BayesLoraError, match="cannot be created"):
        write_comparison([folder], tmp_path / "file")


def test_the_reliability_figure_has_the_tables_mean_error(tmp_path: Path) -> None:
    scores = [{"accuracy": 0.8, "ece": error} for error in (0.106, 0.184)]
    runs = [read_run(run(tmp_path / str(seed), scores=each, seed=seed)) for seed, each in enumerate(scores)]
    (group,) = group_runs(runs)
    figure = reliability_figure([reliability_of(group.label, group.runs)])
    assert figure is not None
    (title,) = [axes.get_title(loc="left") for axes in figure.axes if axes.axison]
    assert title == "B-LoRA\nECE 0.145"
    assert group_row(group)["ece"]["mean"] == pytest.approx(0.145)


def test_a_single_run_has_the_interval_of_its_accuracy() -> None:
    point = Point("LoRA", "sst2", "accuracy", 0.8, 0.97, rows=100)
    assert point.interval() == pytest.approx((0.8 - 0.7112, 0.8666 - 0.8), abs=1e-4)  # Wilson's, of 80 in 100
    assert Point("LoRA", "cola", "matthews_correlation", 0.3, 0.97, rows=100).interval() is None

    def bars(*points: Point) -> tuple[list[float], str]:
        figure = score_figure(points)
        assert figure is not None
        drawn = [bar for bars in figure.axes[0].collections for bar in bars.get_segments()]
        return [end for bar in drawn for end in bar[:, 1]], figure.legends[0].get_title().get_text()

    assert bars(point) == (pytest.approx([0.7112, 0.8666], abs=1e-4), "bars of one run: 95 % interval over its rows")
    assert bars(replace(point, rows=0)) == ([], "")
    assert bars(point, replace(point, score=0.9))[1] == "bars: one standard deviation over seeds"


def test_scores_on_other_files_of_the_same_name_have_no_difference(tmp_path: Path) -> None:
    files = "train_file: {0}/train.csv\neval_file: {0}/test.csv\nseed: 0\n"
    folders = [
        run(tmp_path / name, files.format(data), seed=0, method=method)
        for name, data, method in (("a", "A", "lora"), ("b", "B", "blora"), ("c", "A", "blora"))
    ]
    assert write_comparison(folders[:2], tmp_path / "out")["differences"] == []
    (row,) = write_comparison(folders, tmp_path / "all")["differences"]
    assert row["baseline"] == "LoRA"

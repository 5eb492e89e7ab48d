"""Figures of uncertainty: that what is drawn is what metrics.json holds, alone and side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from bayeslora.errors import BayesLoraError
from bayeslora.report import uncertainty_figures as figures
from bayeslora.report import write_comparison, write_report
from bayeslora.runs.record import Histogram, RunRecord, read_run
from tests.report.synthetic import make_metrics, write_run

EDGES = [i * 0.693 / 30 for i in range(31)]


def histogram(right: int, foreign: int | None = None) -> dict[str, Any]:
    """All of a group in one bin: right answers low, wrong ones high, foreign inputs in between."""
    one = lambda position, count: [count if i == position else 0 for i in range(30)]  # noqa: E731
    groups = {"correct": one(0, right), "wrong": one(29, 100 - right)}
    return {"edges": EDGES, **groups, **({} if foreign is None else {"ood": one(15, foreign)})}


def uncertain(seed: int = 0, samples: int = 10, ood: bool = True, **changes: Any) -> dict[str, Any]:
    """metrics.json of a sampled Me-LoRA run that was also asked about foreign inputs."""
    measures = ["entropy", "mutual_information"] if samples else ["entropy"]
    found: dict[str, Any] = {
        "risk_coverage": {"coverage": [0.25, 0.5, 0.75, 1.0], "risk": [0.0, 0.02 + 0.01 * seed, 0.1, 0.2]},
        "uncertainty": {m: histogram(80, 50 if ood else None) for m in measures},
    }
    if ood:
        names = ["max_probability", *measures]
        scores = {m: {"auroc": 0.6 + 0.1 * i + 0.02 * seed, "aupr": 0.5, "fpr95": 0.7} for i, m in enumerate(names)}
        found["ood"] = {"name": "headlines", "rows": 50, "rows_in": 100, "scores": scores}
    base = make_metrics("melora", seed=seed, samples=samples, **found)
    base["scores"] |= {"adaptive_ece": 0.05, "classwise_ece": 0.06, "aurc": 0.08 + 0.01 * seed}
    return base | changes


def record(tmp_path: Path, **settings: Any) -> RunRecord:
    return read_run(write_run(tmp_path / "run", uncertain(**settings), []))


def titles(figure: Figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes if axes.axison]


def test_the_record_holds_what_was_written(tmp_path: Path) -> None:
    run = record(tmp_path)
    assert run.risk_coverage.points == [(0.25, 0.0), (0.5, 0.02), (0.75, 0.1), (1.0, 0.2)]
    assert list(run.uncertainty) == ["entropy", "mutual_information"]
    assert run.uncertainty["entropy"].counts["wrong"][29] == 20
    assert (
        run.detection["mutual_information"]["auroc"] == pytest.approx(0.8)
        and run.ood is not None
        and run.ood.name == "headlines"
    )
    assert run.where == "rotten_tomatoes"
    other = record(tmp_path, split="test")
    assert other.where == "rotten_tomatoes, test"


def test_the_curve_and_the_rate_of_any_order(tmp_path: Path) -> None:
    figure = figures.selective_figure(record(tmp_path))
    assert figure is not None and titles(figure) == ["AURC 0.0800"]
    curve, level = figure.axes[0].lines
    np.testing.assert_allclose(curve.get_xydata(), [(0.25, 0.0), (0.5, 0.02), (0.75, 0.1), (1.0, 0.2)])
    assert set(level.get_ydata()) == {0.2}


def test_answers_have_a_curve_for_each_measure(tmp_path: Path) -> None:
    shares = [0.5, 1.0]
    curves = {name: {"coverage": shares, "risk": [low, 0.4]} for name, low in (("probability", 0.1), ("entropy", 0.3))}
    run = record(tmp_path, risk_coverage_by=curves)
    assert run.risk_coverage_by["entropy"].points == [(0.5, 0.3), (1.0, 0.4)]
    figure = figures.selective_figure(run)
    assert figure is not None and titles(figure) == ["Selective answers"]
    first, second, level = figure.axes[0].lines
    np.testing.assert_allclose(first.get_xydata(), [(0.5, 0.1), (1.0, 0.4)])
    np.testing.assert_allclose(second.get_xydata(), [(0.5, 0.3), (1.0, 0.4)])
    assert set(level.get_ydata()) == {0.4}
    legend = figure.axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["probability of the answer", "entropy", "in any order"]


def test_each_measure_has_a_panel_with_every_group_as_shares_of_itself(tmp_path: Path) -> None:
    figure = figures.uncertainty_figure(record(tmp_path))
    assert figure is not None and titles(figure) == ["entropy, AUROC 0.700", "mutual information, AUROC 0.800"]
    for axes in figure.axes:
        values = [patch.get_data().values for patch in axes.patches]
        assert [int(v.argmax()) for v in values] == [0, 29, 15]
        assert all(v.sum() == pytest.approx(1.0) for v in values)
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["right", "wrong", "out of distribution"]


def test_without_foreign_inputs_or_samples_less_is_drawn(tmp_path: Path) -> None:
    figure = figures.uncertainty_figure(record(tmp_path, ood=False, samples=0))
    assert figure is not None and titles(figure) == ["entropy"]
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["right", "wrong"]
    old = read_run(write_run(tmp_path / "old", make_metrics(), []))
    assert figures.uncertainty_figure(old) is None and figures.selective_figure(old) is None


def test_an_axis_ends_where_the_examples_do(tmp_path: Path) -> None:
    run = record(
        tmp_path, uncertainty={"entropy": {"edges": EDGES, "correct": [90, 10] + [0] * 28, "wrong": [0] * 30}}
    )
    figure = figures.uncertainty_figure(run)
    assert figure is not None
    assert figure.axes[0].get_xlim()[1] == pytest.approx(1.01 * EDGES[2])


def test_reports_gain_the_two_figures_and_evaluations_have_them_without_a_history(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", uncertain())
    names = ["cost.png", "calibration.png", "selective.png", "uncertainty.png", "loss.png", "report.html"]
    assert [path.name for path in write_report(folder)] == names
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Dashed: headlines" in page and "10 Monte-Carlo samples" in page and "class-wise ECE" in page
    bare = tmp_path / "bare"
    bare.mkdir()
    evaluated = {"folder": "run", "seed": 0}
    (bare / "metrics.json").write_text(json.dumps(uncertain(evaluated=evaluated)))
    names = ["calibration.png", "selective.png", "uncertainty.png", "report.html"]
    assert [path.name for path in write_report(bare)] == names
    page = (bare / "report.html").read_text(encoding="utf-8")
    assert "history.json" not in page and "detection of headlines" in page


def shifted_scores(**changes: Any) -> dict[str, Any]:
    """Two suites and a domain; scores fall and the calibration error rises with the level."""
    levels = [{"suite": "none", "severity": 0.0, "rows": 100, "scores": {"accuracy": 0.8, "nll": 0.5, "ece": 0.02}}]
    for suite in ("typos", "truncation"):
        for level in (1, 2, 3):
            scores = {"accuracy": 0.8 - 0.1 * level, "nll": 0.5 + level, "ece": 0.02 + 0.03 * level}
            levels.append({"suite": suite, "severity": level / 10, "rows": 100, "scores": scores})
    other = {"suite": "domain", "severity": 1.0, "rows": 50, "name": "news.jsonl"}
    levels.append({**other, "scores": {"accuracy": 0.41, "nll": 0.9, "ece": 0.2}})
    return {"columns": ["text"], "seed": 0, "levels": levels, **changes}


def test_scores_by_shift_have_a_line_for_each_suite_and_a_table(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", uncertain(shift=shifted_scores(), evaluated={"folder": "x", "seed": 0}))
    run = read_run(folder)
    figure = figures.shift_figure(run)
    assert figure is not None and [axes.get_ylabel() for axes in figure.axes] == ["accuracy", "ECE"]
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    assert list(lines) == ["typos", "truncation", "domain"]
    assert list(lines["typos"]) == pytest.approx([0.8, 0.7, 0.6, 0.5]) and list(lines["domain"]) == [0.41, 0.41]
    assert (folder / "shift.png") in write_report(folder)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Dashed: news.jsonl" in page and page.count("<tr><th>typos") == 3
    assert run.to_dict()["shift"] == shifted_scores()
    assert figures.shift_figure(record(tmp_path / "other")) is None


def test_a_regression_under_shift_has_one_panel(tmp_path: Path) -> None:
    levels = [
        {"suite": suite, "severity": severity, "rows": 9, "scores": {"pearson": 0.9 - severity, "mse": 1.0}}
        for suite, severity in (("none", 0.0), ("casing", 0.25), ("casing", 0.5), ("casing", 1.0))
    ]
    scores = {"pearson": 0.9, "mse": 1.0}
    metrics = make_metrics("lora", scores=scores, metric="pearson", shift={"levels": levels}, labels=[])
    figure = figures.shift_figure(read_run(write_run(tmp_path / "run", metrics)))
    assert figure is not None and [axes.get_ylabel() for axes in figure.axes] == ["Pearson correlation"]


def test_seeds_are_averaged_and_pooled() -> None:
    assert figures.mean_curve([[(0.5, 0.1), (1.0, 0.3)], [], [(0.5, 0.2), (1.0, 0.5)]]) == [
        (0.5, pytest.approx(0.15)),
        (1.0, pytest.approx(0.4)),
    ]
    assert figures.mean_curve([[(0.5, 0.1)], [(0.4, 0.2)]]) == [(0.5, 0.1)]
    one, two = Histogram([0, 1, 2], correct=[1, 2], ood=[5, 5]), Histogram([0, 1, 2], correct=[3, 4])
    assert figures.pooled_histogram([one, two]) == Histogram([0, 1, 2], correct=[4, 6])
    assert figures.pooled_histogram([one, Histogram([0, 2, 4], correct=[3, 4])]) == one
    assert figures.pooled_histogram([]) is None


def test_runs_side_by_side_show_every_score_of_uncertainty(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"s{seed}", uncertain(seed), [], f"r: 8\nseed: {seed}\n") for seed in range(2)]
    mean = uncertain(0, samples=0)
    folders.append(write_run(tmp_path / "mean", mean, [], "r: 8\nseed: 0\nsamples: 0\n"))
    folders.append(write_run(tmp_path / "lora", make_metrics("lora"), [], "r: 8\nseed: 0\n"))
    table = write_comparison(folders, tmp_path / "out")
    assert [group["setting"] for group in table["groups"]] == ["Me-LoRA, 10 samples", "Me-LoRA, mean", "LoRA"]
    sampled = table["groups"][0]
    assert sampled["ood_mutual_information_auroc"]["mean"] == pytest.approx(0.81)
    assert sampled["aurc"] == {"mean": pytest.approx(0.085), "sd": pytest.approx(0.01 / 2**0.5), "n": 2}
    assert table["runs"][3].get("ood_entropy_auroc") is None and table["runs"][3]["ood"] is None
    assert table["figures"] == [
        "score_bops.png", "reliability.png", "risk_coverage.png", "uncertainty.png", "ood.png",
    ]  # fmt: skip
    text = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    head = next(line for line in text.splitlines() if "NLL" in line and "seeds" in line)
    for column in ("adaptive ECE", "class-wise ECE", "Brier", "AURC", "OOD AUROC, mutual information"):
        assert f"| {column} |" in head
    (line,) = [line for line in text.splitlines() if line.startswith("| Me-LoRA, 10 samples | rotten_tomatoes | acc")
               and "0.810 ± 0.014" in line]  # fmt: skip
    assert "0.085 ± 0.007" in line


def test_a_column_nobody_has_a_number_for_is_left_out(tmp_path: Path) -> None:
    write_comparison([write_run(tmp_path / "lora", make_metrics("lora"), [])], tmp_path / "out")
    text = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert "OOD" not in text and "AURC" not in text and "## Cost" in text


def test_splits_of_a_task_are_not_one_setting(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / str(seed), uncertain(seed, split=split), [], f"seed: {seed}\n")
        for seed, split in enumerate(("validation", "test"))
    ]
    table = write_comparison(folders, tmp_path / "out")
    assert [group["where"] for group in table["groups"]] == ["rotten_tomatoes", "rotten_tomatoes, test"]


def test_detection_has_a_line_a_setting_and_a_mark_a_measure() -> None:
    found = [
        figures.Detections("LoRA", "t", {"entropy": [0.6]}),
        figures.Detections("Me-LoRA", "t", {"entropy": [0.6, 0.7], "mutual_information": [0.8, 0.9]}),
        figures.Detections("full", "t", {}),
    ]
    figure = figures.detection_figure(found)
    assert figure is not None
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["LoRA", "Me-LoRA"]
    means = sorted(float(container[0].get_xdata()[0]) for container in axes.containers)
    assert means == pytest.approx([0.6, 0.65, 0.85])
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["entropy", "mutual information"]
    assert figures.detection_figure(found[2:]) is None


def test_measures_are_drawn_in_blocks_and_curves_in_a_panel_a_task() -> None:
    bins = Histogram([0.0, 0.3, 0.6], correct=[5, 5], wrong=[1, 2])
    panels: list[tuple[str, str, Histogram, float | None]] = [
        ("LoRA", "entropy", bins, 0.6),
        ("Me-LoRA", "entropy", bins, 0.7),
        ("Me-LoRA", "mutual_information", bins, None),
    ]
    figure = figures.histograms_figure(panels)
    assert figure is not None and titles(figure) == ["LoRA\nAUROC 0.600", "Me-LoRA\nAUROC 0.700", "Me-LoRA"]
    assert figures.histograms_figure([]) is None
    curves = [figures.Selection(label, task, [(0.5, 0.1), (1.0, 0.2)], None) for label in "ab" for task in ("x", "y")]
    drawn = figures.risk_coverage_figure(curves)
    assert drawn is not None and titles(drawn) == ["x", "y"]
    assert all(len(axes.lines) == 2 for axes in drawn.axes)
    assert figures.risk_coverage_figure([figures.Selection("a", "x", [], None)]) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"risk_coverage": {"coverage": [0.5, 1.0], "risk": [0.1]}}, "one risk for each coverage"),
        ({"uncertainty": {"entropy": {"edges": [0, 1], "correct": [1, 2]}}}, "one count for each bin"),
        ({"uncertainty": {"entropy": {"edges": [0, "x"]}}}, r"'uncertainty.entropy.edges\[1\]' is 'x'"),
        ({"ood": {"scores": {}}}, "'ood.name'"),
        ({"shift": {"levels": [{"suite": "typos", "scores": {}}]}}, r"'shift.levels\[0\].severity'"),
        ({"shift": {"levels": [{"suite": "typos", "severity": 2, "scores": {}}]}}, r"'shift.levels\[0\].severity'"),
        ({"ood": {"name": "x", "scores": {"entropy": {"auroc": "high"}}}}, "'ood.scores.entropy.auroc'"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = write_run(tmp_path / "run", uncertain() | change, [])
    with pytest.raises(BayesLoraError, match=message):
        read_run(folder)

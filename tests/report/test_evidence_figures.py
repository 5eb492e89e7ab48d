"""The figure of evidence: its points are the run's gates, its lines their prices, and its words count them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bayeslora import describe
from bayeslora.report import write_report
from bayeslora.report.evidence_figures import evidence_figure, summarize_evidence
from bayeslora.report.style import DPI, png_bytes
from bayeslora.runs.record import RunRecord, read_run
from tests.methods.evidence_models import trained
from tests.report.synthetic import make_metrics, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    """The record of a trained model, as a file has it."""
    layers = [layer.to_dict() for layer in describe(trained())]
    return read_run(write_run(tmp_path_factory.mktemp("evidence"), make_metrics(layers=layers)))


def test_every_gate_that_saves_something_is_a_point_filled_where_it_is_open(run: RunRecord) -> None:
    figure = evidence_figure(run)
    assert figure is not None and len(figure.axes) == 2
    widths = {gate for gate in run.gates if gate.kind != "rank" and gate.saving > 0}
    low = figure.axes[0].get_ylim()[0]
    filled = {
        tuple(p) for points in figure.axes[0].collections if len(points.get_facecolors()) for p in points.get_offsets()
    }
    hollow = {
        tuple(p)
        for points in figure.axes[0].collections
        if not len(points.get_facecolors())
        for p in points.get_offsets()
    }
    assert filled == {(gate.saving, max(gate.delta, low)) for gate in widths if gate.is_open}
    assert hollow == {(gate.saving, max(gate.delta, low)) for gate in widths if not gate.is_open}
    ranks = [gate for gate in run.gates if gate.kind == "rank"]
    assert sum(len(points.get_offsets()) for points in figure.axes[1].collections) == len(ranks)


def test_the_line_is_the_price_of_what_is_saved(run: RunRecord) -> None:
    figure = evidence_figure(run)
    assert figure is not None
    (line,) = figure.axes[0].lines
    np.testing.assert_allclose(line.get_ydata(), run.gates[0].price * np.asarray(line.get_xdata()))
    assert figure.get_size_inches()[0] * DPI <= 1000, "type stays readable when it is scaled to 400 pixels"
    again = evidence_figure(run)
    assert again is not None and png_bytes(figure) == png_bytes(again), "equal data give equal bytes"


def test_ranks_alone_have_one_panel(tmp_path: Path) -> None:
    layers = [layer.to_dict() for layer in describe(trained(mode="ra", target_bops=None))]
    alone = read_run(write_run(tmp_path, make_metrics(layers=layers)))
    figure, summary = evidence_figure(alone), summarize_evidence(alone)
    assert figure is not None and [axes.get_title(loc="left") for axes in figure.axes] == [
        "Ranks: evidence against the price"
    ]
    assert summary is not None and summary.width_price is None
    assert summary.rank_threshold == pytest.approx((2.5e-4, 2.5e-4)), "a price of 1e-3 over four layers"


def test_the_report_says_the_price_and_how_many_gates_are_decided(run: RunRecord) -> None:
    page = write_report(run.folder)[-1].read_text(encoding="utf-8")
    probabilities = [gate.probability for gate in run.gates]
    sure = sum(p is not None and (p < 0.05 or p > 0.95) for p in probabilities)
    assert f"Of {len(run.gates)} gates, {sure} are clearly decided" in page
    assert f"and {len(run.gates) - sure} are not." in page
    assert f"Price of widths: {run.gates[0].price:.2g} nats" in page
    assert (run.folder / "evidence.png").is_file()


def test_unknown_probabilities_are_said_and_runs_without_evidence_have_no_figure(run: RunRecord) -> None:
    content = json.loads(json.dumps(run.to_dict()))
    for layer in content["layers"]:
        for gate in layer["gates"]:
            del gate["probability"]
    unknown = summarize_evidence(RunRecord.from_dict(content))
    assert unknown is not None and unknown.sure is None
    write_run(run.folder, content)
    assert "The number of training examples is unknown" in write_report(run.folder)[-1].read_text(encoding="utf-8")
    without = RunRecord.from_dict(make_metrics())
    assert evidence_figure(without) is None and summarize_evidence(without) is None

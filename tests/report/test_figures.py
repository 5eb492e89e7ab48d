"""Figures: where they exist, how large they are, and that the numbers in them are the run's."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from bayeslora.report import figures, training_figures
from bayeslora.report.style import DPI, WIDTH_COLORS, png_bytes, text_color_on, width_colormap
from bayeslora.runs.record import RunRecord, read_history, read_run
from tests.report.synthetic import DEBERTA, GPT2, LLAMA, make_history, make_metrics, write_run


def record(tmp_path: Path, **metrics: Any) -> RunRecord:
    return read_run(write_run(tmp_path / "run", make_metrics(**metrics), []))


def cell_texts(figure: Figure, axes: int = 0) -> list[str]:
    return [text.get_text() for text in figure.axes[axes].texts]


def test_the_rank_map_prints_every_rank_from_the_first_layer_up_in_the_order_q_k_v(tmp_path: Path) -> None:
    run = record(tmp_path)
    figure = figures.rank_figure(run)
    assert figure is not None
    assert cell_texts(figure) == [str(layer.rank) for layer in run.layers]
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["query", "key", "value"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1", "2", "3", "4", "5"]
    low, high = axes.get_ylim()
    assert low < high, "row 0 is drawn at the bottom"


@pytest.mark.parametrize(
    ("names", "columns", "rows"),
    [
        (DEBERTA, ["query_proj", "key_proj", "value_proj"], 12),
        (LLAMA, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], 30),
        (GPT2, ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"], 12),
    ],
)
def test_width_maps_have_one_panel_a_matrix(tmp_path: Path, names: list[str], columns: list[str], rows: int) -> None:
    run = record(tmp_path, names=names)
    figure = figures.bits_figure(run)
    assert figure is not None
    panels = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_title(loc="left") for axes in panels] == columns
    assert all(len(axes.texts) == 7 * rows for axes in panels)
    first = run.layers[0].bits
    assert cell_texts(figure)[:7] == [str(first[kind]) for kind in run.kinds]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["2 bits", "4 bits", "8 bits", "16 bits", "32 bits (not quantized)"]
    width, height = figure.get_size_inches()
    assert width <= 7.0 and height <= 10.0, "a figure fits a page"


def test_experts_share_a_cell_as_their_mean_and_a_missing_matrix_is_a_dot(tmp_path: Path) -> None:
    names = [f"model.layers.0.mlp.experts.{i}.up_proj" for i in range(2)] + ["model.layers.1.self_attn.q_proj"]
    metrics = make_metrics(names=names)
    for layer, rank in zip(metrics["layers"], (3, 6, 2), strict=True):
        layer["rank"] = rank
    run = read_run(write_run(tmp_path / "run", metrics, []))
    figure = figures.rank_figure(run)
    assert figure is not None
    assert cell_texts(figure) == ["·", "4.5", "2.0", "·"]


def test_each_width_has_its_own_colour_and_readable_text() -> None:
    colors, norm = width_colormap()
    seen = {matplotlib.colors.to_hex(colors(norm(bits))) for bits in WIDTH_COLORS}
    assert seen == set(WIDTH_COLORS.values())
    assert text_color_on(WIDTH_COLORS[2]) != "white" and text_color_on(WIDTH_COLORS[32]) == "white"


def test_the_unadapted_part_of_the_encoder_follows_from_the_shares(tmp_path: Path) -> None:
    # Attention is a third of the encoder's baseline and falls to 0.1; the other two thirds stay.
    shares = {"adapted": 0.05, "attention": 0.1, "encoder": 0.1 / 3 + 2 / 3, "model": 0.1 / 4 + 3 / 4}
    run = record(tmp_path, relative_bops=shares)
    assert figures.unadapted_share(run, "attention") == 0
    assert figures.unadapted_share(run, "encoder") == pytest.approx(2 / 3)
    assert figures.unadapted_share(run, "model") == pytest.approx(3 / 4)


def test_with_the_feed_forward_adapted_only_what_lies_outside_the_blocks_is_unadapted(tmp_path: Path) -> None:
    shares = {"adapted": 0.1, "attention": 0.2, "encoder": 0.2, "model": 0.6}
    run = record(tmp_path, names=LLAMA, relative_bops=shares)
    assert figures.unadapted_share(run, "encoder") == 0
    assert figures.unadapted_share(run, "model") == pytest.approx(0.5)


def test_shares_that_contradict_an_unchanged_rest_draw_no_rest(tmp_path: Path) -> None:
    run = record(tmp_path, relative_bops={"attention": 0.5, "encoder": 0.4, "model": 1.2})
    assert figures.unadapted_share(run, "encoder") == 0
    assert figures.unadapted_share(run, "model") == 0
    assert figures.cost_figure(run) is not None


def test_phases_become_spans_without_gaps() -> None:
    history = [{"step": s, "phase": p} for s, p in ((10, 0), (20, 0), (30, 1), (40, 1), (50, 2))]
    assert training_figures.phase_spans(history) == [(0, 0.0, 20), (1, 20, 40), (2, 40, 50)]


def test_a_resumed_run_keeps_the_later_entry_of_a_step() -> None:
    history = [{"step": 20.0, "loss": 3.0}, {"step": 10.0, "loss": 1.0}, {"step": 20.0, "loss": 2.0}]
    assert training_figures.series(history, "loss") == ([10.0, 20.0], [1.0, 2.0])


def test_gate_curves_are_the_logged_ones(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", make_metrics())
    history = read_history(folder)
    figure = training_figures.gates_figure(read_run(folder), history)
    assert figure is not None
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["Bit-widths", "Gates open", "Ranks", "Bit operations of attention"]
    weight = next(line for line in figure.axes[0].lines if line.get_label() == "$W_0$")
    np.testing.assert_array_equal(weight.get_ydata(), [e["bits/weight"] for e in history if "bits/weight" in e])
    assert [line.get_label() for line in figure.axes[2].lines[:4] if line.get_label()[0] != "_"]
    shown = {text.get_text() for text in figure.axes[0].texts}
    assert shown == {"warm-up", "gates learn", "frozen"}


def test_modes_with_one_half_draw_one_half(tmp_path: Path) -> None:
    ranks_only = [{k: v for k, v in e.items() if "bits" not in k and "gates" not in k} for e in make_history()]
    metrics = make_metrics()
    for layer in metrics["layers"]:
        layer["bits"] = dict.fromkeys(layer["bits"], 32)
    run = read_run(write_run(tmp_path / "ra", metrics, ranks_only))
    assert figures.bits_figure(run) is None
    assert figures.rank_figure(run) is not None
    figure = training_figures.gates_figure(run, ranks_only)
    assert figure is not None and [axes.get_title(loc="left") for axes in figure.axes] == ["Ranks"]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_never_moved_is_not_drawn(tmp_path: Path, method: str) -> None:
    folder = write_run(tmp_path / "run", make_metrics(method))
    run, history = read_run(folder), read_history(folder)
    assert figures.rank_figure(run) is None
    assert figures.bits_figure(run) is None
    assert training_figures.gates_figure(run, history) is None
    assert figures.cost_figure(run) is not None
    assert training_figures.calibration_figure(run) is not None
    assert training_figures.loss_figure(run, history) is not None


def test_calibration_error_and_interval_known_answers(tmp_path: Path) -> None:
    bins = [
        {"lower": 0.0, "upper": 0.5, "count": 0, "confidence": None, "accuracy": None},
        {"lower": 0.5, "upper": 0.75, "count": 1, "confidence": 0.7, "accuracy": 1.0},
        {"lower": 0.75, "upper": 1.0, "count": 3, "confidence": 0.9, "accuracy": 2 / 3},
    ]
    run = record(tmp_path, reliability={"bins": bins}, scores={"accuracy": 0.75})
    expected = (1 * 0.3 + 3 * (0.9 - 2 / 3)) / 4
    assert run.reliability.ece == pytest.approx(expected)
    figure = training_figures.calibration_figure(run)
    assert figure is not None and figure.axes[0].get_title(loc="left") == "ECE 0.250  (3 bins)"
    # Wilson, 10 of 10 at 95 %: n / (n + z²).
    low, high = training_figures.wilson_interval(1.0, 10)
    assert (low, high) == (pytest.approx(10 / (10 + 1.959964**2)), pytest.approx(1.0))


def test_a_png_has_exactly_the_stated_size_and_equal_data_give_equal_bytes(tmp_path: Path) -> None:
    run = record(tmp_path)
    figure, again = figures.cost_figure(run), figures.cost_figure(run)
    assert figure is not None and again is not None
    content = png_bytes(figure)
    with Image.open(io.BytesIO(content)) as image:
        image.verify()
        assert image.format == "PNG"
        assert image.size == tuple(int(inches * DPI) for inches in figure.get_size_inches())
    assert content == png_bytes(again)


def test_drawing_leaves_the_callers_settings_and_pyplot_alone(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    loaded = "matplotlib.pyplot" in sys.modules
    figure = figures.rank_figure(record(tmp_path))
    assert figure is not None
    png_bytes(figure)
    assert dict(matplotlib.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == loaded

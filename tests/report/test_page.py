"""The HTML report: complete, self-contained, escaped, and clear about bad input."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bayeslora.errors import BayesLoraError
from bayeslora.report import write_report
from bayeslora.report.style import DPI
from tests.report.synthetic import make_metrics, write_run


class Reader(HTMLParser):
    """Collects text, and every attribute that could make a browser fetch something."""

    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "data", "action", "poster")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read_page(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    return reader


@pytest.fixture(scope="module")
def blora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path], dict[str, Any]]:
    """One full report, drawn once: its folder, the files written, and the metrics it was made from."""
    metrics = make_metrics(scores_test={"accuracy": 0.8123})
    folder = write_run(tmp_path_factory.mktemp("blora"), metrics)
    return folder, write_report(folder), metrics


def bare(**changes: Any) -> dict[str, Any]:
    """Metrics of a run that has nothing to draw."""
    return make_metrics("lora", **{"relative_bops": {}, "reliability": None} | changes)


Blora = tuple[Path, list[Path], dict[str, Any]]


def test_a_blora_run_gives_six_figures_and_a_page_that_holds_them(blora: Blora) -> None:
    folder, written, _ = blora
    names = ["ranks.png", "bits.png", "gates.png", "cost.png", "calibration.png", "loss.png", "report.html"]
    assert [path.name for path in written] == names
    assert sorted(p.name for p in folder.iterdir()) == sorted([*names, "metrics.json", "history.json"])
    page = read_page(folder / "report.html")
    assert len(page.references) == 6
    for reference, name in zip(page.references, names, strict=False):
        header, _, content = reference.partition(",")
        assert header == "data:image/png;base64"
        assert base64.b64decode(content, validate=True) == (folder / name).read_bytes()
        with Image.open(io.BytesIO(base64.b64decode(content))) as image:
            image.load()
            assert 3.4 * DPI <= image.width <= 7 * DPI and image.height <= 10 * DPI


def test_the_page_fetches_nothing(blora: Blora) -> None:
    folder, _, _ = blora
    html = (folder / "report.html").read_text(encoding="utf-8")
    without_images = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", html)
    assert not re.search(r"https?:|//[a-z]|url\(|@import|<script|<link|<iframe", without_images)
    assert all(reference.startswith("data:") for reference in read_page(folder / "report.html").references)


def test_the_page_shows_the_runs_numbers(blora: Blora) -> None:
    folder, _, metrics = blora
    text = " ".join(read_page(folder / "report.html").text)
    wanted = ["B-LoRA on rotten_tomatoes", "0.8420", "0.8123", "18.4 %", "73.3 %", "112,128", "4 min 11 s", "seed 0"]
    assert [shown for shown in wanted if shown not in text] == []
    assert all(layer["name"] in text for layer in metrics["layers"])


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        ("lora", "Rank 8 in all 18 matrices, nothing quantized: 32 bits throughout."),
        ("full", "All weights were trained at 32 bits, without an adapter"),
    ],
)
def test_baselines_get_a_shorter_report_and_no_picture_of_an_earlier_one(
    tmp_path: Path, method: str, sentence: str
) -> None:
    folder = write_run(tmp_path / "run", make_metrics(method))
    (folder / "ranks.png").write_bytes(b"another run's")
    written = write_report(folder)
    assert [path.name for path in written] == ["cost.png", "calibration.png", "loss.png", "report.html"]
    assert not (folder / "ranks.png").exists()
    assert sentence in " ".join(read_page(folder / "report.html").text)


def test_a_regression_run_without_reliability_or_history_still_has_a_report(tmp_path: Path) -> None:
    scores = {"mse": 0.7, "pearson": 0.88, "spearman": 0.87}
    metrics = make_metrics(task="stsb", scores=scores, reliability={"bins": []})
    folder = write_run(tmp_path / "run", metrics, [])
    assert [path.name for path in write_report(folder)] == ["ranks.png", "bits.png", "cost.png", "report.html"]
    assert "Pearson correlation (headline)" in " ".join(read_page(folder / "report.html").text)


def test_text_from_outside_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>&\"'"
    metrics = bare(
        task=evil, model=evil, versions={evil: evil}, labels=[evil, "b"], confusion=[[5, 1], [2, 7]],
        names=[f"encoder.layer.0.{evil}"], scores={"accuracy": 0.5, evil: 0.1},
    )  # fmt: skip
    folder = write_run(tmp_path / "run", metrics, [])
    assert [path.name for path in write_report(folder)] == ["report.html"]
    page = read_page(folder / "report.html")
    assert "script" not in page.tags
    assert "".join(page.text).count(evil) >= 5


def without(key: str) -> dict[str, Any]:
    metrics = make_metrics()
    del metrics[key]
    return metrics


def with_layer(**changes: Any) -> dict[str, Any]:
    metrics = make_metrics()
    metrics["layers"][3] |= changes
    return metrics


@pytest.mark.parametrize(
    ("metrics", "named"),
    [
        (["a list"], "list"),
        (without("scores"), "'scores'"),
        (without("method"), "'method'"),
        (without("layers"), "'layers'"),
        (make_metrics(scores={}), "'scores'"),
        (make_metrics(scores={"accuracy": "high"}), "'scores.accuracy'"),
        (make_metrics(relative_bops=[0.1]), "'relative_bops'"),
        (make_metrics(seed=1.5), "'seed'"),
        (with_layer(rank=-1), "'layers[3].rank'"),
        (with_layer(rank=9), "'layers[3].initial_rank'"),
        (with_layer(bits={"A": "four"}), "'layers[3].bits.A'"),
        (with_layer(name=None), "'layers[3].name'"),
        (make_metrics(reliability={"bins": [{"count": 3}]}), "'reliability.bins[0].lower'"),
        (make_metrics(reliability={"bins": [{"lower": 0, "upper": 1, "count": -1}]}), "'reliability.bins[0].count'"),
        (
            make_metrics(reliability={"bins": [{"lower": 0, "upper": 1, "count": 3}]}),
            "'reliability.bins[0].confidence'",
        ),
        (make_metrics(confusion=[[1, 2]]), "'confusion'"),
    ],
)
def test_malformed_metrics_are_one_sentence_and_nothing_is_written(tmp_path: Path, metrics: Any, named: str) -> None:
    folder = write_run(tmp_path / "run", metrics)
    with pytest.raises(BayesLoraError) as caught:
        write_report(folder)
    message = str(caught.value)
    assert named in message and "metrics.json" in message and "\n" not in message
    assert sorted(path.name for path in folder.iterdir()) == ["history.json", "metrics.json"]


@pytest.mark.parametrize("content", ["{", "", "[1, 2]", '{"step": 1}', "\udcff"])
def test_a_damaged_history_is_said_so(tmp_path: Path, content: str) -> None:
    folder = write_run(tmp_path / "run", make_metrics())
    (folder / "history.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(BayesLoraError, match=r"history\.json"):
        write_report(folder)


def test_a_folder_without_a_run_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(BayesLoraError, match="name the output folder of a finished `bayeslora train`"):
        write_report(tmp_path / "nowhere")


def test_numbers_that_are_none_are_dashes(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", bare(scores={"accuracy": 0.5, "nll": float("nan"), "ece": None}), [])
    write_report(folder)
    words = " ".join(read_page(folder / "report.html").text).split()
    assert "0.5000" in words and "–" in words and "nan" not in words


def test_a_posterior_shows_by_matrix_how_far_it_has_left_its_prior(tmp_path: Path) -> None:
    metrics = make_metrics("lora")
    first, *others = (layer["name"] for layer in metrics["layers"])
    widths = {name: {"mean": 0.5, "low": 0.25, "median": 0.75, "high": 1.0} for name in others}
    widths[first] = {"mean": 0.111, "low": 0.022, "median": 0.133, "high": 0.444}
    folder = write_run(tmp_path, {**metrics, "posterior": widths})
    write_report(folder)
    text = " ".join(read_page(folder / "report.html").text)
    assert "posterior by prior deviation, mean" in text
    row = text[text.index(first) :][:200].split()
    assert [cell for cell in row if cell.startswith("0.")][:4] == ["0.111", "0.022", "0.133", "0.444"]
    write_report(write_run(tmp_path / "plain", metrics))
    assert "posterior" not in " ".join(read_page(tmp_path / "plain" / "report.html").text)

"""The HTML report: complete, self-contained, escaped, and clear about bad input."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bayeslora.errors import BayesLoraError
from bayeslora.report import write_report
from bayeslora.report.style import CELL_INK, DPI, INK, PAPER
from tests.report.synthetic import make_metrics, write_run


class Reader(HTMLParser):
    """Collects text, and every attribute that could make a browser fetch something."""

    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []
        self.heading = ""
        self.tags: list[str] = []
        self.text: list[str] = []
        self.figures: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "figure":
            self.figures.append(self.heading)
        self.heading = dict(attrs).get("id") or self.heading if tag in ("h2", "h3") else self.heading
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
    assert page.figures == ["calibration", "ranks", "bits", "gates", "cost", "loss"]
    for name in names[:-1]:
        with Image.open(folder / name) as image:
            image.load()
            assert 3.4 * DPI <= image.width <= 7 * DPI and image.height <= 10 * DPI


def test_every_id_is_there_once_and_every_reference_leads_to_one(blora: Blora) -> None:
    """Figures share a page: markers and clip paths of one must not be those of another."""
    folder, _, _ = blora
    html = (folder / "report.html").read_text(encoding="utf-8")
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) > 50 and len(ids) == len(set(ids))
    assert {*re.findall(r"url\(#([^)]+)\)", html), *re.findall(r'href="#([^"]+)"', html)} <= set(ids)


def test_a_wide_figure_has_a_second_form_for_narrow_screens(blora: Blora) -> None:
    folder, _, _ = blora
    html = (folder / "report.html").read_text(encoding="utf-8")
    widths = {name: [] for name in ("any", "wide", "slim")}  # type: dict[str, list[int]]
    for kind, width in re.findall(r'<div class="(any|wide|slim)" style="max-width:(\d+)px"', html):
        widths[kind].append(int(width))
    assert len(widths["any"]) == 2 and len(widths["wide"]) == len(widths["slim"]) == 4
    assert max(widths["slim"]) <= 3.7 * 96 * 1.25 and max(widths["any"]) < 500 < min(widths["wide"])


def test_ink_and_paper_of_the_figures_are_the_pages(blora: Blora) -> None:
    """On a dark page black text would vanish; text on coloured cells stays as it is."""
    folder, _, _ = blora
    html = (folder / "report.html").read_text(encoding="utf-8")
    drawn = html[html.index("<svg") :]
    assert INK not in drawn and PAPER not in drawn and CELL_INK in drawn
    variables = set(re.findall(r"var\(--([a-z-]+)\)", html))
    light, dark = (set(re.findall(r"--([a-z-]+):", rule)) for rule in re.findall(r":root {(.*?)}", html, re.DOTALL))
    assert variables - {"share", "cell"} <= light and light - dark == {"good", "bad"}


def test_the_page_fetches_nothing(blora: Blora) -> None:
    folder, _, _ = blora
    html = (folder / "report.html").read_text(encoding="utf-8")
    image = "data:image/png;base64,"  # of a colour bar
    without_images = re.sub(image + "[A-Za-z0-9+/=\n]+", "", html)
    assert not re.search(r"https?:|//[a-z]|url\((?!#)|@import|<script|<link|<iframe|<img|<!--", without_images)
    assert all(reference.startswith(("#", image)) for reference in read_page(folder / "report.html").references)


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


def example(row: int, text: str, label: str, predicted: str) -> dict[str, Any]:
    return {"row": row, "texts": {"text": text}, "label": label, "predicted": predicted, "confidence": 0.5 + row / 100,
            "of_label": 0.25, "mutual_information": 0.125}  # fmt: skip


def verdict_of(risk: float, coverage: float) -> dict[str, Any]:
    interval = {"mean": 0.2, "low": 0.1, "high": 0.3}
    chosen = {"risk": risk, "confidence": 0.8125, "coverage": coverage, "errors": 0.0375}
    return {"gain": interval, "overconfidence": interval, "thresholds": [chosen]}


def test_the_page_begins_with_the_verdict_and_shows_rows_with_their_texts_escaped(tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)> & `code`"
    metrics = bare(
        rows=200, labels=[evil, "fresh"], confusion=[[90, 30], [20, 60]], verdict=verdict_of(0.05, 0.4),
        scores={"accuracy": 0.75}, baseline={"accuracy": 0.6}, task="a `task`",
    )  # fmt: skip
    folder = write_run(tmp_path / "run", metrics, [])
    rows = {"least_certain": [example(7, evil, evil, "fresh")], "wrongest": [example(9, "", "fresh", evil)]}
    (folder / "examples.json").write_text(json.dumps(rows), encoding="utf-8")
    write_report(folder)
    page = read_page(folder / "report.html")
    text = " ".join(" ".join(page.text).split())
    assert "img" not in page.tags and text.count(evil.replace("`code`", "")) >= 6
    order = ["Better than a constant", "constant 0.600", "Rows and labels", "Which rows to hand", "Rows to look at"]
    assert sorted(order, key=text.index) == order
    assert "row 7" in text and "row 9" in text and "(empty)" in text and "mutual information 0.125" in text
    assert "0.818 0.750 0.783" in text, "precision 90/110, recall 90/120 and F1 of the first class"
    assert "120 of 200 0.812" in text and "3.8 %" in text


def test_many_classes_are_listed_by_their_confusions(tmp_path: Path) -> None:
    labels = [f"intent {number}" for number in range(40)]
    confusion = [[5 if i == j else 2 if j == i + 1 else 0 for j in range(40)] for i in range(40)]
    confusion[3][9] = 4
    folder = write_run(tmp_path / "run", bare(labels=labels, confusion=confusion), [])
    write_report(folder)
    text = " ".join(" ".join(read_page(folder / "report.html").text).split())
    assert "Confusion matrix" not in text
    assert text.index("intent 3 intent 9 4") < text.index("intent 0 intent 1 2")
    assert "intent 39" in text

"""The HTTP example: it answers what `predict` answers, keeps its limits, and outlives whatever it is sent."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import bayeslora
from tests.cli.conftest import review_rows, write_jsonl
from tests.examples.finished_run import make_run

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
from fastapi.testclient import TestClient  # noqa: E402

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "serve.py"
SAMPLES, SEED = 4, 3


def _script() -> Any:
    spec = importlib.util.spec_from_file_location("example_serve", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


serve = _script()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_bert_folder: Path) -> Path:
    return make_run(tmp_path_factory.mktemp("serve") / "run", tiny_bert_folder)


@pytest.fixture(scope="module")
def client(run: Path) -> Any:
    classifier = serve.Classifier(run, SAMPLES, SEED)
    app = serve.create_app(classifier, classifier.threshold(None, 0.3, 100), serve.Limits(texts=8, characters=80))
    with TestClient(app) as found:
        yield found


def test_each_answer_is_what_predict_says_about_the_text_alone(client: Any, run: Path) -> None:
    texts = [str(row["text"]) for row in review_rows(24, seed=5)] + ["the cat sat on the mat , far from the red house"]
    loaded = bayeslora.load(run)
    model, tokenizer, info = loaded.model, loaded.tokenizer, loaded.info
    requests = [texts[:1], texts[1:8], texts[8:12], texts[12:13], texts[13:20], texts[20:]]
    with ThreadPoolExecutor(6) as pool:
        replies = list(pool.map(lambda part: client.post("/predict", json={"texts": part}), requests))
    assert [reply.status_code for reply in replies] == [200] * 6
    answers = [answer for reply in replies for answer in reply.json()["predictions"]]
    assert len(answers) == len(texts)
    threshold = client.get("/health").json()["threshold"]["confidence"]
    for text, answer in zip(texts, answers, strict=True):
        batch = tokenizer([text], truncation=True, max_length=16, return_tensors="pt")
        expected = bayeslora.predict(model, dict(batch), samples=SAMPLES, seed=SEED)
        assert answer["label"] == info.labels[int(expected.labels[0])]
        assert answer["probability"] == pytest.approx(float(expected.probabilities.max()), abs=1e-5)
        assert answer["entropy"] == pytest.approx(float(expected.entropy[0]), abs=1e-5)
        assert answer["mutual_information"] == pytest.approx(float(expected.mutual_information[0]), abs=1e-5)
        assert answer["ask_a_human"] == (answer["probability"] <= threshold)
    assert max(answer["mutual_information"] for answer in answers) > 1e-3


def test_an_export_answers_by_itself(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    loaded = bayeslora.load(run)
    texts = [str(row["text"]) for row in review_rows(6, seed=5)]
    batch = dict(loaded.tokenizer(texts, truncation=True, max_length=16, padding=True, return_tensors="pt"))
    bayeslora.export(loaded.model, tmp_path / "onnx", format="onnx", tokenizer=loaded.tokenizer, batch=batch)
    classifier = serve.Classifier(run, export=tmp_path / "onnx")
    assert type(classifier.model).__name__ == "OnnxClassifier"
    assert classifier.threshold(None, 0.3, 100).rows > 0
    expected = bayeslora.predict(loaded.model, batch).probabilities.max(dim=1).values
    answers = classifier.answers([(text,) for text in texts], least=0.0)
    assert [answer["probability"] for answer in answers] == pytest.approx(expected.tolist(), abs=1e-4)
    with pytest.raises(bayeslora.BayesLoraError, match="deterministic"):
        serve.Classifier(run, SAMPLES, export=tmp_path / "onnx")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 422),
        (b"{", 422),
        (b"[]", 422),
        (b"null", 422),
        (b"{}", 422),
        (b'{"texts": "one"}', 422),
        (b'{"texts": []}', 422),
        (b'{"texts": [1]}', 422),
        (b'{"texts": [null]}', 422),
        (b'{"texts": [""]}', 422),
        (b'{"texts": [" "]}', 422),
        (b'{"texts": [["a", "b"]]}', 422),
        (b'{"texts": [["a", "b", "c"]]}', 422),
        (b'{"texts": ["a"], "samples": 99}', 422),
        (b'{"texts": ["\\ud800"]}', 422),
        (b'{"texts": ["\xff\xfe"]}', 422),
        (b"[" * 100_000, 422),
        (json.dumps({"texts": ["a"] * 9}).encode(), 422),
        (json.dumps({"texts": ["a" * 81]}).encode(), 422),
        (json.dumps({"texts": ["a" * 1_000_001]}).encode(), 413),
    ],
)
def test_a_bad_request_is_told_so_in_one_line(client: Any, body: bytes, status: int) -> None:
    reply = client.post("/predict", content=body)
    assert reply.status_code == status
    detail = reply.json()["detail"]
    assert isinstance(detail, str) and 0 < len(detail) < 300 and "\n" not in detail
    assert client.post("/predict", json={"texts": ["good"]}).status_code == 200


def test_other_paths_and_methods_are_refused(client: Any) -> None:
    assert client.get("/predict").status_code == 405
    assert client.get("/nowhere").status_code == 404
    assert client.get("/health").json()["status"] == "ok"


def test_pairs_are_lists_of_two(tmp_path: Path, tiny_bert_folder: Path) -> None:
    classifier = serve.Classifier(make_run(tmp_path / "run", tiny_bert_folder, pairs=True))
    with TestClient(serve.create_app(classifier, classifier.threshold(None, 0.3, 100))) as client:
        reply = client.post("/predict", json={"texts": [["the film was good", "the plot"], ["bad", "cold"]]})
        assert reply.status_code == 200 and len(reply.json()["predictions"]) == 2
        assert client.post("/predict", json={"texts": ["alone"]}).status_code == 422


def own_answers(run: Path, tmp_path: Path, count: int) -> Path:
    """Rows with the run's own answers as labels, but for every tenth of the least confident half."""
    texts = [str(row["text"]) for row in review_rows(count, seed=1)]
    found = bayeslora.load(run).predict(texts, samples=SAMPLES, seed=SEED)
    confidence = found.probabilities.max(dim=1).values
    unsure = confidence < confidence.median()
    rows = [
        {"text": text, "label": {"bad": "good", "good": "bad"}[label] if low and index % 3 == 0 else label}
        for index, (text, label, low) in enumerate(zip(texts, found.labels, unsure.tolist(), strict=True))
    ]
    return write_jsonl(tmp_path / "calibration.jsonl", rows)


def test_the_threshold_is_that_of_risk_control_on_the_file(run: Path, tmp_path: Path) -> None:
    file = own_answers(run, tmp_path, 200)
    classifier = serve.Classifier(run, SAMPLES, SEED)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    chosen = classifier.threshold(file, 0.1, 200)
    assert chosen.rows == 200 and 0.3 < chosen.coverage < 1 and chosen.risk <= 0.1
    probabilities = classifier([(row["text"],) for row in rows]).probabilities.numpy()
    labels = [["bad", "good"].index(row["label"]) for row in rows]
    expected = bayeslora.RiskControl(0.1).fit(probabilities, labels).threshold()
    assert chosen.confidence == pytest.approx(expected.confidence, abs=1e-6)
    answers = classifier.answers([(row["text"],) for row in rows], chosen.confidence)
    wrong = np.array([answer["label"] != row["label"] for answer, row in zip(answers, rows, strict=True)])
    answered = ~np.array([answer["ask_a_human"] for answer in answers])
    assert wrong[answered].mean() <= 0.1 < wrong.mean()  # without the threshold it would not be kept


def test_where_no_threshold_will_do_a_person_is_always_asked(run: Path) -> None:
    """Forty rows cannot show an error rate of 1%."""
    classifier = serve.Classifier(run, SAMPLES, SEED)
    chosen = classifier.threshold(None, 0.01, 100)
    assert chosen.confidence > 1 and chosen.coverage == 0 and chosen.rows == 40
    assert all(answer["ask_a_human"] for answer in classifier.answers([("good",), ("bad",)], chosen.confidence))


def test_the_calibration_in_the_folder_comes_before_the_evaluation_rows(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    made = bayeslora.load(folder).calibrate(own_answers(run, tmp_path, 200), samples=SAMPLES, seed=SEED)
    chosen = serve.Classifier(folder, SAMPLES, SEED).threshold(None, 0.2, 100)
    assert chosen == made.threshold(0.2) and chosen.rows == 200
    with pytest.raises(bayeslora.BayesLoraError, match="samples is 0, but"):
        serve.Classifier(folder, 0, SEED).threshold(None, 0.2, 100)
    made = bayeslora.load(folder).calibrate(
        own_answers(run, tmp_path, 200), samples=SAMPLES, seed=SEED, scaling="temperature"
    )
    classifier = serve.Classifier(folder, SAMPLES, SEED)
    assert classifier.threshold(None, 0.2, 100) == made.threshold(0.2)
    expected = bayeslora.load(folder).predict(["good", "bad"]).probabilities
    torch.testing.assert_close(classifier([("good",), ("bad",)]).probabilities, expected)


class Slow:
    """Stands for a classifier: answers with the number of characters once it is let."""

    samples = 0
    info = SimpleNamespace(text_columns=["text"])

    def __init__(self) -> None:
        self.gate, self.started, self.batches = threading.Event(), threading.Event(), []

    def answers(self, rows: Any, least: float) -> list[int]:
        self.batches.append(len(rows))
        self.started.set()
        assert self.gate.wait(20)
        if any(row == ("fail",) for row in rows):
            raise RuntimeError("broken")
        return [len(row[0]) for row in rows]


ANY = serve.Threshold(0.5, 1.0, 0.0, 1)


def ask(client: Any, *texts: str) -> Any:
    return client.post("/predict", json={"texts": list(texts)})


def threads() -> int:
    """How many threads run models: another module's application may have one."""
    return sum(thread.name == "model" for thread in threading.enumerate())


def wait_for(condition: Any) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_what_comes_in_meanwhile_is_answered_together_and_refused_beyond_the_queue(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slow, submitted, submit = Slow(), [], serve.Batcher.submit
    monkeypatch.setattr(serve.Batcher, "submit", lambda self, rows: (submit(self, rows), submitted.append(rows))[0])
    before = threads()
    app = serve.create_app(slow, ANY, serve.Limits(waiting=4, batch=3))
    with TestClient(app) as client, ThreadPoolExecutor(5) as pool:
        first = pool.submit(ask, client, "a")
        assert slow.started.wait(20)
        others = [pool.submit(ask, client, "b" * n) for n in (2, 3, 4, 5)]
        wait_for(lambda: len(submitted) == 5)
        reply = ask(client, "too many")
        assert reply.status_code == 503 and reply.headers["Retry-After"] == "1"
        slow.gate.set()
        assert first.result().json() == {"predictions": [1]}
        assert [other.result().json()["predictions"] for other in others] == [[2], [3], [4], [5]]
    assert slow.batches == [1, 3, 1]
    assert threads() == before


def test_who_waits_too_long_is_told_and_no_longer_computed_for() -> None:
    slow = Slow()
    with TestClient(serve.create_app(slow, ANY, serve.Limits(seconds=0.2))) as client:
        assert ask(client, "a").status_code == 504
        assert ask(client, "b").status_code == 504
        slow.gate.set()
        assert ask(client, "abc").json() == {"predictions": [3]}
    assert slow.batches == [1, 1]


def test_a_model_that_fails_fails_its_batch_alone() -> None:
    slow = Slow()
    slow.gate.set()
    with TestClient(serve.create_app(slow, ANY), raise_server_exceptions=False) as client:
        assert ask(client, "fail").status_code == 500
        assert ask(client, "fine").json() == {"predictions": [4]}


def test_a_folder_that_is_no_run_ends_with_one_line(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("serve: ")

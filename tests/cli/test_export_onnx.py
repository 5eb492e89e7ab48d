"""`export --format onnx` on finished runs: a folder that its card alone says how to use."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import compress
from pathlib import Path

import numpy as np
import pytest
import torch

import bayeslora
from bayeslora.cli.main import main
from bayeslora.runs.rows import encode_for, labelled_rows
from tests.cli.conftest import review_rows, write_jsonl
from tests.conftest import EMPTY_PNG
from tests.runs.text_runs import chat

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

Refused = Callable[..., str]
TEXTS = [str(row["text"]) for row in review_rows(12, seed=5)]
RUNNER = """
import importlib.abc, json, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("bayeslora", "torch", "transformers", "peft"):
            raise AssertionError(f"the card imports {name}")

sys.meta_path.insert(0, Refuse())
names = {}
exec(sys.argv[1], names)
print(json.dumps(names["logits"](json.loads(sys.argv[2])).tolist()))
"""


def _answers_of_card(folder: Path) -> list[int]:
    """Do what the card's program does, in an environment with neither this library nor torch."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, code, json.dumps(TEXTS)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *printed, logits = done.stdout.strip().splitlines()
    assert len(printed) == 2  # its own examples
    return [max(range(len(row)), key=row.__getitem__) for row in json.loads(logits)]


@pytest.mark.parametrize("method", ["lora", "blora", "melora"])
def test_the_card_alone_gives_the_answers_of_the_run(
    method: str, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "onnx"
    capsys.readouterr()
    assert main(["export", str(runs[method]), "--format", "onnx", "--output-dir", str(target), "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    own = bayeslora.load(runs[method]).predict(TEXTS)
    margin = 0.002 if method == "blora" else 0.0  # its other layers are rounded, and the run has hardly learned
    decided = [abs(row.probabilities[0] - 0.5) > margin for row in own]
    answers = [max(range(2), key=row.probabilities.__getitem__) for row in own]
    pairs = list(compress(zip(_answers_of_card(target), answers, strict=True), decided))
    assert len(pairs) >= 8 and all(found == expected for found, expected in pairs)
    assert {path.name for path in target.iterdir()} == {
        "README.md",
        "config.json",
        "digests.json",
        "export.json",
        "model.onnx",
        "run.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for path in target.iterdir():  # nothing says where they were made
        content = path.read_bytes()
        assert str(tmp_path.parent).encode() not in content and str(Path.home()).encode() not in content
        assert b"/tmp/" not in content
    assert measured["file_bytes"] == (target / "model.onnx").stat().st_size and measured["rows"] == 32
    card = (target / "README.md").read_text(encoding="utf-8")
    assert f"{measured['changed']:.2%} of the answers change" in card and f"`{method}`" in card
    if method != "blora":
        assert measured["changed"] == 0 and measured["max_output_error"] < 1e-4


def test_a_graph_is_loaded_and_used_like_the_run(
    runs: dict[str, Path], tmp_path: Path, refused: Refused, capfd: pytest.CaptureFixture[str]
) -> None:
    target, rows = tmp_path / "onnx", write_jsonl(tmp_path / "rows.jsonl", review_rows(12, seed=5))
    assert main(["export", str(runs["lora"]), "--format", "onnx", "--output-dir", str(target)]) == 0
    run, graph = bayeslora.load(runs["lora"]), bayeslora.load(target)
    assert (graph.kind, graph.labels, graph.method) == (run.kind, run.labels, "full")
    for found, expected in zip(graph.predict(TEXTS), run.predict(TEXTS), strict=True):
        assert found.label == expected.label
        assert found.probabilities == pytest.approx(expected.probabilities, abs=1e-5)

    capfd.readouterr()
    scores = []
    for folder in (target, runs["lora"]):
        assert main(["evaluate", str(folder), "--eval-file", str(rows), "--json"]) == 0
        scores.append(json.loads(capfd.readouterr().out)["scores"])
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    predict = ["predict", target, "--input", rows, "--output", tmp_path / "found.jsonl"]
    assert "--samples is 2, but the model" in refused(*predict, "--samples", "2")
    assert "--eval-file" in refused("evaluate", target)  # where the rows were is not in the folder
    assert "the format onnx, which is on one device: leave it out" in refused(*predict, "--device-map", "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", None)
        patch.delitem(sys.modules, "bayeslora.export.onnx.reader")
        assert "onnxruntime is not installed, but format onnx needs it" in refused(*predict)
    of_run = (target / "run.json").read_bytes()
    (target / "run.json").unlink()  # which an export from Python lacks
    assert [row.label for row in bayeslora.load(target).predict(TEXTS)] == [row.label for row in run.predict(TEXTS)]
    (target / "run.json").write_bytes(of_run)
    (target / "model.onnx").write_bytes((target / "model.onnx").read_bytes() + b"\0")
    assert "model.onnx is not the file that was saved here" in refused(*predict)


def test_without_training_rows_the_inputs_of_unadapted_layers_stay_float32(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in runs["blora"].iterdir():
        if path.is_file():
            (moved / path.name).write_bytes(path.read_bytes())
    info = json.loads((moved / "run.json").read_text())
    (moved / "run.json").write_text(json.dumps({**info, "files": {"train_file": "gone.jsonl"}}))
    capsys.readouterr()
    assert main(["export", str(moved), "--format", "onnx", "--output-dir", str(tmp_path / "out"), "--json"]) == 0
    printed = capsys.readouterr()
    assert "dummy inputs" in printed.err and json.loads(printed.out)["unadapted"] == "int8 weights"


@pytest.fixture(scope="module")
def writers(tmp_path_factory: pytest.TempPathFactory, tiny_causal_folder: Path) -> dict[str, Path]:
    """Runs of a language model."""
    folder = tmp_path_factory.mktemp("language")
    rows = write_jsonl(folder / "chat.jsonl", chat(30))
    for method, steps in (("lora", "2"), ("blora", "20")):
        files = ["--model", str(tiny_causal_folder), "--train-file", str(rows)]
        options = ["--max-steps", steps, "--learning-rate", "0.02", "--r", "4", "--target-modules", "q_proj,up_proj"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("bayeslora.report.page.png_bytes", lambda figure: EMPTY_PNG)
            assert main(["train", "--method", method, *files, *options, "--output-dir", str(folder / method)]) == 0
    return {method: folder / method for method in ("lora", "blora")}


def _logits_of_graph(folder: Path, ids: list[int]) -> np.ndarray:
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    feeds = {
        each.name: np.zeros((1, each.shape[1], 0, each.shape[3]), dtype=np.float32)
        for each in session.get_inputs()
        if each.name.startswith("past_key_values")
    }
    rows = {"input_ids": ids, "attention_mask": [1] * len(ids), "position_ids": list(range(len(ids)))}
    feeds |= {name: np.array([row], dtype=np.int64) for name, row in rows.items()}
    return session.run(["logits"], feeds)[0][0].astype(np.float64)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits - logits.max(1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


@pytest.mark.parametrize("method", ["lora", "blora"])
def test_the_graph_of_a_decoder_is_verified_token_by_token(
    method: str, writers: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As exported, and after its weights were changed by hand: every figure again in numpy."""
    out, run = tmp_path / "out", writers[method]
    command = ["export", str(run), "--format", "onnx", "--allow-error", "--output-dir", str(out), "--json"]
    assert main(command) == 0
    measured = json.loads(capsys.readouterr().out)
    file = write_jsonl(tmp_path / "rows.jsonl", chat(5))
    command = ["verify", str(out), "--against", str(run), "--rows", str(file), "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["format"] == "onnx" and found["metric"] == "nll" and found["rows"] == 5
    assert found["divergence"] <= 2 * max(measured["divergence"], 5e-5)
    if method == "lora":
        assert found["changed"] == 0 and found["max_divergence"] < 1e-6
        assert found["score_after"] == pytest.approx(found["score_before"], abs=1e-5)

    graph = onnx.load(out / "model.onnx")
    largest = max(graph.graph.initializer, key=lambda each: onnx.numpy_helper.to_array(each).size)
    values = onnx.numpy_helper.to_array(largest)
    largest.CopyFrom(onnx.numpy_helper.from_array(np.roll(values, 1, axis=0), largest.name))
    onnx.save(graph, out / "model.onnx")
    assert main(command) == 1
    found = json.loads(capsys.readouterr().out)
    loaded = bayeslora.load(run)
    task = labelled_rows(loaded.info, file)
    encoded = encode_for(task.splits["validation"], task, loaded.tokenizer, loaded.info)
    divergences, changes, losses = [], [], []
    for ids in encoded["input_ids"]:
        with torch.no_grad():
            own = loaded.model(input_ids=torch.tensor([ids])).logits[0].double().numpy()
        before, after = _log_softmax(own), _log_softmax(_logits_of_graph(out, ids))
        divergences += list((np.exp(before) * (before - after)).sum(1))
        changes += list(before.argmax(1) != after.argmax(1))
        losses += [[each[place, token] for each in (before, after)] for place, token in enumerate(ids[1:])]
    assert not found["agrees"] and found["answers"] == len(divergences) > 50
    assert found["divergence"] == pytest.approx(np.mean(divergences), rel=1e-4, abs=2e-7)
    assert found["max_divergence"] == pytest.approx(max(divergences), rel=1e-4, abs=2e-7)
    assert found["changed"] == np.mean(changes) > 0
    expected = -np.mean(losses, axis=0)
    assert [found["score_before"], found["score_after"]] == pytest.approx(list(expected), rel=1e-4)


def test_a_graph_is_verified_against_a_run_of_its_kind(
    runs: dict[str, Path], writers: dict[str, Path], tmp_path: Path, refused: Refused
) -> None:
    for source, other in ((runs["lora"], writers["lora"]), (writers["lora"], runs["lora"])):
        folder = tmp_path / source.parent.name
        assert main(["export", str(source), "--format", "onnx", "--output-dir", str(folder)]) == 0
        said = refused("verify", folder, "--against", other)
        assert "give its own run" in said and ("has the graph of a classifier" in said) == (source == runs["lora"])


def test_a_graph_generates_what_its_run_generates(writers: dict[str, Path], tmp_path: Path) -> None:
    folder, run = tmp_path / "onnx", writers["lora"]
    assert main(["export", str(run), "--format", "onnx", "--output-dir", str(folder)]) == 0
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "Hello"}, {"prompt": "The film was"}])
    answers = []
    for each in (run, folder):
        written = tmp_path / f"{each.name}-answers.jsonl"
        command = ["generate", str(each), "--input", str(prompts), "--output", str(written), "--max-new-tokens", "6"]
        assert main(command) == 0
        answers.append([json.loads(line) for line in written.read_text(encoding="utf-8").splitlines()])
    of_run, of_graph = answers
    assert [row["text"] for row in of_graph] == [row["text"] for row in of_run]

"""`verify` says how far an export's answers are from its run's, and exits with 1 where that is too far."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import bayeslora
from bayeslora.cli.main import main
from bayeslora.runs.digests import DIGESTS_FILE
from tests.cli.conftest import Setting, review_rows, write_jsonl

Refused = Callable[..., str]


def _verified(capsys: pytest.CaptureFixture[str], folder: Path, run: Path, *options: object) -> tuple[int, dict]:
    capsys.readouterr()
    status = main(["verify", str(folder), "--against", str(run), *map(str, options), "--json"])
    return status, json.loads(capsys.readouterr().out)


def _exported(run: Path, target: Path, form: str, *options: str) -> Path:
    assert main(["export", str(run), "--format", form, *options, "--output-dir", str(target)]) == 0
    return target


@pytest.mark.parametrize(
    ("method", "form"),
    [("melora", "merged"), ("melora", "lora"), ("melora", "packed"), ("blora", "packed"), ("blora", "integer")],
)
def test_exports_agree_with_their_run(
    method: str, form: str, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _exported(runs[method], tmp_path / "out", form)
    status, found = _verified(capsys, folder, runs[method])
    assert status == 0 and found["agrees"] and found["format"] == form
    assert found["rows"] == found["answers"] == 20 and found["metric"] == "accuracy"
    record = json.loads((folder / "export.json").read_text())
    assert record["format"] == form and record["tolerance"] == found["tolerance"] >= 1e-4
    if form in ("packed", "merged", "lora"):
        assert found["changed"] == 0 and found["divergence"] < 1e-9 and found["score_before"] == found["score_after"]


def test_onnx_agrees(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    folder = _exported(runs["melora"], tmp_path / "out", "onnx")
    status, found = _verified(capsys, folder, runs["melora"])
    assert status == 0 and found["format"] == "onnx" and found["divergence"] < 1e-8


def test_figures_are_those_of_the_probabilities(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of an export whose classifier was changed by hand: every figure again from the two models' predictions."""
    folder = _exported(runs["melora"], tmp_path / "out", "lora")
    weights = load_file(folder / "adapter_model.safetensors")
    (bias,) = (name for name in weights if name.endswith("classifier.bias"))
    weights[bias] = weights[bias] + np.array([0.0, 0.7], dtype=np.float32)
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / DIGESTS_FILE).unlink()
    rows = review_rows(40, seed=8)
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    status, found = _verified(capsys, folder, runs["melora"], "--rows", file)
    before, after = (
        np.array([row.probabilities for row in bayeslora.load(each).predict([str(row["text"]) for row in rows])])
        for each in (runs["melora"], folder)
    )
    divergences = (before * np.log(before / after)).sum(1)
    assert status == 1 and not found["agrees"] and found["rows"] == 40 and found["rows_of"] == str(file)
    assert found["divergence"] == pytest.approx(divergences.mean(), rel=1e-4)
    assert found["max_divergence"] == pytest.approx(divergences.max(), rel=1e-4)
    assert found["changed"] == (before.argmax(1) != after.argmax(1)).mean()
    labels = np.array([row["label"] for row in rows])
    assert found["score_before"] == (before.argmax(1) == labels).mean()
    assert found["score_after"] == (after.argmax(1) == labels).mean()
    assert main(["verify", str(folder), "--against", str(runs["melora"]), "--max-divergence", "1"]) == 0
    printed = capsys.readouterr().out
    assert "agrees" in printed and "(at most 1)" in printed and f"{found['changed']:.2%}" in printed
    options = ["--max-divergence", "1", "--max-changed", "0", "--limit", "10"]
    status, some = _verified(capsys, folder, runs["melora"], "--rows", file, *options)
    assert some["rows"] == 10 and status == int(some["changed"] > 0)


def test_wrong_input_is_refused(runs: dict[str, Path], setting: Setting, tmp_path: Path, refused: Refused) -> None:
    drawn = tmp_path / "drawn"
    assert main(["export", str(runs["melora"]), "--format", "lora", "--draws", "2", "--output-dir", str(drawn)]) == 0
    assert f"holds 2 exports, but must be one: give such as {drawn / 'draw-0'}" in refused(
        "verify", drawn, "--against", runs["melora"]
    )
    folder = _exported(runs["melora"], tmp_path / "out", "lora")
    assert "--against" in refused("verify", folder)
    assert "must be an export" in refused("verify", setting.model.parent / "absent", "--against", runs["melora"])
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "not an export" in refused("verify", empty, "--against", runs["melora"])
    assert "run.json" in refused("verify", folder, "--against", empty)
    against = ["--against", runs["melora"]]
    assert "at least 0" in refused("verify", folder, *against, "--max-divergence", "-1")
    assert "absent.jsonl" in refused("verify", folder, *against, "--rows", tmp_path / "absent.jsonl")
    (folder / "export.json").write_text("{}")
    assert "damaged" in refused("verify", folder, *against)
    shutil.copytree(runs["melora"], tmp_path / "moved")
    info = json.loads((tmp_path / "moved" / "run.json").read_text())
    (tmp_path / "moved" / "run.json").write_text(json.dumps({**info, "files": {}}))
    assert "give --rows" in refused("verify", folder, "--against", tmp_path / "moved")

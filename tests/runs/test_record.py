"""The record of a run: what is written is read back, older files are read, and nothing else is accepted."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bayeslora import describe, load
from bayeslora.files import finite
from bayeslora.runs.record import GateRecord, LayerRecord, ReliabilityBin, RunRecord, read_run
from bayeslora.runs.schema import Mismatch, from_json
from tests.report.synthetic import make_metrics, write_run

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["run-blora", "run-melora"])
def test_a_file_of_an_earlier_version_is_read_and_written_as_it_was(name: str) -> None:
    path = ROOT / "fixtures" / "adapters" / name / "metrics.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    assert finite(RunRecord.from_dict(content).to_dict()) == content
    assert read_run(path.parent).title == {"run-blora": "B-LoRA", "run-melora": "Me-LoRA"}[name]


def test_layers_of_committed_results_are_read() -> None:
    paths = sorted((ROOT.parent / "benchmarks" / "results" / "glue").glob("*.json"))
    layers = [layer for path in paths for layer in json.loads(path.read_text())["layers"]]
    assert len(layers) > 1000 and all(from_json(LayerRecord, layer).name for layer in layers)


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    empty = ReliabilityBin(0.0, 0.5, 0)
    assert math.isnan(empty.accuracy)
    written = RunRecord.from_dict(make_metrics(scores={"accuracy": 0.5, "nll": math.inf}, title="Mine", split="test"))
    written.save(tmp_path)
    read = read_run(tmp_path)
    assert read.scores == {"accuracy": 0.5}, "a number that is not finite is null in the file"
    assert (read.title, read.where, read.layers) == ("Mine", "rotten_tomatoes, test", written.layers)
    assert read.reliability.filled == written.reliability.filled


def test_the_gates_of_a_run_are_those_of_its_adapter_with_the_components_that_were_cut(
    run_of: Callable[[str], Path],
) -> None:
    record, model = read_run(run_of("blora")), load(run_of("blora")).model
    for layer, described in zip(record.layers, describe(model), strict=True):
        assert [gate.gate for gate in layer.gates if gate.kind == "rank"] == list(range(layer.initial_rank))
        for gate, exact in zip(layer.gates, described.to_dict()["gates"], strict=True):
            for name, value in dataclasses.asdict(gate).items():
                rounded = isinstance(exact[name], float)
                assert value == (pytest.approx(exact[name], rel=5e-4, abs=0) if rounded else exact[name])
        assert layer.gates == [GateRecord(**exact) for exact in described.to_dict()["gates"]]
    assert RunRecord.from_dict(record.to_dict()).gates == record.gates


def test_a_gate_that_is_neither_open_nor_closed_is_refused() -> None:
    gate = {"kind": "A", "gate": 4, "is_open": 1, "delta": 0.1, "saving": 0.1, "price": 0.1}
    with pytest.raises(Mismatch, match="'is_open' is 1, but must be true or false"):
        from_json(GateRecord, gate)
    assert from_json(GateRecord, gate | {"is_open": True}).is_sure is None


def test_empty_fields_and_unknown_keys_are_left_out() -> None:
    content = RunRecord.from_dict(
        {"method": "lora", "task": "t", "model": "m", "scores": {"a": 1}, "layers": [], "x": 1}
    )
    assert content.to_dict() == {
        "method": "lora", "task": "t", "model": "m", "scores": {"a": 1.0}, "layers": [], "samples": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": -1}, "'samples' is -1, but must be a whole number of 0 or more"),
        ({"seed": True}, "'seed' is True, but must be a whole number"),
        ({"labels": ["a", 3]}, "'labels[1]' is 3, but must be a text"),
        ({"versions": {"torch": 2.1}}, "'versions.torch' is 2.1, but must be a text"),
        ({"method": ""}, "'method' is '', but must be a name"),
        ({"task": None}, "'task' is missing, but must be a name"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_accepted(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(Mismatch) as caught:
        RunRecord.from_dict(make_metrics() | change)
    assert str(caught.value) == message
    with pytest.raises(ValueError, match=r"metrics\.json: .*: run `bayeslora train` again$"):
        read_run(write_run(tmp_path / "run", make_metrics() | change))

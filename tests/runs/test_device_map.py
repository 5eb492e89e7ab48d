"""`device_map`: a model spread over devices answers and exports like one that is on one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import bayeslora
from bayeslora import BayesLoraError
from bayeslora.cli.main import main
from bayeslora.runs.run import Run
from tests.runs.conftest import tickets

TEXTS = [row["text"] for row in tickets(6, seed=3)]
RunOf = Callable[[str], Path]


class Processor(str):
    """A name of the processor that Accelerate takes for a device of its own."""

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__


FIRST, SECOND = Processor("cpu"), Processor("cpu")
SPREAD: dict[str, str] = {
    "bert.embeddings": FIRST,
    "bert.encoder.layer.0": SECOND,
    "bert.encoder.layer.1": FIRST,
    "bert.pooler": SECOND,
    "dropout": SECOND,
    "classifier": SECOND,
}


def spread(folder: Path, **options: Any) -> Run:
    run = bayeslora.load(folder, device_map=dict(SPREAD), **options)
    hooked = [name for name, module in run.model.named_modules() if hasattr(module, "_hf_hook")]
    assert any("layer.0" in name for name in hooked) and any("layer.1" in name for name in hooked)
    return run


@pytest.mark.parametrize("method", ["melora", "blora", "lora", "full"])
def test_a_spread_model_answers_and_exports_like_one_on_a_device(run_of: RunOf, method: str, tmp_path: Path) -> None:
    samples = 3 if method == "melora" else 0
    plain, run = bayeslora.load(run_of(method)), spread(run_of(method))
    expected = plain.predict(TEXTS, samples=samples).probabilities
    assert torch.equal(run.predict(TEXTS, samples=samples).probabilities, expected)
    if method == "full":
        return
    forms = {
        "melora": {"merged": {}, "lora": {}},
        "blora": {"merged": {"allow_error": True}, "packed": {}, "integer": {}},
        "lora": {"merged": {}},
    }[method]
    for form, options in forms.items():
        for each, name in ((plain, "plain"), (run, "spread")):
            bayeslora.export(each.model, tmp_path / f"{form}-{name}", format=form, **options)
        for file in (tmp_path / f"{form}-plain").glob("*.safetensors"):
            found = load_file(tmp_path / f"{form}-spread" / file.name)
            assert all(torch.equal(tensor, found.pop(name)) for name, tensor in load_file(file).items()) and not found


def test_each_command_takes_a_device_map(run_of: RunOf, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(run_of("melora"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in tickets(6, seed=3)), encoding="utf-8")
    found = []
    for name, where in (("a", []), ("b", ["--device-map", "auto"]), ("c", ["--device-map", "cpu"])):
        answers = tmp_path / f"{name}.jsonl"
        assert main(["predict", folder, "--input", str(rows), "--output", str(answers), *where]) == 0
        found.append(answers.read_bytes())
        export = tmp_path / f"export-{name}"
        assert main(["export", folder, "--format", "merged", "--output-dir", str(export), *where]) == 0
        assert main(["verify", str(export), "--against", folder, *where]) == 0
        capsys.readouterr()
        assert main(["evaluate", folder, "--json", *where]) == 0
        scores = json.loads(capsys.readouterr().out)["scores"]
        found.append(json.dumps(scores).encode())
    assert found[:2] == found[2:4] == found[4:]


@pytest.mark.parametrize("method", ["blora", "full"])
def test_weights_on_disk_are_refused(run_of: RunOf, method: str) -> None:
    with pytest.raises(BayesLoraError, match="device_map leaves bert.encoder.layer.1 of .* outside the devices"):
        bayeslora.load(run_of(method), device_map={**SPREAD, "bert.encoder.layer.1": "disk"})


def test_a_device_that_is_not_there_is_refused(run_of: RunOf) -> None:
    with pytest.raises(BayesLoraError, match="device_map is everywhere, which is no device of this machine: give one"):
        bayeslora.load(run_of("melora"), device_map="everywhere")
    with pytest.raises(BayesLoraError, match="device is cpu and device_map auto, but one of them places the model"):
        bayeslora.load(run_of("melora"), device="cpu", device_map="auto")

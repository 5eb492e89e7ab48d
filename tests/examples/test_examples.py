"""Every script in examples/ runs as its docstring says, on models and data made small through its own options."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import bayeslora
from tests.conftest import build_tiny_bert, build_tiny_tokenizer

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
GOOD, BAD = ("good", "great", "fine", "warm", "funny"), ("bad", "poor", "dull", "cold", "boring")

Main = Callable[[list[str]], dict[str, float]]


def load(name: str) -> Main:
    """The `main` of an example, which is a script and no module of a package."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their annotations up there
    spec.loader.exec_module(module)
    return module.main


def test_every_example_has_a_test() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        "trainer",
        "hand_written_loop",
        "own_method",
        "sft_trainer",
        "chat",
        "serve",
        "optuna_search",
        "mlflow_log",
    }


@pytest.fixture(scope="session")
def lively_bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny BERT with initial weights large enough for a few steps to teach it something."""
    folder = tmp_path_factory.mktemp("lively-bert")
    build_tiny_bert(initializer_range=0.2).save_pretrained(folder)
    build_tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def review_folder(tmp_path: Path) -> Path:
    """SST-2 in the layout of `--data-dir`: a word decides the label, so that a few steps can learn it."""
    folder = tmp_path / "data" / "sst2"
    folder.mkdir(parents=True)
    rows = [
        {"id": i, "text": f"the {thing} was {word}", "label": int(word in GOOD), "label_text": ""}
        for i, (thing, word) in enumerate((t, w) for t in ("film", "plot", "music", "story") for w in GOOD + BAD)
    ]
    for split, times in (("train_sentences", 4), ("train", 4), ("dev", 1), ("test", 1)):
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows * times) + "\n")
    return folder.parent


def classifier_reloads(folder: Path, base: Path) -> None:
    """The saved folder is a B-LoRA adapter that PEFT loads on the base model, and that answers."""
    assert PeftConfig.from_pretrained(folder).peft_type == "BLORA"
    model = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base), folder).eval()
    batch = AutoTokenizer.from_pretrained(folder)(["the film was good"], return_tensors="pt")
    assert math.isclose(bayeslora.predict(model, batch).probabilities.sum().item(), 1.0, abs_tol=1e-6)


def small_classification_options(base: Path, data: Path, out: Path) -> list[str]:
    options = {"model": base, "task": "sst2", "data_dir": data, "output_dir": out, "r": 4, "learning_rate": 0.01}
    options |= {"max_length": 16}
    return [token for name, value in options.items() for token in (f"--{name}", str(value))]


def test_trainer(lively_bert_folder: Path, review_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = small_classification_options(lively_bert_folder, review_folder, out)
    result = load("trainer")([*options, "--max_steps", "40", "--use_cpu", "--disable_tqdm", "true"])
    assert result["eval_accuracy"] > 0.8
    assert 0 < result["attention_bops"] < 1
    classifier_reloads(out, lively_bert_folder)


def test_hand_written_loop(lively_bert_folder: Path, review_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = small_classification_options(lively_bert_folder, review_folder, out)
    result = load("hand_written_loop")([*options, "--steps", "40"])
    assert result["accuracy"] > 0.8
    assert 0 < result["attention_bops"] < 1
    classifier_reloads(out, lively_bert_folder)


def sft_options(out: Path, **options: Any) -> list[str]:
    options = {"output_dir": out, "max_length": 32, **options}
    named = [token for name, value in options.items() for token in (f"--{name}", str(value))]
    return [*named, "--use_cpu", "--disable_tqdm", "true"]


def test_sft_trainer(tiny_causal_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"the film was {word}", "completion": " yes" if word in GOOD else " no"} for word in GOOD + BAD]
    pairs.write_text("\n".join(json.dumps(row) for row in rows * 8) + "\n")
    out = tmp_path / "out"
    options = sft_options(out, model=tiny_causal_folder, train_file=pairs, r=4, max_steps=40, learning_rate=0.02)
    result = load("sft_trainer")(options)
    assert result["last_loss"] < result["first_loss"]
    assert PeftConfig.from_pretrained(out).peft_type == "BLORA"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_causal_folder), out)
    prompt = AutoTokenizer.from_pretrained(out)("the film was good", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=2, do_sample=False).shape[1] > prompt["input_ids"].shape[1]


def test_chat(tiny_causal_folder: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "chat.jsonl", tmp_path / "out"
    rows = [
        [{"role": "user", "content": f"the film was {word}"}, {"role": "assistant", "content": "yes"}]
        for word in GOOD + BAD
    ]
    file.write_text("\n".join(json.dumps({"messages": row}) for row in rows * 4) + "\n")
    options = {"model": tiny_causal_folder, "train_file": file, "output_dir": out, "r": 4, "max_steps": 12}
    named = [token for name, value in options.items() for token in (f"--{name}", str(value))]
    result = load("chat")([*named, "--learning_rate", "0.02", "--logging_steps", "1", "--use_cpu", "--samples", "2"])
    assert result["last_loss"] < result["first_loss"] and result["mutual_information"] > 0
    assert PeftConfig.from_pretrained(out).num_examples == 36 * 2  # a tenth is held out; a word and the end
    assert (out / "answers.html").read_text(encoding="utf-8").count("<article>") == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("trainer", ["--rows", "256", "--max_steps", "20", "--use_cpu", "--disable_tqdm", "true"]),
        ("hand_written_loop", ["--rows", "256", "--steps", "20", "--batch_size", "8"]),
        ("sft_trainer", ["--rows", "64", "--max_steps", "12", "--per_device_train_batch_size", "2", "--use_cpu"]),
    ],
)
def test_the_defaults_run_on_the_packaged_model_and_data(
    name: str, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the packaged language model is unpacked below the working folder
    result = load(name)([*options, "--output_dir", str(tmp_path / "out")])
    assert all(math.isfinite(value) for value in result.values())
    assert PeftConfig.from_pretrained(tmp_path / "out").peft_type == "BLORA"


class Trial:
    """What `objective` asks of a trial of Optuna."""

    number = 3

    def suggest_categorical(self, name: str, choices: list[int]) -> int:
        return choices[1]

    def suggest_float(self, name: str, low: float, high: float, log: bool) -> float:
        return low


def test_a_trial_of_the_search_is_a_run_with_its_options(tmp_path: Path, tiny_bert_folder: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(
        "".join(json.dumps({"text": f"{word} film", "label": word}) + "\n" for word in ("good", "bad") * 8)
    )
    given = f"--method lora --model {tiny_bert_folder} --train-file {file} --eval-file {file} --text-column text"
    load("optuna_search")
    found = sys.modules["example_optuna_search"].objective(Trial(), tmp_path, [*given.split(), "--max-steps", "2"])
    metrics = json.loads((tmp_path / "trial-3" / "metrics.json").read_text())
    assert found == metrics["scores"]["nll"] and {layer["rank"] for layer in metrics["layers"]} == {4}
    seen: dict[str, Any] = {"metrics": {}, "artifacts": []}
    mlflow = SimpleNamespace(
        start_run=lambda run_name: contextlib.nullcontext(seen.update(name=run_name)),
        log_params=lambda params: seen.update(params=params),
        log_metrics=lambda metrics, step=None: seen["metrics"].update(metrics),
        log_artifact=lambda path: seen["artifacts"].append(Path(path).name),
    )
    load("mlflow_log")
    sys.modules["example_mlflow_log"].log(mlflow, tmp_path / "trial-3")
    assert seen["name"] == "trial-3" and seen["params"]["r"] == "4"
    assert seen["metrics"]["nll"] == found and seen["metrics"]["baseline_accuracy"] == 0.5
    assert seen["artifacts"] == ["report.html", "metrics.json", "README.md"]


@pytest.mark.parametrize("name", ["optuna_search", "mlflow_log"])
def test_a_missing_package_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    main = load(name)
    monkeypatch.setattr(sys.modules[f"example_{name}"], "find_spec", lambda package: None)
    with pytest.raises(SystemExit, match=r"^\w+ is not installed, but the (search|log) needs it: pip install \w+$"):
        main(["out"] if name == "mlflow_log" else [])

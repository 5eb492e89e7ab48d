"""Words with a tag each, by the commands: train, evaluate, predict, export, and load in a new place."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import pipeline

import bayeslora
from bayeslora.cli.main import main
from bayeslora.errors import BayesLoraError
from bayeslora.report.play import tags_html
from bayeslora.runs.play import Playground
from tests.cli.conftest import write_jsonl
from tests.conftest import EMPTY_PNG

Refused = Callable[..., str]
TAGS = ["B-COLOR", "B-PET", "I-PET", "O"]
OF_WORD = {"red": "B-COLOR", "blue": "B-COLOR", "cat": "B-PET", "dog": "I-PET"}


def sentences(count: int) -> list[dict[str, Any]]:
    """Words with the tag that they always have."""
    rng = np.random.default_rng(count)
    words = [[str(word) for word in rng.choice([*OF_WORD, "the", "was", "film"], size=6)] for _ in range(count)]
    return [{"tokens": each, "ner_tags": [OF_WORD.get(word, "O") for word in each]} for each in words]


@pytest.fixture(scope="module")
def run(tiny_bert_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tagging")
    files = {name: write_jsonl(folder / f"{name}.jsonl", sentences(n)) for name, n in (("train", 96), ("eval", 24))}
    options = ["--method", "melora", "--model", tiny_bert_folder, "--train-file", files["train"]]
    options += ["--eval-file", files["eval"], "--samples", 2, "--max-steps", 40, "--learning-rate", 0.01]
    options += ["--per-device-train-batch-size", 32, "--target-modules", "all-linear", "--seed", 0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bayeslora.report.page.png_bytes", lambda figure: EMPTY_PNG)
        assert main([str(word) for word in ["train", *options, "--output-dir", folder / "out"]]) == 0
    return folder / "out"


def test_a_run_learns_tags_and_is_scored_by_its_spans(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert (metrics["metric"], metrics["labels"]) == ("span_f1", TAGS)
    assert (metrics["rows"], metrics["words"]) == (24, 24 * 6)
    assert metrics["baseline"]["span_f1"] == 0 and metrics["scores"]["span_f1"] > 0.9
    assert metrics["scores"]["accuracy"] > 0.9 > metrics["baseline"]["accuracy"]
    assert list(metrics["label_scores"]) == ["COLOR", "PET"]
    assert np.sum(metrics["confusion"]) == 24 * 6 and "verdict" not in metrics
    info = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert (info["kind"], info["head"], info["labels"]) == ("token_classification", "words", TAGS)
    assert (info["text_columns"], info["label_column"]) == (["tokens"], "ner_tags")
    config = json.loads((run / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["num_examples"], config["task_type"]) == (96 * 6, "TOKEN_CLS"), "the loss is a mean over words"


def test_evaluate_gives_the_scores_of_the_training(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--samples", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert found["scores"] == pytest.approx(metrics["scores"], abs=1e-6)
    assert found["label_scores"].keys() == metrics["label_scores"].keys() and found["words"] == 144
    file = run.parent / "eval.conll"
    rows = sentences(24)
    lines = ["\n".join(map(" x ".join, zip(row["tokens"], row["ner_tags"], strict=True))) for row in rows]
    file.write_text("-DOCSTART- -X- O\n\n" + "\n\n".join(lines) + "\n", encoding="utf-8")
    assert main(["evaluate", str(run), "--samples", "2", "--eval-file", str(file)]) == 0
    said = capsys.readouterr().out
    assert f"{metrics['scores']['span_f1']:.4f}" in said and "24 rows, 144 words" in said and "COLOR" in said


def test_predictions_are_those_of_the_model_at_the_first_token_of_each_word(run: Path, tmp_path: Path) -> None:
    texts = ["the  dog-cat was", "red"]
    target = tmp_path / "p.jsonl"
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    options = ["--input", str(source), "--output", str(target), "--samples", "3", "--seed", "1"]
    assert main(["predict", str(run), *options]) == 0
    found = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    loaded = bayeslora.load(run)
    batch = loaded.tokenizer(texts[0], return_tensors="pt")  # [CLS] the dog - cat was [SEP]
    with torch.no_grad():
        draws = []
        for draw in range(3):
            with bayeslora.sampling(loaded.model, "batch", seed=1, draws=[draw]):
                draws.append(loaded.model(**batch).logits[0, [1, 2, 5]].double().softmax(dim=-1))
    p = torch.stack(draws)
    mean = p.mean(dim=0)
    entropy, expected = (torch.special.entr(each).sum(dim=-1) for each in (mean, p))
    words = found[0]["words"]
    assert [word["word"] for word in words] == ["the", "dog-cat", "was"]
    assert [word["characters"] for word in words] == [[0, 3], [5, 12], [13, 16]]
    for place, word in enumerate(words):
        assert word["tag"] == TAGS[int(mean[place].argmax())]
        assert word["confidence"] == pytest.approx(float(mean[place].max()), abs=1e-5)
        assert word["entropy"] == pytest.approx(float(entropy[place]), abs=1e-5)
        assert word["expected_entropy"] == pytest.approx(float(expected.mean(dim=0)[place]), abs=1e-5)
        information = float(entropy[place] - expected.mean(dim=0)[place])
        assert word["mutual_information"] == pytest.approx(information, abs=1e-5)
    assert [word["word"] for word in found[1]["words"]] == ["red"]


def test_load_and_the_pipeline_of_transformers_name_tags(run: Path) -> None:
    loaded = bayeslora.load(run)
    given = loaded.predict(["red cat dog film", ["red", "cat", "dog", "film"]])
    assert given[0].tags == given[1].tags == ["B-COLOR", "B-PET", "I-PET", "O"]
    (color, pet) = given[0].spans
    assert (color.tag, color.start, color.end, color.text, color.characters) == ("COLOR", 0, 1, "red", [0, 3])
    assert (pet.tag, pet.start, pet.end, pet.text, pet.characters) == ("PET", 1, 3, "cat dog", [4, 11])
    assert pet.confidence == min(word.confidence for word in given[0].words[1:3])
    assert given[1].spans[0].characters is None and torch.equal(given[0].probabilities, given[1].probabilities)
    tag = pipeline("token-classification", model=loaded.model, tokenizer=loaded.tokenizer)
    assert [each["entity"] for each in tag("red cat dog")] == ["B-COLOR", "B-PET", "I-PET"]


@pytest.mark.parametrize("form", ["lora", "packed", "merged"])
def test_an_export_tags_the_same(run: Path, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = [row["tokens"] for row in sentences(24)]
    expected = bayeslora.load(run).predict(text)
    folder = tmp_path / form
    assert main(["export", str(run), "--format", form, "--output-dir", str(folder)]) == 0
    loaded = bayeslora.load(folder)
    assert loaded.kind == "token_classification" and loaded.labels == TAGS
    found = loaded.predict(text)
    assert torch.allclose(found.prediction.probabilities, expected.prediction.probabilities, atol=1e-5)
    capsys.readouterr()
    assert main(["verify", str(folder), "--against", str(run), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["rows"], said["answers"], said["metric"]) == (24, 144, "span_f1")
    (folder / "run.json").unlink()  # as PEFT and Transformers alone would have saved it
    plain = bayeslora.load(folder)
    assert (plain.kind, len(plain.labels)) == ("token_classification", 4)
    assert torch.equal(plain.predict(text).prediction.labels, expected.prediction.labels)


def test_what_words_cannot_have_is_refused(run: Path, tmp_path: Path, refused: Refused) -> None:
    source = run.parent / "eval.jsonl"
    out = ["--input", source, "--output", tmp_path / "x.jsonl"]
    for name in ("--by-class", "--score=aps"):
        assert f"{name[:7]}" in (said := refused("calibrate", run, name)) and "the run tags words" in said
    assert "--shift is given, but the run tags words" in refused("evaluate", run, "--shift")
    assert "--risk is given, but the run tags words" in refused("predict", run, *out, "--risk", 0.1)
    said = refused("export", run, "--format", "onnx", "--output-dir", tmp_path / "onnx")
    assert "BertForTokenClassification" in said and not (tmp_path / "onnx").exists()
    other = write_jsonl(tmp_path / "other.jsonl", [sentences(1)[0], {"tokens": ["cat"], "tags": ["B-TOY"]}])
    assert "lacks column 'ner_tags'" in refused("evaluate", run, "--eval-file", other)
    other = write_jsonl(tmp_path / "other.jsonl", [sentences(1)[0], {"tokens": ["cat"], "ner_tags": ["B-TOY"]}])
    assert "line 2, word 1 has the label 'B-TOY', but the labels" in refused("evaluate", run, "--eval-file", other)


def test_a_temperature_of_held_out_words_is_used_from_then_on(
    run: Path, tmp_path: Path, refused: Refused, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(run, folder)
    rows = sentences(40)
    for number, row in enumerate(rows):  # every second sentence has a word that nobody can tag
        row["ner_tags"] = ["O" if place == number % 12 else tag for place, tag in enumerate(row["ner_tags"])]
    held = write_jsonl(tmp_path / "held.jsonl", rows)
    plain = bayeslora.load(folder).predict([row["tokens"] for row in rows]).prediction.logits
    labels = torch.tensor([TAGS.index(tag) for row in rows for tag in row["ner_tags"]])

    def nll(temperature: float) -> float:
        return float(torch.nn.functional.cross_entropy(plain / temperature, labels))

    assert main(["calibrate", str(folder), "--eval-file", str(held)]) == 0
    said = capfd.readouterr().out
    assert f"240 words of {held}, temperature" in said
    found = json.loads((folder / "conformal.json").read_text(encoding="utf-8"))["scaling"]["numbers"]["temperature"]
    assert nll(found) < min(nll(found * 1.01), nll(found * 0.99), nll(1) - 0.01)
    scaled = bayeslora.load(folder).predict([row["tokens"] for row in rows])
    assert torch.allclose(scaled.prediction.probabilities, (plain / found).softmax(-1), atol=1e-6)
    left = bayeslora.load(folder).predict([row["tokens"] for row in rows], uncalibrated=True)
    assert torch.equal(left.prediction.logits, plain)
    with pytest.warns(UserWarning, match="was fitted on 240 of these words"):
        assert main(["evaluate", str(folder), "--eval-file", str(held), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["scores"]["nll"] == pytest.approx(nll(found), abs=1e-5)
    out = ["--input", held, "--output", tmp_path / "x.jsonl"]
    assert main([str(word) for word in ["predict", folder, *out]]) == 0
    assert "temperature" in capfd.readouterr().out
    confidence = json.loads((tmp_path / "x.jsonl").read_text(encoding="utf-8").splitlines()[0])["words"][0][
        "confidence"
    ]
    assert confidence == pytest.approx(scaled[0].words[0].confidence)
    assert "samples is 3, but" in refused("predict", folder, *out, "--samples", 3)
    shown = Playground(bayeslora.load(folder)).tags(" ".join(rows[0]["tokens"]))
    assert [word.confidence for word in shown.words] == pytest.approx([word.confidence for word in scaled[0].words])
    assert main(["calibrate", str(folder), "--eval-file", str(held), "--isotonic", "--samples", "2"]) == 0
    assert "2 samples, isotonic map" in capfd.readouterr().out


def test_sentences_are_chosen_by_the_means_of_their_words(run: Path, tmp_path: Path) -> None:
    rows = [{"tokens": each["tokens"][: 1 + number % 6], "id": number} for number, each in enumerate(sentences(30))]
    rows[3]["tokens"] = "red  cat"  # a text, which is split at its blanks
    source, target = write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    tagged = bayeslora.load(run).predict(source, samples=4, seed=1)
    for score in ("entropy", "mutual_information"):
        means = [float(np.mean([getattr(word, score) for word in row.words])) for row in tagged]
        options = [
            "--input",
            source,
            "--output",
            target,
            "--budget",
            30,
            "--score",
            score,
            "--samples",
            4,
            "--seed",
            1,
        ]
        assert main([str(word) for word in ["select", run, *options]]) == 0
        chosen = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
        assert sorted(row["row"] for row in chosen) == list(range(1, 31))
        for row in chosen:
            assert row[score] == pytest.approx(means[row["row"] - 1], abs=1e-6)
            assert row["tokens"] == (["red", "cat"] if row["row"] == 4 else rows[row["row"] - 1]["tokens"])
        ordered = [row[score] for row in chosen]
        assert ordered == sorted(ordered, reverse=True) if score == "entropy" else ordered[0] == max(ordered)


def test_the_page_shows_the_tags_that_predict_gives(run: Path) -> None:
    play = Playground(bayeslora.load(run), samples=3)
    assert play.columns == ["text"]
    tagging, expected = play.tags("red <b> cat"), play.run.predict(["red <b> cat"], samples=3)[0]
    assert tagging.to_dict() == expected.to_dict() and tagging.words[0].mutual_information > 0
    html = tags_html(tagging)
    assert "&lt;b&gt;" in html and "<b>" not in html and html.count("<rt>") == 3
    assert f"B-COLOR {100 * tagging.words[0].confidence:.1f}" in html and "COLOR: red" in html
    with pytest.raises(BayesLoraError, match="0 words"):
        play.tags(" ")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "blora", "blob", "bayes_adalora", "dylora", "full"])
def test_every_method_learns_tags(method: str, tiny_bert_folder: Path, tmp_path: Path) -> None:
    files = {name: write_jsonl(tmp_path / f"{name}.jsonl", sentences(n)) for name, n in (("train", 96), ("eval", 24))}
    options = ["--method", method, "--model", tiny_bert_folder, "--train-file", files["train"], "--seed", 0]
    options += ["--eval-file", files["eval"], "--max-steps", 60, "--learning-rate", 0.01]
    options += [] if method == "full" else ["--target-modules", "all-linear"]
    options += ["--importance", "sensitivity"] if method == "bayes_adalora" else []
    out = tmp_path / "out"
    assert main([str(word) for word in ["train", *options, "--output-dir", out]]) == 0
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["scores"]["span_f1"] > 0.8 and metrics["scores"]["nll"] < metrics["baseline"]["nll"]
    if method == "blora":
        words = [row["tokens"] for row in sentences(24)]
        expected = bayeslora.load(out).predict(words)
        assert main(["export", str(out), "--format", "integer", "--output-dir", str(tmp_path / "integer")]) == 0
        found = bayeslora.load(tmp_path / "integer").predict(words)
        assert (found.prediction.labels == expected.prediction.labels).float().mean() > 0.95


def test_a_stopped_run_goes_on_to_the_same_scores(
    tiny_bert_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bayeslora.runs import train as runs

    file = write_jsonl(tmp_path / "train.jsonl", sentences(16))
    options = ["train", "--method", "lora", "--model", str(tiny_bert_folder), "--train-file", str(file)]
    options += ["--eval-file", str(file), "--max-steps", "4", "--save-steps", "2", "--learning-rate", "0.01"]
    assert main([*options, "--output-dir", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:

        def stop(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(runs, "finish", stop)
        assert main([*options, "--output-dir", str(tmp_path / "out")]) == 130
    assert main([*options, "--output-dir", str(tmp_path / "out"), "--resume"]) == 0
    scores = [json.loads((tmp_path / name / "metrics.json").read_text())["scores"] for name in ("whole", "out")]
    assert scores[0] == scores[1]


def test_what_the_data_leave_open_is_asked_for(tiny_bert_folder: Path, tmp_path: Path, refused: Refused) -> None:
    rows = [{"words": row["tokens"], "pos": row["ner_tags"]} for row in sentences(8)]
    file = write_jsonl(tmp_path / "train.jsonl", rows)
    options = ["train", "--model", tiny_bert_folder, "--train-file", file, "--eval-file", file, "--method", "lora"]
    options += ["--output-dir", tmp_path / "out"]
    assert "--text-column is missing" in refused(*options)
    named = [*options, "--text-column", "words", "--label-column", "pos"]
    assert "give --kind token-classification if each word has a tag" in refused(*named)
    kind = ["--kind", "token-classification"]
    assert "--class-weights is given, but weighs rows" in refused(*named, *kind, "--class-weights", "balanced")
    assert "words are in one" in refused(*options, *kind, "--text-column", "words,pos", "--label-column", "pos")
    wrong = write_jsonl(tmp_path / "wrong.jsonl", [*sentences(1), {"tokens": [], "ner_tags": []}])
    said = refused(*options[:3], "--train-file", wrong, "--eval-file", wrong, *options[-2:])
    assert "line 2 has 0 words" in said and not (tmp_path / "out").exists()
    assert main([str(word) for word in [*named, *kind, "--max-steps", 1]]) == 0
    info = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))
    assert (info["text_columns"], info["label_column"]) == (["words"], "pos")
    target = tmp_path / "p.csv"
    source = write_jsonl(tmp_path / "in.jsonl", [{"words": ["red", "cat"], "id": 1}])
    assert main(["predict", str(tmp_path / "out"), "--input", str(source), "--output", str(target)]) == 0
    with target.open(newline="", encoding="utf-8") as file_:
        (row,) = csv.DictReader(file_)
    assert row["input_words"] == '["red", "cat"]' and [word["word"] for word in json.loads(row["words"])] == [
        "red",
        "cat",
    ]


@pytest.mark.slow
def test_draws_of_an_optimizers_posterior_tag_words(tiny_bert_folder: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "train.jsonl", sentences(16))
    options = ["train", "--method", "lora", "--model", str(tiny_bert_folder), "--train-file", str(file)]
    options += ["--eval-file", str(file), "--max-steps", "4", "--optim", "ivon", "--samples", "2"]
    assert main([*options, "--output-dir", str(tmp_path / "out")]) == 0
    run = bayeslora.load(tmp_path / "out")
    words = [row["tokens"] for row in sentences(16)]
    one, again, other = (run.predict(words, samples=3, seed=seed).prediction for seed in (0, 0, 1))
    assert torch.equal(one.probabilities, again.probabilities) and len(one) == 16 * 6
    assert not torch.equal(one.probabilities, other.probabilities) and float(one.mutual_information.max()) > 0

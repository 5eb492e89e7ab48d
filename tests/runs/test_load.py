"""`bayeslora.load`: every kind of folder, every form of input, and one sentence for what cannot work."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, pipeline

import bayeslora
from bayeslora import BayesLoraError
from bayeslora.runs.base import load_base
from tests.conftest import build_tiny_bert, build_tiny_llama, build_tiny_tokenizer
from tests.runs.conftest import NAMES, tickets, trained, write_rows

TEXTS = [row["text"] for row in tickets(6, seed=3)]
RunOf = Callable[[str], Path]


@pytest.mark.parametrize("method", ["melora", "blora", "lora", "full"])
def test_a_run_is_a_model_that_says_names(run_of: RunOf, method: str) -> None:
    run = bayeslora.load(run_of(method))
    assert run.labels == NAMES and run.kind == "classification" and run.method == method
    assert run.config["train_file"].endswith(f"{method}.jsonl") and run.metrics is not None
    assert run.metrics.scores["accuracy"] <= 1
    samples = 3 if method in ("melora", "lora") else 0
    found = run.predict(TEXTS, samples=samples)
    batch = run.tokenizer(TEXTS, padding=True, return_tensors="pt")
    expected = bayeslora.predict(run.predictor, dict(batch), samples=samples)
    assert torch.allclose(found.probabilities, expected.probabilities, atol=1e-6)
    assert torch.allclose(found.mutual_information, expected.mutual_information, atol=1e-6)
    assert found.labels == [NAMES[index] for index in expected.labels]
    assert bool((found.mutual_information > 0).any()) == bool(samples)
    rows = list(found)
    assert len(rows) == len(found) == 6 and rows[-1] == found[-1]
    assert rows[2].label == found.labels[2] and rows[2].entropy == pytest.approx(float(expected.entropy[2]), abs=1e-6)
    assert [row.label for row in found[1:3]] == found.labels[1:3]


def test_a_run_is_loaded_and_asked_without_noise(run_of: RunOf, capfd: pytest.CaptureFixture[str]) -> None:
    """No progress bars, and no report of a new head: the adapter's files hold the trained one."""
    folder = run_of("melora")
    capfd.readouterr()
    run = bayeslora.load(folder)
    run.predict(TEXTS)
    said = "".join(capfd.readouterr())
    assert "%|" not in said and "newly initialized" not in said
    assert repr(run) == f"Run({str(folder)!r}: melora on {run.task}, classification, {len(NAMES)} labels)"


def test_the_folder_says_what_a_reader_needs(run_of: RunOf) -> None:
    content = json.loads((run_of("melora") / "run.json").read_text(encoding="utf-8"))
    assert content["labels"] == NAMES and content["text_columns"] == ["text"] and content["max_length"] == 128
    assert len(content["tokenizer_digest"]) == 16
    config = json.loads((run_of("full") / "config.json").read_text(encoding="utf-8"))
    assert list(config["id2label"].values()) == NAMES


@pytest.mark.parametrize("method", ["melora", "full"])
def test_a_pipeline_says_names(run_of: RunOf, method: str) -> None:
    run = bayeslora.load(run_of(method))
    said = pipeline("text-classification", model=run.model, tokenizer=run.tokenizer)(TEXTS)
    assert [each["label"] for each in said] == run.predict(TEXTS).labels


def test_every_form_of_input_is_the_same_texts(run_of: RunOf, tmp_path: Path) -> None:
    run = bayeslora.load(run_of("melora"))
    expected = run.predict(TEXTS, samples=2).probabilities
    rows = [{"text": text, "number": index} for index, text in enumerate(TEXTS)]
    forms: list[Any] = [
        tuple(TEXTS),
        iter(TEXTS),
        rows,
        Dataset.from_list(rows),
        write_rows(tmp_path / "r.jsonl", rows),
    ]
    for form in forms:
        assert torch.allclose(run.predict(form, samples=2, batch_size=4).probabilities, expected, atol=1e-6)
    for form in (TEXTS[0], rows[0]):
        assert torch.allclose(run.predict(form, samples=2).probabilities, expected[:1], atol=1e-6)


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ([], "the input has 0 rows, but must have at least 1"),
        (["good", 5], "row 2 is of type int, but must be one text"),
        ([("good", "bad")], "row 1 is two texts, but must be one text"),
        (7, "the input is of type int, but must be a text"),
        ([{"txt": "good"}], "the input, row 1 lacks column 'text', but has columns txt: name one of them$"),
        ([{"text": "good"}, {"text": None}], "the input, row 2 has an empty value in column 'text'"),
        (Dataset.from_dict({"words": ["good"]}), "the input, row 1 lacks column 'text', but has columns words"),
        (Path("absent.csv"), "absent.csv does not exist"),
    ],
)
def test_other_inputs_are_refused_in_one_sentence(run_of: RunOf, inputs: Any, sentence: str) -> None:
    with pytest.raises(BayesLoraError, match=sentence) as caught:
        bayeslora.load(run_of("melora")).predict(inputs)
    assert "\n" not in str(caught.value) and not str(caught.value).endswith(".")


def test_the_name_of_a_file_is_not_taken_for_a_text(run_of: RunOf, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"text": "good"}])
    with pytest.raises(BayesLoraError, match=r"a file of that name exists: give pathlib\.Path"):
        bayeslora.load(run_of("melora")).predict(str(file))


def test_samples_of_a_deterministic_run_are_refused(run_of: RunOf) -> None:
    with pytest.raises(BayesLoraError, match="deterministic"):
        bayeslora.load(run_of("blora")).predict(TEXTS, samples=3)


def test_pairs_and_numbers(tmp_path: Path, tiny_bert_folder: Path) -> None:
    rows = [{"a": row["text"], "b": "the plot", "label": index / 7} for index, row in enumerate(tickets(16, 0))]
    folder = trained(tmp_path / "pairs", tiny_bert_folder, rows, text_column=["a", "b"])
    run = bayeslora.load(folder)
    assert run.kind == "regression" and run.labels == []
    pairs = [(row["a"], row["b"]) for row in rows[:3]]
    found = run.predict(pairs, samples=4)
    assert all(isinstance(value, float) for value in found.labels)
    assert found.labels == run.predict(rows[:3], samples=4).labels == run.predict(map(list, pairs), samples=4).labels
    assert run.predict(pairs[0], samples=4).labels == pytest.approx(found.labels[:1])
    assert found[0].probabilities is None and found[0].std is not None and found[0].std > 0
    assert found[0].to_dict()["std"] == found[0].std
    with pytest.raises(BayesLoraError, match="row 1 is one text, but must be two texts"):
        run.predict("alone")


@pytest.mark.parametrize("form", ["lora", "packed", "integer", "merged"])
@pytest.mark.parametrize("named", [True, False])
def test_exports_answer_as_the_run_does(run_of: RunOf, tmp_path: Path, form: str, named: bool) -> None:
    """`named`: with the `run.json` and the tokenizer that the command adds."""
    run = bayeslora.load(run_of("blora"))
    target = tmp_path / form
    options = {"allow_error": True} if form in ("lora", "merged") else {}
    bayeslora.export(
        run.model, target, format=form, batch=dict(run.tokenizer(TEXTS, padding=True, return_tensors="pt")), **options
    )
    if named:
        run.tokenizer.save_pretrained(target)
        content = json.loads((run.folder / "run.json").read_text(encoding="utf-8"))
        if form in ("integer", "merged"):
            content["method"] = "full"
        else:
            content["base_name"] = json.loads((target / "adapter_config.json").read_text())["base_model_name_or_path"]
        (target / "run.json").write_text(json.dumps(content), encoding="utf-8")
    elif form in ("integer", "merged"):
        with pytest.raises(BayesLoraError, match="lacks the tokenizer"):
            bayeslora.load(target)
    loaded = bayeslora.load(target, tokenizer=None if named else run.tokenizer)
    # The base model names no classes, so an adapter without run.json does not either.
    assert loaded.labels == (NAMES if named or form in ("integer", "merged") else [f"LABEL_{i}" for i in range(6)])
    difference = (loaded.predict(TEXTS).probabilities - run.predict(TEXTS).probabilities).abs().max()
    assert difference < (0.02 if form in ("integer", "lora", "merged") else 1e-5)


def test_draws_are_loaded_one_by_one(run_of: RunOf, tmp_path: Path, tiny_bert_folder: Path) -> None:
    run = bayeslora.load(run_of("melora"))
    bayeslora.export(run.model, tmp_path / "draws", format="lora", draws=2)
    with pytest.raises(BayesLoraError, match=r"several draws.*draw-0"):
        bayeslora.load(tmp_path / "draws")
    found = [bayeslora.load(tmp_path / "draws" / f"draw-{k}").predict(TEXTS).probabilities for k in range(2)]
    assert torch.allclose(sum(found) / 2, run.predict(TEXTS, samples=2).probabilities, atol=1e-5)


@pytest.mark.parametrize("own", [True, False])
def test_an_adapter_alone_has_its_classes_from_the_saved_head(tmp_path: Path, own: bool) -> None:
    """PEFT saves neither tokenizer nor labels: they are those of the base model, if it has as many."""
    names = {0: "no", 1: "maybe", 2: "yes"}
    build_tiny_bert(num_labels=3 if own else 2, **({"id2label": names} if own else {})).save_pretrained(
        tmp_path / "base"
    )
    build_tiny_tokenizer().save_pretrained(tmp_path / "base")
    config = bayeslora.MeLoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", init_weights=False)
    base = build_tiny_bert(num_labels=3)
    base.name_or_path = str(tmp_path / "base")
    model = get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "adapter")
    run = bayeslora.load(tmp_path / "adapter")
    assert run.labels == (list(names.values()) if own else ["LABEL_0", "LABEL_1", "LABEL_2"])
    assert run.method == "melora" and run.kind == "classification" and run.base == str(tmp_path / "base")
    batch = dict(build_tiny_tokenizer()(TEXTS, padding=True, return_tensors="pt"))
    batch.pop("token_type_ids", None)
    expected = bayeslora.predict(model, batch, samples=2)
    assert torch.allclose(run.predict(TEXTS, samples=2).probabilities, expected.probabilities, atol=1e-5)
    assert len(run.predict([("good", "bad")])) == len(run.predict({"text_a": "good", "text_b": "bad"})) == 1


def test_a_language_model_is_loaded_and_does_not_label(tmp_path: Path, tiny_causal_folder: Path) -> None:
    model = get_peft_model(build_tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    run = bayeslora.load(tmp_path / "adapter", model=str(tiny_causal_folder))
    assert run.kind == "generation" and run.method == "lora"
    with pytest.raises(BayesLoraError, match=r"labels need a classifier: use `bayeslora generate`, or run\.generate"):
        run.predict("good")


@pytest.fixture
def copied(run_of: RunOf, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run_of("melora"), tmp_path / "copy"))


def _without_tokenizer(folder: Path) -> Path:
    for file in folder.glob("*token*"):
        file.unlink()
    return folder


def test_a_missing_tokenizer_is_told_and_can_be_given(copied: Path, tiny_bert_folder: Path) -> None:
    expected = bayeslora.load(copied).predict(TEXTS).probabilities
    with pytest.raises(BayesLoraError, match=r"lacks the tokenizer .* give load"):
        bayeslora.load(_without_tokenizer(copied))
    for given in (tiny_bert_folder, str(tiny_bert_folder), AutoTokenizer.from_pretrained(tiny_bert_folder)):
        assert torch.equal(bayeslora.load(copied, tokenizer=given).predict(TEXTS).probabilities, expected)


@pytest.mark.parametrize("given", [True, False])
def test_another_tokenizer_is_told(copied: Path, tmp_path: Path, given: bool) -> None:
    other = build_tiny_tokenizer()
    other.add_tokens(["gdpr"])
    other.save_pretrained(tmp_path / "other" if given else copied)
    own = json.loads((copied / "run.json").read_text())["tokenizer_digest"]
    with pytest.raises(BayesLoraError, match=f"has the vocabulary [0-9a-f]{{16}}, but the run was trained with {own}"):
        bayeslora.load(copied, tokenizer=tmp_path / "other" if given else None)


def test_a_folder_of_an_older_version_is_not_checked(copied: Path) -> None:
    content = json.loads((copied / "run.json").read_text())
    del content["tokenizer_digest"]
    (copied / "run.json").write_text(json.dumps(content))
    assert bayeslora.load(copied).predict(TEXTS).labels


def test_a_folder_of_a_newer_version_is_told(copied: Path) -> None:
    content = json.loads((copied / "run.json").read_text())
    (copied / "run.json").write_text(json.dumps({**content, "colour": "red"}))
    with pytest.raises(BayesLoraError, match=r"field 'colour', but this version .* does not know it"):
        bayeslora.load(copied)


def test_a_hub_id_is_fetched(run_of: RunOf, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name: asked.append(name) or str(run_of("melora")))
    assert bayeslora.load("someone/tickets").labels == NAMES
    assert asked == ["someone/tickets"]


def test_without_a_way_to_the_hub_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BayesLoraError, match=r"nothing is not a folder, and cannot be downloaded from the hub"):
        bayeslora.load("someone/nothing")
    for name in ("out", "./out/run", "a/b/c", str(tmp_path / "absent")):
        with pytest.raises(BayesLoraError, match="is not a folder, but must be one or a hub id"):
            bayeslora.load(name)
    with pytest.raises(BayesLoraError, match=r"lacks run\.json, adapter_config\.json and config\.json, but needs one"):
        bayeslora.load(tmp_path)


def test_the_posterior_of_ivon_is_drawn_from(run_of: RunOf) -> None:
    run = bayeslora.load(run_of("lora"))
    assert isinstance(run.predictor, bayeslora.WeightPosterior)
    first, again = (run.predict(TEXTS, samples=3, seed=1).probabilities for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, run.predict(TEXTS, samples=3, seed=2).probabilities)


def test_multiple_choice_takes_questions_and_choices(tmp_path: Path, tiny_bert_folder: Path) -> None:
    data = tmp_path / "arc_easy"
    data.mkdir()
    rows = [
        {"question": f"who sat on the {word}", "choices": ["the cat", "the dog", "no"][: 2 + n % 2], "answer": n % 2}
        for n, word in enumerate(["mat", "tree", "house", "red"] * 4)
    ]
    for split in ("train", "dev"):
        write_rows(data / f"{split}.jsonl", rows)
    from bayeslora.runs.plan import RunOptions, TrainPlan
    from bayeslora.runs.train import train

    training = {"max_steps": 2, "seed": 0, "report_to": ["none"], "save_strategy": "no"}
    options = RunOptions("melora", str(tiny_bert_folder), "arc_easy", str(tmp_path), output_dir=str(tmp_path / "out"))
    train(TrainPlan(options, {"r": 2}, training, bayeslora.MeLoraConfig))
    run = bayeslora.load(tmp_path / "out")
    assert run.kind == "multiple_choice" and run.labels == ["A", "B", "C"]
    found = run.predict(rows[:2], samples=2)
    assert found.labels[0] in "AB" and found.probabilities[0, 2] == 0
    assert torch.allclose(run.predict(rows[1], samples=2).probabilities, found.probabilities[1:], atol=1e-6)
    with pytest.raises(BayesLoraError, match="row 1 is one text, but must be a row with question and choices"):
        run.predict(["who sat"])


def test_the_code_of_the_model_card_runs(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bayeslora.report import write_model_card

    card = write_model_card(copied).read_text(encoding="utf-8")
    code = "".join(re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL))
    base = json.loads((copied / "run.json").read_text())["model"]
    monkeypatch.chdir(copied)
    names: dict[str, Any] = {}
    exec(re.sub(r"^name = .*$", f"name = {base!r}", code, flags=re.MULTILINE), names)
    assert capsys.readouterr().out.split()[0] in [name.split()[0] for name in NAMES]
    said = pipeline("text-classification", model=names["model"], tokenizer=names["tokenizer"])(TEXTS)
    assert [each["label"] for each in said] == names["run"].predict(TEXTS).labels


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification", None])
def test_a_regression_starts_from_any_classifier(problem: str | None, tmp_path: Path) -> None:
    build_tiny_bert(num_labels=2, problem_type=problem).save_pretrained(tmp_path)
    tokenizer = build_tiny_tokenizer()
    found = load_base(str(tmp_path), tokenizer, labels=[], kind="regression", dtype="float32").model
    assert found.config.problem_type == "regression" and found.config.num_labels == 1
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert found(**batch, labels=torch.zeros(len(TEXTS))).logits.shape == (len(TEXTS), 1)

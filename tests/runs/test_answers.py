"""Runs that learn text: what they count, how they answer, and what their uncertainty is made of."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import bayeslora
from bayeslora.data import encode_generation, load_generation
from bayeslora.errors import BayesLoraError
from bayeslora.evaluation import evaluate_text
from bayeslora.runs.answers import pieces
from bayeslora.runs.clusters import Cluster, clustered, semantic_entropy
from bayeslora.runs.plan import IvonOptions
from bayeslora.runs.record import read_history
from tests.conftest import build_tiny_tokenizer
from tests.runs.conftest import write_rows
from tests.runs.text_runs import ASKED, chat, pairs, pairs_as_chat, trained


@pytest.fixture(scope="module")
def melora(tmp_path_factory: pytest.TempPathFactory, tiny_causal_folder: Path) -> Path:
    return trained(tmp_path_factory.mktemp("runs") / "chat", tiny_causal_folder, chat(30), "melora", samples=3)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, tiny_causal_folder: Path) -> Path:
    return trained(tmp_path_factory.mktemp("runs") / "pairs", tiny_causal_folder, pairs(40), "full", steps=60)


def test_the_divergence_is_divided_by_the_tokens_that_are_learned(melora: Path) -> None:
    run = bayeslora.load(melora)
    task = load_generation(melora.parent / "chat.jsonl")
    # Of each answer its four words and the end; three of 30 rows are held out.
    answers = sum(len(row) // 2 for row in task.train_split["messages"])
    config: Any = run.model.peft_config
    assert len(task.train_split) == 27 and config["default"].num_examples == 5 * answers


def test_the_record_has_the_scores_of_the_rows_held_out(melora: Path) -> None:
    run = bayeslora.load(melora)
    assert (run.kind, run.task, run.info.text_columns) == ("generation", "chat.jsonl", ["messages"])
    assert run.info.files == {"train_file": str(melora.parent / "chat.jsonl")}
    task = load_generation(melora.parent / "chat.jsonl")
    data = encode_generation(task.eval_split, build_tiny_tokenizer(causal=True), 99)
    record = run.metrics
    assert record is not None and record.samples == 3 and record.metric == "perplexity"
    assert record.scores == pytest.approx(evaluate_text(run.predictor, data, run.tokenizer, samples=3).scores)
    assert record.scores["perplexity"] < 10 and record.reliability.ece == pytest.approx(record.scores["ece"])


def test_a_step_of_two_batches_has_the_loss_of_one_batch_of_all_their_tokens(
    tmp_path: Path, tiny_causal_folder: Path
) -> None:
    """Rows have answers of different lengths: a mean of two means would be another number."""
    rows = [row for row in chat(40) if len(row["messages"]) == 4] + pairs_as_chat(20)
    folder = trained(tmp_path / "run", tiny_causal_folder, rows, "full", steps=1, accumulation=4)
    task = load_generation(tmp_path / "run.jsonl")
    data = encode_generation(task.train_split, build_tiny_tokenizer(causal=True), 99)
    base = bayeslora.load(folder)
    untrained = type(base.model).from_pretrained(tiny_causal_folder)
    first = read_history(folder)[0]["loss"]
    # 32 of 36 rows, which ones the seed of the Trainer says: the mean over all of them is near.
    assert first == pytest.approx(evaluate_text(untrained, data, base.tokenizer).scores["nll"], rel=0.01)


def test_an_answer_has_the_scores_that_generate_gives(melora: Path) -> None:
    run = bayeslora.load(melora)
    (answer,) = run.generate(ASKED, samples=4, seed=2, max_new_tokens=8)
    ids = run.tokenizer(ASKED + "[SEP]", add_special_tokens=False, return_tensors="pt")["input_ids"]
    found = bayeslora.generate(run.model, ids, samples=4, seed=2, answers="mean", max_new_tokens=8)
    own = bayeslora.generate(run.model, ids, samples=4, seed=2, max_new_tokens=8)
    assert answer.prompt == ASKED and answer.reference is None
    assert answer.text == run.tokenizer.decode(found.tokens[0, 0], skip_special_tokens=True).strip() != ""
    assert "".join(answer.tokens).replace("[SEP]", "").strip() == answer.text
    assert answer.is_finished == (answer.tokens[-1].strip() == "[SEP]")
    valid = found.mask[0, 0]
    for ours, theirs in (
        (answer.entropy, found.predictive_entropy),
        (answer.mutual_information, found.mutual_information),
    ):
        assert theirs is not None and len(ours) == len(answer.tokens)
        assert ours == pytest.approx(theirs[0, 0][valid].tolist(), rel=1e-3, abs=1e-5)
    assert found.draw_log_probabilities is not None and found.mixture_log_probability is not None
    assert answer.draw_log_probabilities == pytest.approx(found.draw_log_probabilities[:, 0, 0].tolist(), rel=1e-3)
    assert answer.mixture_log_probability == pytest.approx(float(found.mixture_log_probability[0, 0]), rel=1e-3)
    texts = [run.tokenizer.decode(own.tokens[draw, 0], skip_special_tokens=True).strip() for draw in range(4)]
    assert answer.draws == texts
    counts = [cluster.count for cluster in answer.clusters]
    assert sum(counts) == 4 and counts == sorted(counts, reverse=True)
    assert answer.semantic_entropy == pytest.approx(-sum(c / 4 * math.log(c / 4) for c in counts))


def test_prompts_may_be_texts_rows_conversations_and_files(melora: Path, tmp_path: Path) -> None:
    run = bayeslora.load(melora)
    conversation = [{"role": "user", "content": ASKED}]
    row = {"messages": [*conversation, {"role": "assistant", "content": "the cat is red"}]}
    file = write_rows(tmp_path / "rows.jsonl", [row, {"messages": conversation}])
    found = [
        *run.generate(ASKED),
        *run.generate([ASKED, conversation, row]),
        *run.generate(conversation),
        *run.generate(file),
        *run.generate(({"messages": conversation} for _ in range(2)), batch_size=1),
    ]
    assert {answer.text for answer in found} == {found[0].text} and len(found) == 9
    assert [answer.reference for answer in found].count("the cat is red") == 2
    assert found[0].draws == found[0].draw_log_probabilities == [] and found[0].semantic_entropy is None
    assert found[0].mutual_information == [0.0] * len(found[0].tokens)
    longer = run.generate(["why ?", "what is the very very clever dog ?", ASKED])
    assert [answer.prompt for answer in longer] == ["why ?", "what is the very very clever dog ?", ASKED]
    assert longer[2].text == found[0].text


def test_a_run_on_completions_continues_the_prompt(full: Path) -> None:
    run = bayeslora.load(full)
    found = run.generate(["the dog is", {"prompt": "the cat is", "completion": " red"}])
    assert [answer.text for answer in found] == ["blue", "red"] and found[1].reference == " red"
    assert all(answer.is_finished for answer in found)


def test_a_deterministic_run_draws_tokens_where_there_is_a_temperature(full: Path) -> None:
    run = bayeslora.load(full)
    with pytest.raises(BayesLoraError, match="samples is 2, but the model .* is deterministic"):
        run.generate("the cat is", samples=2)
    (hot,) = run.generate("the cat is", samples=6, temperature=50.0, max_new_tokens=3)
    assert len(hot.draws) == 6 and len(hot.clusters) > 1 and hot.text == "red"
    assert hot.draw_log_probabilities == [] and set(hot.mutual_information) == {0.0}
    (cold,) = run.generate("the cat is", samples=6, temperature=1e-3)
    assert cold.clusters == [Cluster("red", 6)] and cold.semantic_entropy == 0


def test_draws_of_ivons_posterior_answer_too(tmp_path: Path, tiny_causal_folder: Path) -> None:
    ivon = IvonOptions(ivon_hess_init=0.5, ivon_clip_radius=50.0)
    run = bayeslora.load(trained(tmp_path / "run", tiny_causal_folder, chat(20), "lora", ivon=ivon, steps=2))
    found = run.generate([ASKED], samples=3, max_new_tokens=4)
    assert len(set(found[0].draw_log_probabilities)) == 3 and max(found[0].mutual_information) > 0


def test_what_cannot_be_answered_is_refused(melora: Path, run_of: Any) -> None:
    run = bayeslora.load(melora)
    with pytest.raises(BayesLoraError, match="prompt 2 has 41 tokens and the answer 100, but the model reads 128"):
        run.generate(["good", "good " * 40], max_new_tokens=100)
    with pytest.raises(BayesLoraError, match="temperature is -1, but must be at least 0"):
        run.generate("good", samples=2, temperature=-1)
    with pytest.raises(BayesLoraError, match="row 1 is of type int"):
        run.generate([3])
    with pytest.raises(BayesLoraError, match="row 2 has 3 of type int in column .prompt."):
        run.generate([{"prompt": "good"}, {"prompt": 3}])
    with pytest.raises(BayesLoraError, match="the input has 0 rows"):
        run.generate([])
    with pytest.raises(BayesLoraError, match="labels need a classifier: use `bayeslora generate`"):
        run.predict("good")
    with pytest.raises(BayesLoraError, match="6 labels of classification, but generate needs a language model"):
        bayeslora.load(run_of("melora")).generate("good")


def test_an_export_answers_as_the_run(melora: Path, tmp_path: Path) -> None:
    run = bayeslora.load(melora)
    bayeslora.export(run.model, tmp_path / "lora", format="lora")
    run.tokenizer.save_pretrained(tmp_path / "lora")
    shutil.copy(run.folder / "chat_template.jinja", tmp_path / "lora")
    plain = bayeslora.load(tmp_path / "lora", model=run.base)
    prompt = {"messages": [{"role": "user", "content": ASKED}]}
    assert plain.generate(prompt)[0].text == run.generate(prompt)[0].text


def test_clusters_join_what_differs_in_form_alone() -> None:
    texts = ["The Cat.", "a  cat", "dog", "“cat”", "-5", "5", "3.5", "35", "A", "the"]
    assert [(cluster.text, cluster.count) for cluster in clustered(texts)] == [
        ("The Cat.", 3),
        *((text, 1) for text in ("dog", "-5", "5", "3.5", "35", "A", "the")),
    ]
    assert semantic_entropy([1, 1, 1, 1]) == pytest.approx(math.log(4)) and semantic_entropy([7]) == 0
    assert semantic_entropy([3, 1]) == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids: list[int], **options: Any) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


def test_the_pieces_of_a_text_join_to_it_even_inside_characters() -> None:
    text = "ein Bär 🐻!"
    found = pieces(list(text.encode()), Bytes())
    assert "".join(found) == text and len(found) == len(text.encode()) and found.count("") == 4
    assert "".join(pieces(list(text.encode())[:-2], Bytes())).startswith("ein Bär ")


def test_an_answer_is_json(melora: Path) -> None:
    (answer,) = bayeslora.load(melora).generate(ASKED, samples=2, max_new_tokens=3)
    again = json.loads(json.dumps(answer.to_dict()))
    assert again["text"] == answer.text and again["clusters"][0]["count"] in (1, 2) and "reference" not in again
    assert torch.isfinite(torch.tensor(again["entropy"])).all()

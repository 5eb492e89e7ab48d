"""Time of a prediction from ten draws of the weights, as a multiple of one deterministic pass.

    python benchmarks/predict_time.py                      # packaged MiniLM, 32 x 64 tokens, r = 8 on q, k, v
    python benchmarks/predict_time.py --rounds 20 --output benchmarks/results/predict_time.json

Each round times every variant in turn, so a drift of the machine's speed touches all alike; the figures are medians
over rounds of the time and of its ratio to the pass in the same round. Variants, for Me-LoRA and for BLoB:

    pass         the model at its posterior mean: one plain forward pass
    all          ten samples, every layer random
    last-third   ten samples, only the last third of the layers random (`layers_to_transform`)
    loop         ten samples, every layer random, by hand: ten forward passes, one draw each
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import processor
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

import bayeslora
from bayeslora.data import packaged_model

METHODS = {"melora": bayeslora.MeLoraConfig, "blob": bayeslora.BlobConfig}


def build(method: str, layers: list[int] | None = None) -> nn.Module:
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(packaged_model("minilm"), num_labels=2)
    shared = {"r": 8, "lora_alpha": 16, "target_modules": ["query", "key", "value"], "task_type": "SEQ_CLS"}
    config = METHODS[method](**shared, layers_to_transform=layers, init_weights=False)
    return get_peft_model(base, config).eval()


def variants(method: str, batch: dict[str, Tensor], samples: int) -> dict[str, Callable[[], object]]:
    """Functions to time, by name."""
    full = build(method)
    depth = full.config.num_hidden_layers
    late = build(method, list(range(depth - depth // 3, depth)))

    @torch.inference_mode()
    def loop() -> list[Tensor]:
        found = []
        for draw in range(samples):
            with bayeslora.sampling(full, scope="batch", seed=0, draws=[draw]):
                found.append(full(**batch).logits)
        return found

    return {
        "pass": lambda: bayeslora.predict(full, batch),
        "all": lambda: bayeslora.predict(full, batch, samples),
        "last-third": lambda: bayeslora.predict(late, batch, samples),
        "loop": loop,
    }


def measure(method: str, batch: dict[str, Tensor], samples: int, rounds: int) -> dict[str, dict[str, float]]:
    timed = variants(method, batch, samples)
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for name in timed:
        timed[name]()
    for _ in range(rounds):
        for name, function in timed.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return {
        name: {
            "milliseconds": 1000 * statistics.median(values),
            "relative": statistics.median(v / one for v, one in zip(values, seconds["pass"], strict=True)),
        }
        for name, values in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--shapes", default="32x64", help="rows x tokens of the batch; several with commas")
    parser.add_argument("--methods", default="melora,blob")
    parser.add_argument("--threads", type=int, default=None, help="by default all cores")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    results = []
    for shape in options.shapes.split(","):
        rows, tokens = (int(part) for part in shape.split("x"))
        ids = torch.randint(1000, 20000, (rows, tokens), generator=generator)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for method in options.methods.split(","):
            found = measure(method, batch, options.samples, options.rounds)
            results.append({"rows": rows, "tokens": tokens, "method": method, "variants": found})
            for name, figures in found.items():
                print(f"{shape}  {method:7} {name:11} {figures['milliseconds']:9.1f} ms  {figures['relative']:6.2f} x")
    record = {
        "samples": options.samples,
        "rounds": options.rounds,
        "machine": processor(),
        "versions": {"torch": torch.__version__, "bayeslora": bayeslora.__version__},
        "results": results,
    }
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

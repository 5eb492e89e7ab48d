"""How fast a sentence is read on a CPU: LoRA in PyTorch and as ONNX, onnxruntime's own 8 bits, and B-LoRA as ONNX.

    python benchmarks/onnx_time.py --lora RUN --blora RUN --output benchmarks/results/onnx_time.json

RUN are finished runs of `bayeslora train` on one task and model, such as the demo's. Timed in one process, in rounds
that take every variant in turn, so that a drift of the machine's speed touches all alike:

    lora             PEFT's LoRA in PyTorch, not merged, float32: the ratios' denominator
    lora-merged      the same, merged
    lora-onnx        `bayeslora export --format onnx`, float32
    lora-onnx-int8   onnxruntime's `quantize_dynamic` of that graph, 8 bits, a range for each output channel
    lora-torch-int8  `quantize_dynamic` of the graph that `torch.onnx.export` writes of the merged LoRA
    blora-onnx       `bayeslora export --format onnx` of the B-LoRA

Batches are of test texts in their order, padded to the longest; single sentences are not padded. Figures are medians
over rounds of the rate, of its ratio to `lora` and, for `blora-onnx`, to each graph of 8 bits in the same round. With
one thread, seconds are those that the thread spent on the processor, which other programs change little. Changed
answers and divergence are on test texts, each variant beside the model that was trained: the LoRA's or the B-LoRA's.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from measuring import print_result, processor
from onnxruntime.quantization import quantize_dynamic
from torch import Tensor, nn

import bayeslora
from bayeslora.data import load_task
from bayeslora.data.encode import collated
from bayeslora.runs.rows import encode_for, training_batches
from bayeslora.runs.run import Run

BASELINE, OURS = "lora", "blora-onnx"
RIVALS = {"lora-onnx-int8": "over_onnxruntime_int8", "lora-torch-int8": "over_onnxruntime_int8_of_torch"}
CALIBRATION_BATCHES = 8

OPSET = 17

Batch = dict[str, Tensor]
Read = Callable[[Batch], Tensor]


def test_batches(run: Run, rows: int, size: int) -> list[Batch]:
    """Test texts in their order, in batches of `size`."""
    task = load_task(str(run.info.task_name), run.info.data_dir, train_split=run.info.train_split)
    split = task.splits["test"]
    data = encode_for(split.select(range(min(rows, len(split)))), task, run.tokenizer, run.info)
    batches = collated(data, np.arange(len(data)), run.tokenizer, size, None)
    return [{name: batch[name] for name in run.tokenizer.model_input_names} for batch in batches]


def write(run: Run, folder: Path) -> dict[str, Any]:
    """Export a run, as the command does."""
    batches = training_batches(run.info, run.tokenizer, 2 * CALIBRATION_BATCHES, seed=0)
    return bayeslora.export(
        run.model,
        folder,
        format="onnx",
        tokenizer=run.tokenizer,
        max_length=run.info.max_length,
        rows=batches[::2],
        calibration=batches[1::2],
    )


def write_by_torch(model: nn.Module, batch: Batch, path: Path) -> None:
    """Write a model as `torch.onnx.export` does, with free batch and length."""
    axes = {name: {0: "batch", 1: "length"} for name in batch}

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *inputs: Tensor) -> Tensor:
            return self.model(**dict(zip(batch, inputs, strict=True))).logits

    torch.onnx.export(
        Logits().eval(),
        tuple(batch.values()),
        str(path),
        input_names=list(batch),
        output_names=["logits"],
        dynamic_axes=axes,
        opset_version=OPSET,
        dynamo=False,
    )


def in_torch(model: nn.Module) -> Read:
    model.eval()

    @torch.inference_mode()
    def read(batch: Batch) -> Tensor:
        return model(**batch).logits

    return read


def in_onnxruntime(path: Path, threads: int) -> Read:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def read(batch: Batch) -> Tensor:
        return torch.from_numpy(session.run(None, {name: batch[name].numpy() for name in names})[0])

    return read


def rates(
    variants: Mapping[str, Read], batches: Sequence[Batch], rounds: int, clock: Callable[[], float]
) -> dict[str, dict[str, float]]:
    """Sentences a second and ratios of each variant; every round reads all batches."""
    count = sum(len(batch["input_ids"]) for batch in batches)
    found: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, read in variants.items():
            start = clock()
            for batch in batches:
                read(batch)
            if number:  # the first round prepares kernels
                found[name].append(count / (clock() - start))
    ratios = {name: _median_ratio(values, found[BASELINE]) for name, values in found.items()}
    result = {
        name: {"per_second": statistics.median(values), "over_lora": ratios[name]} for name, values in found.items()
    }
    result[OURS] |= {key: _median_ratio(found[OURS], found[name]) for name, key in RIVALS.items()}
    return result


def _median_ratio(values: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(values, others, strict=True))


def changes(read: Read, trained: Read, batches: Sequence[Batch]) -> dict[str, float]:
    """Share of other answers than the trained model's, and mean divergence from it in nats."""
    found, expected = (torch.cat([each(batch).float() for batch in batches]) for each in (read, trained))
    before, after = F.log_softmax(expected, 1), F.log_softmax(found, 1)
    return {
        "changed": float((found.argmax(1) != expected.argmax(1)).float().mean()),
        "divergence": float(F.kl_div(after, before, reduction="batchmean", log_target=True)),
        "rows": len(found),
    }


def measure(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Export, score and time all variants."""
    lora, blora = bayeslora.load(given.lora), bayeslora.load(given.blora)
    written = {"lora": write(lora, folder / "lora"), "blora": write(blora, folder / "blora")}
    paths = {
        "lora-onnx": folder / "lora" / "model.onnx",
        **{name: folder / f"{name}.onnx" for name in RIVALS},
        OURS: folder / "blora" / "model.onnx",
    }
    merged = bayeslora.load(given.lora).model.merge_and_unload()
    write_by_torch(merged, test_batches(lora, 2, 2)[0], folder / "torch.onnx")
    for source, name in zip((paths["lora-onnx"], folder / "torch.onnx"), RIVALS, strict=True):
        quantize_dynamic(str(source), str(paths[name]), per_channel=True)
    variants = {BASELINE: in_torch(lora.model), "lora-merged": in_torch(merged)}
    variants |= {name: in_onnxruntime(path, given.threads) for name, path in paths.items()}
    batches = test_batches(lora, given.test_rows, given.batch_size)
    trained = {name: in_torch(blora.model) if name == OURS else variants[BASELINE] for name in variants}
    clock = time.thread_time if given.threads == 1 else time.perf_counter
    load_before = os.getloadavg()
    one = test_batches(lora, given.sentences, 1)
    timed = {"1": rates(variants, one, given.rounds, clock)}
    timed[str(given.batch_size)] = rates(variants, batches[: given.batches], given.rounds, clock)
    return {
        "runs": {
            name: {"task": run.info.task, "length": run.info.max_length}
            for name, run in (("lora", lora), ("blora", blora))
        },
        "seconds": "of the thread" if clock is time.thread_time else "of the clock",
        "load_average": [round(each, 2) for each in (*load_before, *os.getloadavg())],
        "export": written,
        "bytes": {name: path.stat().st_size for name, path in paths.items()},
        "against_trained": {name: changes(read, trained[name], batches) for name, read in variants.items()},
        "sentences_per_second": timed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lora", type=Path, required=True, metavar="RUN")
    parser.add_argument("--blora", type=Path, required=True, metavar="RUN")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--batches", type=int, default=2, help="batches of a round")
    parser.add_argument("--sentences", type=int, default=16, help="single sentences of a round")
    parser.add_argument("--test-rows", type=int, default=1000, help="test texts whose answers are compared")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(given, Path(scratch))
    settings = {"rounds": given.rounds, "batches": given.batches, "sentences": given.sentences}
    versions = {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__, "bayeslora": bayeslora.__version__}
    print_result({**settings, "machine": processor(), "versions": versions, **found}, given.output)


if __name__ == "__main__":
    main()

"""What you would do otherwise: a trained classifier in every form in which one may deploy it, in one run.

    python benchmarks/otherwise.py --output benchmarks/results/otherwise.json     # trains as `bayeslora demo` does
    python benchmarks/otherwise.py --runs runs/demo                               # or takes the runs in it
    python benchmarks/otherwise.py --compiled                                     # also compiled, which takes minutes
    python benchmarks/otherwise.py --decoder --llama-python PYTHON                # a language model, in other forms

The models are a LoRA of the packaged MiniLM-L6 and two B-LoRAs of it, of 3% of the bit operations and of 8 bits, all
trained on the demo's reviews. Each variant runs in a process of its own, with one thread. In each round every variant
reads single texts and batches of 32 in turn, so that a drift of the machine's speed touches all alike. Figures are
medians over the rounds.

Seconds are those of the processor, which other programs change little. Batches are of test texts in their order,
padded to the longest; tokens are made before the clock starts, but count for the first answer. Bytes are those of the
files with weights. Peaks are of a process that has read a text and a batch. A variant whose package is missing is left
out, and the file says so: `pip install onnx onnxruntime openvino nncf torchao`.

With `--decoder` the model is SmolLM2-135M, and `otherwise_decoder.py` says what it is trained on; PYTHON is an
interpreter that has llama.cpp (`pip install xllamacpp`), this one by default.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from measuring import ONE_THREAD, Answering, print_result, processor
from otherwise_models import Forms, answers_of, test_rows, trained

import bayeslora

BASELINE = "lora"
MANY = 32
PACKAGES = ("torch", "transformers", "peft", "onnxruntime", "openvino", "nncf", "torchao", "gguf")


@dataclass(frozen=True)
class Variant:
    """A form of a run in a runtime.

    Attributes:
        title: in the table.
        form: its folder's name.
        runtime: what reads it, in `otherwise_worker.py`.
        method: of the run that it was made from.
        needs: packages that not everybody has.
    """

    title: str
    form: str
    runtime: str
    method: str = "lora"
    needs: tuple[str, ...] = ()

    @property
    def missing(self) -> list[str]:
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


ONNX, OPENVINO = ("onnx", "onnxruntime"), ("onnx", "onnxruntime", "openvino")
VARIANTS = {
    BASELINE: Variant("LoRA, unmerged, float32", "lora", "lora"),
    "merged": Variant("LoRA merged, float32", "merged", "merged"),
    "merged-bfloat16": Variant("LoRA merged, bfloat16", "merged-bfloat16", "merged"),
    "torchao": Variant("LoRA merged, torchao int8 dynamic", "torchao", "torchao", needs=("torchao",)),
    "onnxruntime": Variant("LoRA merged, `torch.onnx`, onnxruntime float32", "torch-onnx", "onnxruntime", needs=ONNX),
    "onnxruntime-int8": Variant(
        "the same, onnxruntime int8 dynamic, per channel", "torch-onnx-int8", "onnxruntime", needs=ONNX
    ),
    "openvino": Variant("the same graph, OpenVINO float32", "torch-onnx", "openvino", needs=OPENVINO),
    "openvino-int8": Variant(
        "the same graph, OpenVINO int8 static (NNCF)", "torch-onnx-nncf", "openvino", needs=(*OPENVINO, "nncf")
    ),
    "lora-onnx": Variant("LoRA, our ONNX graph, onnxruntime float32", "lora-onnx", "onnxruntime", needs=ONNX),
    "lora-onnx-int8": Variant(
        "LoRA, our ONNX graph, onnxruntime int8 dynamic, per channel", "lora-onnx-int8", "onnxruntime", needs=ONNX
    ),
    "lora-onnx-openvino": Variant("LoRA, our ONNX graph, OpenVINO float32", "lora-onnx", "openvino", needs=OPENVINO),
    "packed": Variant("B-LoRA, 3%, packed, PyTorch", "packed", "packed", "blora"),
    "integer": Variant("B-LoRA, 3%, integer, PyTorch", "integer", "integer", "blora"),
    "integer-compiled": Variant("B-LoRA, 3%, integer, compiled", "integer", "compiled", "blora"),
    "blora-onnx": Variant("**B-LoRA, 3%, ONNX, onnxruntime**", "blora-onnx", "onnxruntime", "blora", ONNX),
    "blora-onnx-openvino": Variant("**B-LoRA, 3%, ONNX, OpenVINO**", "blora-onnx", "openvino", "blora", OPENVINO),
    "packed8": Variant("B-LoRA, 8 bits, packed, PyTorch", "packed8", "packed", "blora8"),
    "integer8": Variant("B-LoRA, 8 bits, integer, PyTorch", "integer8", "integer", "blora8"),
    "blora8-onnx": Variant("**B-LoRA, 8 bits, ONNX, onnxruntime**", "blora8-onnx", "onnxruntime", "blora8", ONNX),
    "blora8-onnx-openvino": Variant(
        "**B-LoRA, 8 bits, ONNX, OpenVINO**", "blora8-onnx", "openvino", "blora8", OPENVINO
    ),
}
REFERENCES = {"lora": BASELINE, "blora": "packed", "blora8": "packed8"}
"""The variants that are the trained models themselves."""


class Reader(Protocol):
    """What reads batches of texts, and says what that took."""

    def ask(self, batches: Sequence[Sequence[str]]) -> dict[str, Any]: ...


class Worker(Answering):
    """A variant in a process of its own; `first` is its answer to the first text."""

    def __init__(self, variant: Variant, forms: Forms, length: int, text: str) -> None:
        script = Path(__file__).with_name("otherwise_worker.py")
        command = [sys.executable, script, variant.runtime, forms.path(variant.form)]
        super().__init__([*command, forms.folder / "tokenizer" / "tokenizer.json", str(length), text], ONE_THREAD)

    def ask(self, batches: Sequence[Sequence[str]]) -> dict[str, Any]:
        return self.send(batches=batches)


def rates(
    readers: Mapping[str, Reader], loads: Mapping[str, Sequence[Sequence[str]]], rounds: int
) -> dict[str, dict[str, float]]:
    """Medians over rounds: rows a processor second of each load, and the ratio to the baseline in the same round.

    Args:
        readers: the variants.
        loads: batches of texts by name.
        rounds: in each of which all variants read all loads; one more comes first and does not count.
    """
    taken: dict[tuple[str, str], list[float]] = {(name, load): [] for name in readers for load in loads}
    for number in range(rounds + 1):
        for name, reader in readers.items():
            for load, batches in loads.items():
                used = reader.ask(batches)["seconds"]
                if number:
                    taken[name, load].append(sum(map(len, batches)) / used)
    found: dict[str, dict[str, float]] = {name: {} for name in readers}
    for (name, load), values in taken.items():
        ratios = [a / b for a, b in zip(values, taken[BASELINE, load], strict=True)]
        found[name][f"rows_per_second_{load}"] = statistics.median(values)
        found[name][f"over_lora_{load}"] = statistics.median(ratios)
    return found


def scores(readers: Mapping[str, Reader], texts: Sequence[str], labels: Sequence[int]) -> dict[str, dict[str, float]]:
    """Accuracy, and shares of other answers than the LoRA and than the model that was trained."""
    batches = [texts[start : start + MANY] for start in range(0, len(texts), MANY)]
    answers = {name: answers_of(reader.ask(batches)["logits"]) for name, reader in readers.items()}
    return {
        name: {
            "accuracy": 100 * float((found == labels).mean()),
            "changed": 100 * float((found != answers[BASELINE]).mean()),
            "changed_by_export": 100 * float((found != answers[REFERENCES[VARIANTS[name].method]]).mean()),
        }
        for name, found in answers.items()
    }


def started(
    variants: Mapping[str, Variant], forms: Forms, length: int, texts: Sequence[str]
) -> tuple[dict[str, Worker], dict[str, dict[str, float]]]:
    """A process for each variant, and its bytes, seconds to the first answer, and peak of memory."""
    workers, found = {}, {}
    for name, variant in variants.items():
        print(f"{name}: writing and loading ({time.process_time():.0f} s)", file=sys.stderr)
        worker = workers[name] = Worker(variant, forms, length, texts[0])
        found[name] = {
            "bytes": forms.bytes(variant.form),
            "first_answer_seconds": worker.first["since_start"],
            "peak_bytes": worker.ask([texts[:MANY]])["peak"],
        }
    return workers, found


def measure(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train what is missing, write every form, and measure the variants."""
    runs = trained(given.runs or folder / "runs", given.steps)
    wanted = {name: each for name, each in VARIANTS.items() if given.compiled or each.runtime != "compiled"}
    left_out = {name: f"{', '.join(each.missing)} is missing" for name, each in wanted.items() if each.missing}
    for name, why in left_out.items():
        print(f"{VARIANTS[name].title} is left out: {why}", file=sys.stderr)
    forms = Forms(runs, folder)
    texts, labels = test_rows(given.rows)
    length = runs["lora"].info.max_length
    present = {name: each for name, each in wanted.items() if name not in left_out}
    workers, found = started(present, forms, length, texts)
    parts: list[dict[str, dict[str, float]]] = [found]
    parts.append(scores(workers, texts, labels))
    loads = {"1": [[text] for text in texts[: given.texts]]}
    loads[str(MANY)] = [texts[start : start + MANY] for start in range(0, MANY * given.batches, MANY)]
    parts.append(rates(workers, loads, given.rounds))
    for worker in workers.values():
        worker.close()
    return {
        "task": runs["lora"].info.task,
        "length": length,
        "rows": len(texts),
        "trained": {name: _training(run.folder) for name, run in runs.items()},
        "left_out": left_out,
        "variants": {
            name: {"title": each.title, **{key: value for part in parts for key, value in part[name].items()}}
            for name, each in present.items()
        },
    }


def _training(run: Path) -> dict[str, Any]:
    """Length and score of a training."""
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    return {"scores": metrics["scores"], "steps": metrics.get("steps")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs", type=Path, metavar="FOLDER", help="of runs by method; missing ones are trained there"
    )
    parser.add_argument("--steps", type=int, default=100, help="of a training that is missing")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--texts", type=int, default=12, help="single texts of a round")
    parser.add_argument("--batches", type=int, default=1, help="batches of a round")
    parser.add_argument("--rows", type=int, default=2501, help="test texts that are scored, by default all")
    parser.add_argument("--compiled", action="store_true", help="measure the compiled integer model too")
    parser.add_argument("--decoder", action="store_true", help="measure a language model instead")
    parser.add_argument("--llama-python", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--decoder-steps", type=int, default=40, help="of the language model's trainings")
    parser.add_argument("--decoder-rows", type=int, default=40, help="test texts that it is scored on")
    parser.add_argument("--tokens", type=int, default=24, help="that it writes in a round")
    parser.add_argument("--folder", type=Path, help="keep the forms here, and go on with those that are here")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    given = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        # The language model needs gguf, which the classifier does not.
        part = importlib.import_module("otherwise_decoder").measure if given.decoder else measure
        found = part(given, given.folder or Path(scratch))
    versions = {name: _version(name) for name in PACKAGES}
    result = {
        **{name: getattr(given, name) for name in ("rounds", "texts", "batches")},
        "machine": {**processor(), "load_average": [load, os.getloadavg()[0]]},
        "versions": {"bayeslora": bayeslora.__version__, **{name: each for name, each in versions.items() if each}},
        **found,
    }
    print_result(result, given.output)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()

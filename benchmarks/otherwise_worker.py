"""One variant of `otherwise.py` in a process of its own, which imports what that variant needs and no more.

    python benchmarks/otherwise_worker.py RUNTIME FOLDER TOKENIZER LENGTH TEXT

Answers TEXT, and then each line of standard input, `{"batches": [[text, …], …]}`, with a line of JSON: the logits, the
processor seconds that the model took for these texts, those of the process since its start, and its peak of memory.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from resident import peak_bytes
from tokenizers import Tokenizer

Encoded = dict[str, Any]
Read = Callable[[Encoded], Any]
"""Returns the logits (rows, classes) of a batch of ids, masks and types (rows, tokens)."""


def lora(folder: Path) -> Read:
    """An adapter on its base, not merged."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained((folder / "base.txt").read_text())
    return in_torch(PeftModel.from_pretrained(base, folder))


def packed(folder: Path) -> Read:
    """The same of this library, whose import lets PEFT read packed files."""
    import bayeslora  # noqa: F401 - registers its methods

    return lora(folder)


def merged(folder: Path) -> Read:
    """A folder of Transformers, in the type of its weights."""
    from transformers import AutoModelForSequenceClassification

    return in_torch(AutoModelForSequenceClassification.from_pretrained(folder, dtype="auto"))


def torchao(folder: Path) -> Read:
    """Weights in torchao's layout, as its documentation loads them."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(folder))
    model.load_state_dict(torch.load(folder / "model.pt", weights_only=False), assign=True)
    # Positions are in no file.
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            values = torch.zeros if name.endswith("token_type_ids") else lambda *size: torch.arange(size[-1])[None]
            module, _, last = name.rpartition(".")
            model.get_submodule(module).register_buffer(last, values(*buffer.shape).long(), persistent=False)
    return in_torch(model)


def integer(folder: Path) -> Read:
    """This library's integer model."""
    import bayeslora

    return in_torch(bayeslora.load_integer(folder))


def compiled(folder: Path) -> Read:
    """The same, compiled."""
    import bayeslora

    model = bayeslora.load_integer(folder)
    bayeslora.compile_inference(model)
    return in_torch(model)


def in_torch(model: Any) -> Read:
    import torch

    torch.set_num_threads(1)
    model.eval()

    @torch.inference_mode()
    def read(batch: Encoded) -> Any:
        return model(**{name: torch.from_numpy(values) for name, values in batch.items()}).logits.float().numpy()

    return read


def in_onnxruntime(folder: Path) -> Read:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    return lambda batch: session.run(None, {name: batch[name] for name in names})[0]


def in_openvino(folder: Path) -> Read:
    import openvino

    file = next(path for name in ("model.xml", "model.onnx") if (path := folder / name).is_file())
    settings = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY"}
    model = openvino.Core().compile_model(file, "CPU", settings)
    names = [each.any_name for each in model.inputs]
    return lambda batch: model({name: batch[name] for name in names})[0]


RUNTIMES: Mapping[str, Callable[[Path], Read]] = {
    "lora": lora,
    "packed": packed,
    "merged": merged,
    "torchao": torchao,
    "integer": integer,
    "compiled": compiled,
    "onnxruntime": in_onnxruntime,
    "openvino": in_openvino,
}


def encoder(file: Path, length: int) -> Callable[[list[str]], Encoded]:
    """A function that returns the inputs of texts, padded to the longest."""
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding()

    def encode(texts: list[str]) -> Encoded:
        rows = tokenizer.encode_batch(texts)
        columns = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
        return {name: np.array([getattr(row, key) for row in rows], dtype=np.int64) for name, key in columns.items()}

    return encode


def main() -> None:
    runtime, folder, file, length, text = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    read, encode = RUNTIMES[runtime](Path(folder)), encoder(Path(file), int(length))

    def answer(batches: list[list[str]]) -> None:
        encoded = [encode(texts) for texts in batches]
        start = time.process_time()
        logits = [read(batch).tolist() for batch in encoded]
        used = time.process_time() - start
        found = {"logits": sum(logits, []), "seconds": used, "since_start": time.process_time(), "peak": peak_bytes()}
        print(json.dumps(found), file=answers, flush=True)

    answer([[text]])
    for line in sys.stdin:
        answer(json.loads(line)["batches"])


if __name__ == "__main__":
    main()

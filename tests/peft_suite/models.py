"""Small random models on disk, in place of the hub models that PEFT's tests download.

Two choices matter. Weights are large (standard deviation 0.5), because upstream asserts that adapters *change*
outputs, and with the usual 0.02 two layers of width 16 say almost the same thing whatever one does to them. And folder
names avoid the words upstream reads as an architecture (see `cache.TELLING_WORDS`).
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = 120
SPREAD = 0.5


def _opt(width: int = 16, spread: float = SPREAD) -> PreTrainedModel:
    config = OPTConfig(
        hidden_size=width,
        word_embed_proj_dim=width,
        ffn_dim=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        init_std=spread,
        dropout=0.0,
    )
    return OPTForCausalLM(config)


def _rotary(config_class: type, model_class: type) -> PreTrainedModel:
    config = config_class(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        initializer_range=SPREAD,
    )
    return model_class(config)


def _gpt2() -> PreTrainedModel:
    config = GPT2Config(
        n_embd=16,
        n_layer=2,
        n_head=4,
        vocab_size=VOCABULARY,
        n_positions=64,
        initializer_range=SPREAD,
        bos_token_id=0,
        eos_token_id=1,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config)


def _t5() -> PreTrainedModel:
    config = T5Config(
        d_model=16,
        d_ff=32,
        d_kv=4,
        num_layers=2,
        num_heads=4,
        vocab_size=VOCABULARY,
        initializer_factor=1.0,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return T5ForConditionalGeneration(config)


def _bert(model_class: type) -> PreTrainedModel:
    config = BertConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        initializer_range=SPREAD,
    )
    return model_class(config)


BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "tiny-OPT": _opt,
    # 8-bit and 4-bit kernels want more than 16 columns, and milder weights keep quantization errors comparable.
    "tiny-OPT-wide": lambda: _opt(width=128, spread=0.1),
    "tiny-lma": lambda: _rotary(LlamaConfig, LlamaForCausalLM),
    "tiny-mistral": lambda: _rotary(MistralConfig, MistralForCausalLM),
    "tiny-qwen2": lambda: _rotary(Qwen2Config, Qwen2ForCausalLM),
    "tiny-gpt-2": _gpt2,
    "tiny-t5": _t5,
    "tiny-Bert": lambda: _bert(BertModel),
    "tiny-Bert-classifier": lambda: _bert(BertForSequenceClassification),
}
DECODERS = ("tiny-OPT", "tiny-lma", "tiny-mistral", "tiny-qwen2", "tiny-gpt-2")
LORA_FOLDER = "lora-config"


def _install(folder: Path, write: Callable[[Path], object]) -> None:
    """Write beside and rename, so that parallel test workers never see half a folder."""
    if folder.is_dir():
        return
    scratch = Path(tempfile.mkdtemp(dir=folder.parent))
    write(scratch)
    try:
        os.rename(scratch, folder)
    except OSError:  # another worker was first
        shutil.rmtree(scratch)


def _write_lora_config(folder: Path) -> None:
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "target_modules": ["q_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def build(folder: Path) -> dict[str, str]:
    """Make what is missing under `folder`; returns name -> path."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, builder in BUILDERS.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            _install(folder / name, lambda target, builder=builder: builder().save_pretrained(target))
    _install(folder / LORA_FOLDER, _write_lora_config)
    return {name: str(folder / name) for name in (*BUILDERS, LORA_FOLDER)}

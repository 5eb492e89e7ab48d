"""Shared by every test: an offline process, fixed seeds, and models small enough to build in milliseconds.

The models come from configurations, never from a hub. Each fixture returns a new model in evaluation mode, on the CPU,
in float32. A test that needs a model on disk takes a `*_folder` fixture, which also holds the tokenizer.
"""

from __future__ import annotations

import os

# Before the first import of a Hugging Face library: they read these once.
for _name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ[_name] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("ACCELERATE_USE_CPU", "true")
os.environ.setdefault("WANDB_DISABLED", "true")

import base64  # noqa: E402
import gc  # noqa: E402
import random  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors  # noqa: E402
from transformers import (  # noqa: E402
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

WORDS = """
the a an and but or not no is was it this that film movie plot actor scene story ending music joke director camera
good great fine warm funny clever moving lovely brilliant honest bad poor dull cold tired clumsy boring awful terrible
hollow very quite never always almost too far from with without of in on at for to by as its his her their one two
three cat dog sat ran mat tree house red blue green hello world who what when why how yes question answer
""".split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = SPECIAL + WORDS + [chr(c) for c in range(ord("a"), ord("z") + 1) if chr(c) not in WORDS] + list(".,!?'-")

EMPTY_PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
)
"""One pixel."""

# One compute thread a worker keeps parallel test runs from fighting over cores, and sums in one fixed order.
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """A Trainer collects garbage at the end of every run: half a second, without this, for what imports have left."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _fixed_seeds() -> Iterator[None]:
    """Every test starts from the same random state, in any order and on any worker."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield


@pytest.fixture
def undrawn_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports are written with an empty picture for each figure, which saves two seconds a run.

    For tests of something else: fixtures that train for a whole module, and the tests in `report`, draw them.
    """
    monkeypatch.setattr("bayeslora.report.page.png_bytes", lambda figure: EMPTY_PNG)
    monkeypatch.setattr("bayeslora.report.page.inline_svg", lambda figure, name: "<svg></svg>")


def _seeded(build: type[PreTrainedModel], config: object) -> PreTrainedModel:
    """Builds `build(config)` with weights that do not depend on what ran before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(config).eval()


def build_tiny_bert(num_labels: int = 2, **overrides: object) -> PreTrainedModel:
    """BERT for sequence classification: 2 layers, hidden 32, 4 heads; targets `query`, `key`, `value`."""
    settings = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "num_labels": num_labels,
        "pad_token_id": 0,
    }
    return _seeded(BertForSequenceClassification, BertConfig(**{**settings, **overrides}))


def build_tiny_deberta(num_labels: int = 2, **overrides: object) -> PreTrainedModel:
    """DeBERTa-v2 as v3 uses it: relative positions, shared projections; targets `query_proj`, `key_proj`, …"""
    settings = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "pooler_dropout": 0.0,
        "pooler_hidden_size": 32,
        "relative_attention": True,
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "type_vocab_size": 0,
        "num_labels": num_labels,
        "pad_token_id": 0,
    }
    return _seeded(DebertaV2ForSequenceClassification, DebertaV2Config(**{**settings, **overrides}))


def build_tiny_llama(**overrides: object) -> PreTrainedModel:
    """Llama with grouped keys and values (4 heads, 2 key-value heads); targets `q_proj`, `k_proj`, `v_proj`, …"""
    settings = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }
    return _seeded(LlamaForCausalLM, LlamaConfig(**{**settings, **overrides}))


def build_tiny_gpt2(**overrides: object) -> PreTrainedModel:
    """GPT-2, whose projections are Conv1D and fused; target `c_attn`."""
    settings = {
        "vocab_size": len(VOCABULARY),
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }
    return _seeded(GPT2LMHeadModel, GPT2Config(**{**settings, **overrides}))


def build_tiny_tokenizer(causal: bool = False) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over `VOCABULARY`; with `causal` it adds no [CLS]/[SEP] and has a chat template."""
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    if causal:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="[CLS]", eos_token="[SEP]", **special)
        tokenizer.chat_template = "{% for message in messages %}{{ message['content'] + '[SEP]' }}{% endfor %}"
        return tokenizer
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", VOCABULARY.index("[CLS]")), ("[SEP]", VOCABULARY.index("[SEP]"))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, cls_token="[CLS]", sep_token="[SEP]", model_max_length=128, **special
    )


@pytest.fixture
def tiny_bert() -> PreTrainedModel:
    return build_tiny_bert()


@pytest.fixture
def tiny_deberta() -> PreTrainedModel:
    return build_tiny_deberta()


@pytest.fixture
def tiny_llama() -> PreTrainedModel:
    return build_tiny_llama()


@pytest.fixture
def tiny_gpt2() -> PreTrainedModel:
    return build_tiny_gpt2()


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return build_tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny_tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer alone, as `AutoTokenizer.from_pretrained` reads it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BERT and its tokenizer on disk. Shared by all tests: read it, do not write into it."""
    folder = tmp_path_factory.mktemp("tiny-bert")
    build_tiny_bert().save_pretrained(folder)
    build_tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_causal_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal language model of the Llama family and its tokenizer on disk. Read it, do not write into it.

    The folder's name says nothing of the family: PEFT and transformers look for family names in paths.
    """
    folder = tmp_path_factory.mktemp("tiny-causal")
    build_tiny_llama().save_pretrained(folder)
    build_tiny_tokenizer(causal=True).save_pretrained(folder)
    return folder

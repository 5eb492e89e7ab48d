"""The tokenizer's fields of a GGUF file."""

from __future__ import annotations

import json
from typing import Any

import gguf
from transformers import PreTrainedTokenizerBase

from bayeslora.errors import BayesLoraError

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {_WORDS % "": "qwen2", _WORDS % "{1,3}": "llama-bpe"}
"""llama.cpp's names of tokenizers by the pattern that splits a text."""


def add_vocabulary(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Add tokens, merges, special tokens and the chat template.

    Args:
        writer: of the file.
        tokenizer: a fast one of the kind byte-level BPE.
        rows: of the model's embedding; those without a token get a name that no text has.

    Raises:
        BayesLoraError: another kind of tokenizer.
    """
    described = _described(tokenizer)
    named = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    names = [*named, *[None] * (rows - len(named))][:rows]
    added = tokenizer.added_tokens_decoder
    tokens = [f"[PAD{number}]" if name is None else name for number, name in enumerate(names)]
    unused = gguf.TokenType.UNUSED
    kinds = [unused if name is None else _kind(added.get(number)) for number, name in enumerate(names)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitter(described))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = described["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for special in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id"):
        number = getattr(tokenizer, special)
        if number is not None:
            getattr(writer, f"add_{special}")(number)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def splitter(described: dict[str, Any]) -> str:
    """Return llama.cpp's name of the rule that splits a text into words.

    Args:
        described: the tokenizer, as `tokenizer.json` describes it.

    Raises:
        BayesLoraError: llama.cpp has no such rule.
    """
    rule = described["pre_tokenizer"] or {}
    steps = rule.get("pretokenizers", [rule])
    kinds, last = [step.get("type") for step in steps], steps[-1]
    if kinds[-1] == "ByteLevel" and not last.get("add_prefix_space"):
        if kinds == ["ByteLevel"] and last.get("use_regex", True):
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and last.get("use_regex", True):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True):
            found = _SPLITS.get(steps[0]["pattern"].get("Regex"))
            if found is not None:
                return found
    raise BayesLoraError(
        f"the tokenizer splits texts by {', '.join(map(str, kinds))}, but must split them as GPT-2, SmolLM, Qwen2 or "
        "Llama 3 do: export another format"
    )


def _described(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described: dict[str, Any] = {} if backend is None else json.loads(backend.to_str())
    model = described.get("model", {})
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise BayesLoraError(
            f"the tokenizer is a {model.get('type') or type(tokenizer).__name__}, but must be a byte-level BPE: "
            "give the model's tokenizer, or export another format"
        )
    if (described.get("normalizer") or {}).get("type", "NFC") != "NFC":
        raise BayesLoraError("the tokenizer changes texts before it splits them, but must not: export another format")
    return described


def _kind(added: Any) -> gguf.TokenType:
    if added is None:
        return gguf.TokenType.NORMAL
    return gguf.TokenType.CONTROL if added.special else gguf.TokenType.USER_DEFINED

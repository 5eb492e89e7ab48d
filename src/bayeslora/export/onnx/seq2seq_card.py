"""The card of an encoder-decoder's ONNX folder: what it is, how to write with it without this library, its error."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedModel

from bayeslora.export.onnx.card import Page, named_tokens
from bayeslora.export.onnx.seq2seq import start_token
from bayeslora.export.onnx.seq2seq_families import FAMILIES

_PROGRAM = '''import numpy as np
import onnxruntime
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("tokenizer.json")CUT
encoder = onnxruntime.InferenceSession("encoder_model.onnx")
decoder = onnxruntime.InferenceSession("decoder_model.onnx")
caches = [each for each in decoder.get_inputs() if ".decoder." in each.name]
start, ends = START, ENDS


def generate(text, most=MOST):
    """Return the answer to the text, the likeliest token each time, at most this many."""
    ids = np.array([tokenizer.encode(text).ids], dtype=np.int64)
    mask = np.ones_like(ids)
    names = [each.name for each in encoder.get_outputs()]
    read = dict(zip(names, encoder.run(None, {"input_ids": ids, "attention_mask": mask})))
    seen = {name.replace("present", "past_key_values"): each for name, each in read.items() if ".encoder." in name}
    past = {each.name: np.zeros((1, each.shape[1], 0, each.shape[3]), dtype=np.float32) for each in caches}
    written = [start]
    while len(written) <= most:
        new = np.array([written[-1:]], dtype=np.int64)
        logits, *present = decoder.run(None, {"input_ids": new, "encoder_attention_mask": mask, **past, **seen})
        token = int(logits[0, -1].argmax())FORCED
        if token in ends:
            break
        written.append(token)
        past = dict(zip(past, present))
    return tokenizer.decode(written[1:])


print(generate("The film is long, and it is good."))'''
_MOST = 40
_PLAIN = {
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "do_sample": False,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "exponential_decay_length_penalty": None,
    "guidance_scale": 1.0,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "sequence_bias": None,
    "stop_strings": None,
    "suppress_tokens": None,
}
"""Settings of `generate` with which it writes the likeliest token each time, as the program does."""


def seq2seq_page(model: PreTrainedModel) -> Page:
    """Return the page of an encoder-decoder."""
    own: Any = model.config
    blocks, heads, size = FAMILIES[type(model).__name__].sizes(own, "decoder")
    positions = getattr(own, "max_position_embeddings", None)
    files = f"""| `encoder_model.onnx` | the graph that reads a text; inputs and outputs have Optimum's names |
| `decoder_model.onnx` | the graph that writes the answer |
| `config.json`, `generation_config.json` | the model's configuration, and how it generates |
| `tokenizer.json` | the tokenizer |

The encoder reads `input_ids` and `attention_mask`, int64 (batch, source). For each of the decoder's
{blocks} blocks it returns `present.0.encoder.key` and `.value`, float32 (batch, {heads}, source,
{size}). The decoder takes them as `past_key_values.0.encoder.key` and `.value`, the same mask as
`encoder_attention_mask`, its new tokens as `input_ids`, int64 (batch, length), and the keys and values of those
before as `past_key_values.0.decoder.key` and `.value`, (batch, {heads}, past, {size}), of length 0 at first. It
returns `logits`, float32 (batch, length, {own.vocab_size}), and `present.0.decoder.key` and `.value`."""
    said = "\n\n".join([files, *_limits(model.generation_config, positions)])
    return "text-generation", said, _program(model, positions), "next tokens"


def _limits(generation: Any, positions: int | None) -> Iterator[str]:
    """Yield paragraphs about what model and program cannot do."""
    if positions is not None:
        yield f"The model knows {positions} positions: a text or answer has at most as many tokens."
    given = {name: getattr(generation, name, None) for name in _PLAIN}
    others = [f"`{name}={value!r}`" for name, value in given.items() if value not in (None, _PLAIN[name])]
    if others:
        yield f"""The program writes the likeliest token each time, without the other settings of the model's
`generation_config`: {", ".join(others)}."""


def _program(model: PreTrainedModel, positions: int | None) -> str:
    """Return the program, which begins and ends an answer as `generate` does."""
    generation: Any = model.generation_config
    forced = ""
    for length, name in (("1", "forced_bos_token_id"), ("most", "forced_eos_token_id")):
        for token in named_tokens(getattr(generation, name, None))[:1]:
            forced += f"\n        if len(written) == {length}:  # {name}\n            token = {token}"
    values = {
        "CUT": "" if positions is None else f"\ntokenizer.enable_truncation({positions})",
        "MOST": min(_MOST, positions or _MOST),
        "START": start_token(model),
        "ENDS": named_tokens(generation.eos_token_id),
        "FORCED": forced,
    }
    program = _PROGRAM
    for name, value in values.items():
        program = program.replace(name, str(value))
    return program

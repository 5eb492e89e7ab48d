"""The card of an encoder-decoder's ONNX folder: what it is, how to write with it without this library, its error."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from bayeslora.export.onnx.card import write_page
from bayeslora.export.onnx.decoder_card import tokens_error
from bayeslora.export.onnx.seq2seq import start_token
from bayeslora.export.onnx.seq2seq_families import FAMILIES

_PROGRAM = '''import numpy as np
import onnxruntime
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("tokenizer.json")
encoder = onnxruntime.InferenceSession("encoder_model.onnx")
decoder = onnxruntime.InferenceSession("decoder_model.onnx")
caches = [each for each in decoder.get_inputs() if ".decoder." in each.name]
begin, ends = BEGIN, ENDS


def generate(text, most=40):
    """Return the likeliest answer to the text, of at most this many tokens."""
    ids = np.array([tokenizer.encode(text).ids], dtype=np.int64)
    mask = np.ones_like(ids)
    names = [each.name for each in encoder.get_outputs()]
    read = dict(zip(names, encoder.run(None, {"input_ids": ids, "attention_mask": mask})))
    seen = {name.replace("present", "past_key_values"): each for name, each in read.items() if ".encoder." in name}
    past = {each.name: np.zeros((1, each.shape[1], 0, each.shape[3]), dtype=np.float32) for each in caches}
    written, new = list(begin), np.array([begin], dtype=np.int64)
    while len(written) <= most:
        logits, *present = decoder.run(None, {"input_ids": new, "encoder_attention_mask": mask, **past, **seen})
        token = int(logits[0, -1].argmax())
        if token in ends:
            break
        written.append(token)
        new = np.array([[token]], dtype=np.int64)
        past = dict(zip(past, present))
    return tokenizer.decode(written[1:])


print(generate("summarize: The film is long, and it is good."))'''

_SETTINGS: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,), "do_sample": (False,), "no_repeat_ngram_size": (0,), "repetition_penalty": (1.0,),
    "min_length": (0,), "min_new_tokens": (0,), "bad_words_ids": (), "suppress_tokens": (),
}  # fmt: skip
"""Settings of a model's `generate` that the program lacks, and the values with which they do nothing."""


def write_seq2seq_card(folder: Path, model: PreTrainedModel, config: Any, measured: Mapping[str, Any]) -> None:
    """Write `README.md`.

    Args:
        folder: of the graphs.
        model: that was written.
        config: of the adapter.
        measured: sizes and errors, as the export returns them.
    """
    own: Any = model.config
    blocks, heads, size = FAMILIES[type(model).__name__].sizes(own, "decoder")
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
    begin, ends = _ends(model)
    if left_out := _left_out(model.generation_config):
        files += f"\n\nThe program below takes the likeliest token. It leaves out what the model's {left_out} ask for."
    program = _PROGRAM.replace("BEGIN", str(begin)).replace("ENDS", str(ends))
    write_page(folder, model, config, measured, "text-generation", files, program, tokens_error(measured))


def _ends(model: PreTrainedModel) -> tuple[list[int], list[int]]:
    """Return the tokens that an answer begins with, and those that end it."""
    generation: Any = model.generation_config
    forced = getattr(generation, "forced_bos_token_id", None)
    named = model.config.eos_token_id if generation.eos_token_id is None else generation.eos_token_id
    ends = named if isinstance(named, list) else [named]
    begin = [start_token(model), *([] if forced is None else [forced])]
    return [int(token) for token in begin if token is not None], sorted(
        int(token) for token in ends if token is not None
    )


def _left_out(generation: Any) -> str:
    """Return the settings of the model's `generate` that change which token is taken, as text; empty if none does."""
    found = {name: getattr(generation, name, None) for name in _SETTINGS}
    return ", ".join(f"`{name}={value}`" for name, value in found.items() if value not in (None, *_SETTINGS[name]))

"""The card of an encoder-decoder's ONNX folder: what it is, how to write with it without this library, its error."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from bayeslora.export.onnx.card import write_page
from bayeslora.export.onnx.decoder_card import tokens_error

_PROGRAM = '''import numpy as np
import onnxruntime
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("tokenizer.json")
encoder = onnxruntime.InferenceSession("encoder_model.onnx")
decoder = onnxruntime.InferenceSession("decoder_model.onnx")
caches = [each for each in decoder.get_inputs() if ".decoder." in each.name]
start, ends = START, ENDS


def generate(text, most=40):
    """Return the likeliest answer to the text, of at most this many tokens."""
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
        token = int(logits[0, -1].argmax())
        if token in ends:
            break
        written.append(token)
        past = dict(zip(past, present))
    return tokenizer.decode(written[1:])


print(generate("summarize: The film is long, and it is good."))'''


def write_seq2seq_card(folder: Path, model: PreTrainedModel, config: Any, measured: Mapping[str, Any]) -> None:
    """Write `README.md`.

    Args:
        folder: of the graphs.
        model: that was written.
        config: of the adapter.
        measured: sizes and errors, as the export returns them.
    """
    own: Any = model.config
    heads, size = own.num_heads, own.d_kv
    files = f"""| `encoder_model.onnx` | the graph that reads a text; inputs and outputs have Optimum's names |
| `decoder_model.onnx` | the graph that writes the answer |
| `config.json` | the model's configuration |
| `tokenizer.json` | the tokenizer |

The encoder reads `input_ids` and `attention_mask`, int64 (batch, source). For each of the decoder's
{own.num_decoder_layers} blocks it returns `present.0.encoder.key` and `.value`, float32 (batch, {heads}, source,
{size}). The decoder takes them as `past_key_values.0.encoder.key` and `.value`, the same mask as
`encoder_attention_mask`, its new tokens as `input_ids`, int64 (batch, length), and the keys and values of those
before as `past_key_values.0.decoder.key` and `.value`, (batch, {heads}, past, {size}), of length 0 at first. It
returns `logits`, float32 (batch, length, {own.vocab_size}), and `present.0.decoder.key` and `.value`."""
    named = own.eos_token_id
    ends = sorted(int(token) for token in (named if isinstance(named, list) else [named]) if token is not None)
    program = _PROGRAM.replace("START", str(int(own.decoder_start_token_id))).replace("ENDS", str(ends))
    write_page(folder, model, config, measured, "text-generation", files, program, tokens_error(measured))

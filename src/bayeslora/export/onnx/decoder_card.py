"""The card of a decoder's ONNX folder: what it is, how to write with it without this library, its error and source."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bayeslora.export.onnx.card import Page, named_tokens
from bayeslora.export.onnx.decoders import cache_sizes

_PROGRAM = '''import numpy as np
import onnxruntime
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("tokenizer.json")
session = onnxruntime.InferenceSession("model.onnx")
caches = [each for each in session.get_inputs() if each.name.startswith("past_key_values")]
ends = ENDS


def generate(text, most=40):
    """Return the likeliest words after the text, at most this many tokens."""
    tokens, written = tokenizer.encode(text).ids, []
    past = {each.name: np.zeros((1, each.shape[1], 0, each.shape[3]), dtype=np.float32) for each in caches}
    new = tokens
    while len(written) < most:
        total = len(tokens) + len(written)
        feeds = {
            "input_ids": np.array([new], dtype=np.int64),
            "attention_mask": np.ones((1, total), dtype=np.int64),
            "position_ids": np.arange(total - len(new), total, dtype=np.int64)[None],
        }
        logits, *present = session.run(None, {**feeds, **past})
        token = int(logits[0, -1].argmax())
        if token in ends:
            break
        written.append(token)
        new, past = [token], dict(zip(past, present))
    return tokenizer.decode(written)


print(generate("The film is"))'''


def decoder_page(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Page:
    """Return the page of a decoder."""
    count, heads, size = cache_sizes(model.config)
    files = f"""| `model.onnx` | the graph, whose inputs and outputs have the names that Optimum gives them |
| `config.json`, `generation_config.json` | the model's configuration, and how it generates |
| `tokenizer.json` | the tokenizer |

`input_ids` and `position_ids` are int64 (batch, length); `attention_mask` is int64 (batch, past + length). Each of the
{count} blocks has its keys and values: `past_key_values.0.key` and `.value` enter, float32
(batch, {heads}, past, {size}), and `present.0.key` and `.value` leave, (batch, {heads}, past + length, {size}).
`logits` are float32 (batch, length, {model.config.vocab_size})."""
    ends = {*named_tokens(model.config.eos_token_id), *named_tokens(tokenizer.eos_token_id)}
    program = _PROGRAM.replace("ENDS", str(sorted(ends)))
    return "text-generation", files, program, "next tokens"

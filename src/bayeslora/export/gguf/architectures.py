r"""Facts that llama.cpp needs of a model: names of the tensors, their layout, and the configuration.

llama.cpp rotates neighbouring entries of a head of Llama, where Transformers rotates entry $i$ with $i + d/2$. So the
rows of its query and key projections are written in the order $0, d/2, 1, d/2 + 1, \dots$ of each head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel

from bayeslora.errors import BayesLoraError
from bayeslora.export.gguf.blocks import Array

ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Architecture:
    """A family of models.

    Attributes:
        kind: gguf's number of it.
        write: adds the configuration of a model to a file.
        interleaves: whether llama.cpp rotates neighbouring entries of a head.
    """

    kind: gguf.MODEL_ARCH
    write: Callable[[gguf.GGUFWriter, Any], None]
    interleaves: bool = False

    @property
    def name(self) -> str:
        """The name in the files."""
        return str(gguf.MODEL_ARCH_NAMES[self.kind])


def _add_gpt2(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)


def _add_llama(writer: gguf.GGUFWriter, config: Any) -> None:
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if size * heads != config.hidden_size:
        writer.add_key_length(size)
        writer.add_value_length(size)


ARCHITECTURES = {
    "gpt2": Architecture(gguf.MODEL_ARCH.GPT2, _add_gpt2),
    "llama": Architecture(gguf.MODEL_ARCH.LLAMA, _add_llama, interleaves=True),
    "qwen2": Architecture(gguf.MODEL_ARCH.QWEN2, _add_llama),
}
"""By `model_type` of Transformers."""

_ACTIVATIONS = {"gpt2": "gelu_new", "llama": "silu", "qwen2": "silu"}
_ROPES = ("default", "llama3")


def architecture_of(model: PreTrainedModel) -> Architecture:
    """Return the family of a decoder language model.

    Raises:
        BayesLoraError: another model, or one with a part that llama.cpp computes in another way.
    """
    config: Any = model.config
    if config.model_type not in ARCHITECTURES or not hasattr(model, "lm_head"):
        raise BayesLoraError(
            f"{type(model).__name__} has no GGUF form here, but language models of the families "
            f"{', '.join(sorted(ARCHITECTURES))} have: export another format"
        )
    activation = getattr(config, "hidden_act", None) or config.activation_function
    if activation != _ACTIVATIONS[config.model_type]:
        raise BayesLoraError(
            f"the model computes {activation}, but llama.cpp computes {_ACTIVATIONS[config.model_type]} in "
            f"{config.model_type}: export another format"
        )
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in _ROPES:
        raise BayesLoraError(
            f"the model's rope_type is {rope}, but must be {' or '.join(_ROPES)}: export another format"
        )
    if getattr(config, "use_sliding_window", False):
        raise BayesLoraError("the model attends in a sliding window, but must not: export another format")
    return ARCHITECTURES[config.model_type]


class Names:
    """Names of a model's tensors in GGUF, and the order of their rows."""

    def __init__(self, architecture: Architecture, config: Any) -> None:
        self._map = gguf.get_tensor_name_map(architecture.kind, config.num_hidden_layers)
        self._heads = {}
        if architecture.interleaves:
            self._heads = {".attn_q": config.num_attention_heads, ".attn_k": config.num_key_value_heads}

    def of(self, path: str) -> str:
        """Return the name of the tensor at `path`, such as `model.layers.0.self_attn.q_proj.weight`."""
        owner, _, leaf = path.rpartition(".")
        found = self._map.get_name(owner)
        if found is None:
            raise BayesLoraError(f"{path} has no name in GGUF, but every tensor needs one: export another format")
        return f"{found}.{leaf}"

    def order(self, name: str, rows: int) -> Array:
        """Return the order (rows,) in which the rows of a tensor of the model are written."""
        heads = self._heads.get("." + name.split(".")[-2])
        if heads is None:
            return np.arange(rows)
        return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def rope_factors(model: PreTrainedModel) -> Array | None:
    """Return what llama.cpp divides the frequencies of the rotation by (head size / 2,); None where it need not."""
    rope = getattr(model.config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") == "default":
        return None
    frequencies = model.get_submodule("model.rotary_emb").inv_freq
    assert isinstance(frequencies, torch.Tensor)
    exponents = torch.arange(len(frequencies), dtype=torch.float64) / len(frequencies)
    plain = float(rope["rope_theta"]) ** -exponents
    return np.asarray((plain / frequencies.detach().cpu().double()).float())

"""A model taken apart for a GGUF file: its base, the learned weights, and the adapter's updates."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from gguf import GGMLQuantizationType as Type
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from bayeslora._peft import AuxiliaryTrainingWrapper
from bayeslora.errors import BayesLoraError
from bayeslora.export.formats import adapted_parts, lora_layers, only_active, to_take_apart, upright
from bayeslora.export.gguf.architectures import Architecture, Names, architecture_of
from bayeslora.export.gguf.blocks import Array
from bayeslora.export.gguf.layers import UNADAPTED, Weight, learned_weight, update_of
from bayeslora.export.merged import left_out_activations, merge_into_base
from bayeslora.export.onnx.products import array
from bayeslora.methods.layer import BayesLayer
from bayeslora.methods.tuner import tuner_of
from bayeslora.model_card import base_name

FORMS = ("beside", "merged", "only")


@dataclass
class Parts:
    """A model taken apart.

    Attributes:
        base: without the adapter, or with it merged.
        architecture: of the base.
        form: one of `FORMS`.
        plain: type of weights without a learned width.
        learned: weights with a learned width, by the path of their layer.
        updates: A (r, d_in) and B (d_out, r) by the path of their layer; none if they are merged.
        left_out: learned quantizers that the files cannot hold, or None.
        name: public name of the base.
        method: that trained the adapter.
    """

    base: PreTrainedModel
    architecture: Architecture
    form: str
    plain: Type
    learned: dict[str, Weight]
    updates: dict[str, tuple[Array, Array]]
    left_out: str | None
    name: str
    method: str

    @property
    def names(self) -> Names:
        """Names of the base's tensors."""
        return Names(self.architecture, self.base.config)


def taken_apart(model: nn.Module, adapter_name: str | None, form: str | None, unadapted: str | None) -> Parts:
    """Return the parts of a copy of the model; the base's weights share the original's memory until they change.

    Raises:
        BayesLoraError: a model, an adapter or an option that has no GGUF form.
    """
    whole, layers, name = _copied(model, adapter_name)
    base = cast(PreTrainedModel, whole.get_base_model())
    architecture = architecture_of(base)
    learned = {path: weight for path, layer in layers.items() if (weight := learned_weight(layer, name))}
    form = form or ("beside" if learned else "merged")
    unadapted = unadapted or ("int8" if learned else "float16")
    _check(base, layers, form, unadapted)
    without = [left_out_activations(layers.values(), name), "base weights" if form == "only" and learned else None]
    left_out = ", ".join(filter(None, without)) or None
    config: Any = whole.peft_config[name]
    updates = {}
    if form == "merged":
        learned = {path: _summed(layers[path], name, weight.bits) for path, weight in learned.items()}
        base = cast(PreTrainedModel, merge_into_base(whole, name))
    else:
        updates = {path: update for path, layer in layers.items() if (update := update_of(layer, name))}
        base = cast(PreTrainedModel, whole.unload())
    tied, head = cast(Any, base.get_input_embeddings()), cast(Any, base.get_output_embeddings())
    base.config.tie_word_embeddings = head.weight is tied.weight
    called, method = base_name(config, base), getattr(config, "method", "lora")
    return Parts(base, architecture, form, UNADAPTED[unadapted], learned, updates, left_out, called, method)


def _summed(layer: nn.Module, name: str, bits: int | None) -> Weight:
    """Return base weight and update, to be rounded once: a file's grid holds no sum of a code and an update."""
    weight, update = array(upright(cast(BayesLayer, layer).get_base_layer())), update_of(layer, name)
    return Weight(weight if update is None else weight + update[1] @ update[0], None, bits)


def _check(base: PreTrainedModel, layers: Mapping[str, nn.Module], form: str, unadapted: str) -> None:
    """Raise `BayesLoraError` for an unknown option, or trained parts that the form cannot hold."""
    if form not in FORMS:
        raise BayesLoraError(f"adapter is {form!r}, but must be one of {', '.join(FORMS)}: choose one")
    if unadapted not in UNADAPTED:
        raise BayesLoraError(f"unadapted is {unadapted!r}, but must be one of {', '.join(UNADAPTED)}: choose one")
    if any(path.rpartition(".")[2] == "lm_head" for path in layers) and base.config.tie_word_embeddings:
        raise BayesLoraError(
            "the adapter is on lm_head, which is also the embedding, but a GGUF file has one matrix for both: "
            "train without lm_head"
        )
    embeddings = [path for path, layer in layers.items() if getattr(layer, "lora_embedding_A", None)]
    if form != "merged" and embeddings:
        raise BayesLoraError(
            f"the adapter is on the embedding {embeddings[0]}, but a LoRA file is for linear layers: "
            "give adapter='merged'"
        )
    trained = [path for path, module in base.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    if form == "only" and trained:
        raise BayesLoraError(
            f"the adapter also trains {trained[0]}, but a LoRA holds only A and B: leave out adapter='only'"
        )


def _copied(model: nn.Module, adapter_name: str | None) -> tuple[PeftModel, dict[str, nn.Module], str]:
    """Return a copy of the model to take apart, its layers with an adapter by path, and the adapter's name."""
    if tuner_of(model) is None and isinstance(model, PeftModel):
        name = adapter_name or only_active(model)
        if not lora_layers(model, name):
            raise BayesLoraError(f"the model has no LoRA {name!r}: give a model with its adapter")
        whole = copy.deepcopy(model).eval()
        return whole, lora_layers(whole, name), name
    original, tuner, name = adapted_parts(model, adapter_name)
    whole, own = to_take_apart(original, tuner, name)
    return whole, dict(own), name

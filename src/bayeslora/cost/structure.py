"""The structure of a model, read from its module tree: matrices, attention modules, transformer blocks.

Adapters and wrappers (PEFT's layers, `modules_to_save`, data-parallel and compiled modules) are ignored: a wrapped
model, its base model and the same model on the meta device have the same structure and the base model's module paths.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING
from transformers.pytorch_utils import Conv1D

from bayeslora.errors import BayesLoraError, one_line
from bayeslora.vocabulary import FUSED_PROJECTIONS, KEY_NAMES, QUERY_NAMES, VALUE_NAMES

ModelOrConfig: TypeAlias = nn.Module | PretrainedConfig
Region = Literal["attention", "encoder", "model"]

# Layers outside the transformer blocks that see one vector per sequence, not one per token.
_HEADS_BY_TOKEN = ("TokenClassification", "QuestionAnswering", "ModernBertDecoder", "EuroBert")
"""In names of classes whose head reads every token, before the pooling if there is any."""
_POOLED_NAMES = frozenset({
    "pooler", "pre_classifier", "seq_relationship", "classification_head", "summary", "sequence_summary",
    "multiple_choice_head",
})  # fmt: skip


def from_config(source: str | Path | dict[str, Any]) -> PretrainedConfig:
    """Return the Transformers configuration in a model folder, a `config.json`, or a dictionary with a `model_type`.

    Nothing is downloaded: a name that is not a path on this machine is an error.

    Raises:
        BayesLoraError: the path does not exist, or the file is not a JSON object with a known `model_type`.
    """
    if isinstance(source, dict):
        values, origin = dict(source), "the dictionary"
    else:
        path = Path(source)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise BayesLoraError(
                f"{path} does not exist, but must be a model folder or its config.json: give another path"
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise BayesLoraError(f"{path} is not valid JSON ({error}): give a model's config.json") from error
        if not isinstance(values, dict):
            raise BayesLoraError(
                f"{path} holds a JSON {type(values).__name__}, but must hold an object: give a model's config.json"
            )
        origin = str(path)
    model_type = values.pop("model_type", None)
    if not isinstance(model_type, str):
        raise BayesLoraError(
            f"{origin} lacks model_type, but a Transformers configuration must have it: "
            "give a base model's config.json, not an adapter's"
        )
    try:
        return AutoConfig.for_model(model_type, **values)
    except (KeyError, ValueError, TypeError, StrictDataclassError) as error:
        raise BayesLoraError(
            f"transformers cannot read the {model_type!r} configuration in {origin} ({one_line(error)}): "
            "check its values, or upgrade transformers"
        ) from error


def build_on_meta(config: PretrainedConfig) -> nn.Module:
    """Build the model of a configuration on the meta device, without weights; takes seconds for a model of any size.

    The class is the configuration's first `architectures` entry. Without one, it is the causal language model for a
    decoder (so that its `lm_head` counts), and otherwise the bare encoder.
    """
    import transformers

    architecture = next(iter(getattr(config, "architectures", None) or []), None)
    named = getattr(transformers, architecture, None) if isinstance(architecture, str) else None
    try:
        with torch.device("meta"):
            if named is not None:
                return named._from_config(config)
            return (AutoModelForCausalLM if is_decoder(config) else AutoModel).from_config(config)
    except (ValueError, RuntimeError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        raise BayesLoraError(
            f"transformers cannot build a {type(config).__name__} model from these values ({one_line(error)}): "
            "check the configuration"
        ) from error


def is_decoder(config: PretrainedConfig) -> bool:
    """Return whether Transformers has a causal but not a masked language model of this architecture."""
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_MASKED_LM_MAPPING


def as_model(model_or_config: ModelOrConfig) -> nn.Module:
    """Return the model itself, or a configuration's model on the meta device."""
    if isinstance(model_or_config, nn.Module):
        return model_or_config
    if isinstance(model_or_config, PretrainedConfig):
        return build_on_meta(model_or_config)
    raise BayesLoraError(
        f"the model is a {type(model_or_config).__name__}, but must be a torch module or a configuration: "
        "read a file or a dictionary with bayeslora.cost.from_config first"
    )


@dataclass(frozen=True)
class Matrix:
    """A linear layer or one-dimensional convolution; `macs` are for one position.

    `bits` is the stored width of the weights if the base model was loaded quantized (8 or 4), otherwise 32.
    """

    name: str
    in_features: int
    out_features: int
    macs: int
    bits: int = 32


@dataclass(frozen=True)
class Attention:
    """One attention module. `query`, `key`, `value` are names of matrices, all the same for a fused projection.

    `score_width` and `value_width` are heads × head size; `exact_scores` and `exact_values` are True if a quantized
    projection's output reaches the product unchanged. The position fields are DeBERTa's: `positions` relative
    positions, projected by the matrices named in `position_projections`, enter `content_to_position` (the projected
    keys' matrix) and `position_to_content` (the projected queries' matrix).
    """

    name: str
    query: str
    key: str
    value: str
    score_width: int
    value_width: int
    exact_scores: bool = True
    exact_values: bool = True
    positions: int = 0
    position_projections: tuple[str, ...] = ()
    content_to_position: str | None = None
    position_to_content: str | None = None

    @property
    def projections(self) -> tuple[str, ...]:
        """The content projections, each once."""
        return tuple(dict.fromkeys((self.query, self.key, self.value)))


@dataclass
class ModelStructure:
    """The matrices and embeddings of a model by module path, its attention modules, and the paths of its blocks."""

    matrices: dict[str, Matrix] = field(default_factory=dict)
    embeddings: dict[str, tuple[int, int]] = field(default_factory=dict)
    attentions: list[Attention] = field(default_factory=list)
    blocks: tuple[str, ...] = ()
    class_name: str = ""
    repeats: int = 1

    def __post_init__(self) -> None:
        self._attention_names = {name for a in self.attentions for name in (*a.projections, *a.position_projections)}
        # Block prefixes end in a dot, so that "layer.1." does not claim "layer.10.…".
        self._block_prefixes = tuple(f"{block}." for block in self.blocks)

    @property
    def projections(self) -> list[str]:
        """All query, key and value projections, in the order of the modules."""
        return [name for attention in self.attentions for name in attention.projections]

    def region(self, name: str) -> Region:
        """Return the narrowest scope that a matrix belongs to, adapted or not."""
        if name in self._attention_names:
            return "attention"
        return "encoder" if name.startswith(self._block_prefixes) else "model"

    def calls(self, name: str) -> int:
        """Return how often a forward pass runs the module at this path (ALBERT's layers share one block)."""
        return self.repeats if name.startswith(self._block_prefixes) else 1

    def positions(self, name: str, tokens: int) -> int:
        """Return the number of positions of `tokens` tokens that a matrix is applied to, over all its calls."""
        if self.region(name) == "model" and self.attentions:
            parts = name.split(".")
            per_token = any(kind in self.class_name for kind in _HEADS_BY_TOKEN)
            pooled = _POOLED_NAMES if per_token else _POOLED_NAMES | {"classifier"}
            if not per_token and self.class_name.endswith(("SequenceClassification", "MultipleChoice")):
                pooled = pooled | {"head"}  # ModernBERT's
            if pooled.intersection(parts):
                return 1
        return tokens * self.calls(name)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module under PEFT's layer and `modules_to_save` wrappers."""
    # Wrappers forward unknown attributes, so only their registered children count.
    while (inner := module._modules.get("base_layer", module._modules.get("original_module"))) is not None:
        module = inner
    return module


def under_wrappers(model: nn.Module) -> nn.Module:
    """Return the model under data-parallel and compiled wrappers, with its adapters."""
    while True:
        if "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        elif list(model._modules) == ["module"] and "Parallel" in type(model).__name__:
            model = model.get_submodule("module")
        else:
            return model


def base_model(model: nn.Module) -> nn.Module:
    """Return the model under data-parallel, compiled and PEFT wrappers, or that of the PEFT model in a larger one."""
    inner = next((module for module in model.modules() if isinstance(module, PeftModel)), None)
    return under_wrappers(model if inner is None else inner.get_base_model())


def walk(module: nn.Module, name: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module of the base model once, without its wrappers, with its path."""
    seen = set() if seen is None else seen
    module = unwrapped(module)
    if id(module) in seen:
        return
    seen.add(id(module))
    yield name, module
    for child_name, child in module._modules.items():
        if child is not None:
            yield from walk(child, f"{name}.{child_name}" if name else child_name, seen)


def is_adapted(module: nn.Module) -> bool:
    """Return whether this is one of PEFT's layers around a base layer."""
    return "base_layer" in module._modules


def _stored_bits(module: nn.Module) -> int:
    """Return the width of a layer's stored weights; 32 for every floating-point type."""
    class_name = type(module).__name__
    if class_name.startswith("Linear4bit"):
        return 4
    if class_name.startswith("Linear8bit"):
        return 8
    weight = getattr(module, "weight", None)
    if type(weight).__module__.startswith("torchao"):
        found = re.search(r"(?:u?int|float)x?(\d+)", type(weight).__name__.lower())
        return int(found.group(1)) if found else 8
    return 32


def _matrix_of(name: str, module: nn.Module) -> Matrix | None:
    """Return the matrix of a linear layer or one-dimensional convolution; None for every other module."""
    if isinstance(module, Conv1D):
        return Matrix(name, module.nx, module.nf, module.nx * module.nf)
    if isinstance(module, nn.Conv1d):
        macs = module.out_channels * (module.in_channels // module.groups) * module.kernel_size[0]
        return Matrix(name, module.in_channels, module.out_channels, macs)
    # Quantized linear layers of other libraries are recognised by the two attributes they all keep.
    n_in, n_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(n_in, int) and isinstance(n_out, int) and not module._modules:
        return Matrix(name, n_in, n_out, n_in * n_out, _stored_bits(module))
    return None


def _child(matrices: dict[str, Matrix], prefix: str, names: tuple[str, ...]) -> Matrix | None:
    paths = (f"{prefix}.{name}" if prefix else name for name in names)
    return next((matrices[path] for path in paths if path in matrices), None)


def _heads(config: Any) -> tuple[int, int]:
    """Return the query heads and key-value heads of the text part of a configuration."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = int(getattr(config, "num_attention_heads", 1) or 1)
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):  # Falcon's
        return heads, 1
    groups = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None)
    return heads, int(groups or heads)


def _attention_of(
    name: str, module: nn.Module, matrices: dict[str, Matrix], config: Any, rotary: bool
) -> Attention | None:
    """Return an attention module, recognised by its children's names; None for every other module."""
    query = _child(matrices, name, QUERY_NAMES)
    key, value = _child(matrices, name, KEY_NAMES), _child(matrices, name, VALUE_NAMES)
    fused = _child(matrices, name, FUSED_PROJECTIONS)
    if query is not None and key is not None and value is not None:
        # Heads × value head size; with grouped-query attention keys and values have fewer heads than queries.
        score_width = query.out_features
        value_width = query.out_features * value.out_features // key.out_features
    elif fused is not None and query is not None:
        # GPT-2's cross-attention: queries in one matrix, keys and values in another.
        key = value = fused
        score_width = value_width = query.out_features
    elif fused is not None:
        heads, groups = _heads(config)
        query = key = value = fused
        score_width = value_width = heads * (fused.out_features // (heads + 2 * groups))
    else:
        return None
    norms = {child[0] for child, kind in module._modules.items() if kind is not None and "Norm" in type(kind).__name__}
    attention = Attention(
        name,
        query.name,
        key.name,
        value.name,
        score_width,
        value_width,
        exact_scores=not rotary and not norms & {"q", "k"},
        exact_values="v" not in norms,
    )
    return _with_positions(attention, module)


def _with_positions(attention: Attention, module: nn.Module) -> Attention:
    """Add DeBERTa-v2's disentangled terms: e = 2 × its position buckets, or 2 × its largest relative position."""
    if not getattr(module, "relative_attention", False) or not hasattr(module, "pos_ebd_size"):
        return attention
    kinds: Any = getattr(module, "pos_att_type", ())
    kinds = kinds.split("|") if isinstance(kinds, str) else list(kinds)
    if getattr(module, "share_att_key", False):
        # Both shared projections are applied to the positions, even if only one product follows.
        keys, queries = attention.key, attention.query
        projections: tuple[str, ...] = (attention.query, attention.key)
    else:
        keys, queries = f"{attention.name}.pos_key_proj", f"{attention.name}.pos_query_proj"
        projections = tuple(n for n, kind in ((keys, "c2p"), (queries, "p2c")) if kind in kinds)
    return replace(
        attention,
        positions=2 * int(cast(Any, module).pos_ebd_size),
        position_projections=projections,
        content_to_position=keys if "c2p" in kinds else None,
        position_to_content=queries if "p2c" in kinds else None,
    )


def read_structure(model: nn.Module) -> ModelStructure:
    """Read a model's matrices, attention modules and blocks from its module tree."""
    root = base_model(model)
    config = getattr(root, "config", None)
    modules = dict(walk(root))
    matrices = {name: found for name, module in modules.items() if (found := _matrix_of(name, module)) is not None}
    embeddings = {n: (m.num_embeddings, m.embedding_dim) for n, m in modules.items() if isinstance(m, nn.Embedding)}
    # GPT-J and CodeGen rotate queries and keys inside the attention module.
    rotary = bool(getattr(config, "rotary_dim", None)) or any("Rotary" in type(m).__name__ for m in modules.values())
    attentions = [
        attention
        for name, module in modules.items()
        if module._modules and (attention := _attention_of(name, module, matrices, config, rotary)) is not None
    ]
    stacks = [name for name, module in modules.items() if isinstance(module, nn.ModuleList)]
    blocks: dict[str, None] = {}
    for name in [attention.name for attention in attentions]:
        inside = [stack for stack in stacks if name.startswith(f"{stack}.")]
        if inside:
            stack = min(inside, key=len)
            blocks[".".join([stack, name[len(stack) + 1 :].split(".")[0]])] = None
            # A convolution next to the stack (DeBERTa-v2's larger models) reads the blocks' output.
            parent = stack.rpartition(".")[0]
            blocks[f"{parent}.conv" if parent else "conv"] = None
        else:
            # Without a stack, the top-level module around the attention is the block.
            blocks[name.split(".")[0]] = None
    groups = getattr(config, "num_hidden_groups", None)
    repeats = config.num_hidden_layers // groups if groups and config is not None else 1
    return ModelStructure(matrices, embeddings, attentions, tuple(blocks), type(root).__name__, repeats)

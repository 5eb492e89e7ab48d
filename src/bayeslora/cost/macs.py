"""Multiply-accumulate operations (MACs) of one sequence through a model, product by product, with operand widths.

The bookkeeping is appendix D of the Bayesian-LoRA paper, corrected. With n tokens, e relative positions, and an
adapted d_out × d_in matrix of rank r:

    base weight       n · d_in · d_out          b_weight × b_in
    A                 n · r · d_in              b_A × b_in
    E                 n · r                     b_E × b_A_out
    B                 n · r · d_out             b_B × b_E_out
    scores Q Kᵀ       n² · d                    b_Q_out × b_K_out
    weighted values   n² · d                    32 × b_V_out
    DeBERTa adds      e · (the rows of each projection that also projects positions)
    c2p, p2c          n · e · d each            b_Q_out × b_posK_out, b_K_out × b_posQ_out

The paper's LoRA term (2r + 1)·d lacks the token count and assumes d_in = d_out; its extra + 1 and + 3 correspond to no
product.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from bayeslora.cost.structure import (
    Attention,
    Matrix,
    ModelOrConfig,
    ModelStructure,
    Region,
    as_model,
    is_adapted,
    read_structure,
    under_wrappers,
)
from bayeslora.errors import BayesLoraError
from bayeslora.methods import describe
from bayeslora.methods.allocation import TensorKey
from bayeslora.vocabulary import COST_SCOPES as SCOPES
from bayeslora.vocabulary import UNQUANTIZED as FULL_WIDTH
from bayeslora.vocabulary import CostScope as Scope


class LayerCost(Protocol):
    """The properties of an adapted layer that its cost depends on, as in `bayeslora.describe(model)`."""

    @property
    def name(self) -> str: ...
    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...
    @property
    def rank(self) -> int: ...
    @property
    def bits(self) -> Mapping[str, int]: ...


@dataclass(frozen=True)
class Operation:
    """One matrix product: its MACs for one sequence, and the widths of its two operands in bits.

    `scope` is the narrowest scope the product counts in: "adapted" for all products of an adapted layer, otherwise its
    `region`: "attention" (query, key, value and position projections, scores, weighted values), "encoder" (the rest of
    the transformer blocks) or "model" (embeddings' projections, pooler, head, `lm_head`). Each scope holds the
    narrower regions: encoder includes attention, model includes all. An adapted layer counts in "adapted" and in the
    scopes of its region, so an adapted feed-forward layer never enters "attention".

    `weight_of` and `input_of` name the tensors of adapted layers that set the widths of the operands, or are None.
    `rank_of` is the adapted layer whose rank is a factor of the MACs, or None.
    """

    name: str
    scope: Scope
    macs: int
    weight_bits: int = FULL_WIDTH
    input_bits: int = FULL_WIDTH
    region: Region = "attention"
    weight_of: TensorKey | None = None
    input_of: TensorKey | None = None
    rank_of: str | None = None

    @property
    def bops(self) -> int:
        """Bit operations: MACs × the widths of the two operands."""
        return self.macs * self.weight_bits * self.input_bits

    def counts_in(self, scope: Scope) -> bool:
        """Return True if this product belongs to `scope`."""
        if scope == "adapted":
            return self.scope == "adapted"
        return SCOPES.index(self.region) <= SCOPES.index(scope)


def operations(
    model_or_config: ModelOrConfig, tokens: int = 128, layers: Sequence[LayerCost] | None = None
) -> list[Operation]:
    """List the matrix products of one sequence of `tokens` tokens, from the module tree alone.

    No forward pass is run, and weights may be on the meta device. BERT-like (MiniLM, RoBERTa, ELECTRA, DistilBERT,
    MPNet, ALBERT), DeBERTa-v2/v3, OPT-, GPT-2- and Llama-like models (Mistral, Qwen2 and 3, Phi, Gemma: grouped
    queries, gated feed-forward, fused projections) are recognised. In every other model each linear layer counts once
    per token, products between activations do not count, and the adapted layers count as "attention". Masked and
    causal scores count in full, as eager attention computes them. Not counted: softmax, norms, activations, rotary
    embeddings, biases, two-dimensional convolutions, and weights outside linear layers (fused experts of mixture
    models). Cross-attention uses the same token count. A pooled head counts for one vector per sequence.

    Widths: an adapted layer's operands have the widths in its description; everything else is 32 bits wide, or the
    stored width (8, 4) where the base model was loaded quantized. A quantized projection's output keeps its width in
    scores and weighted values only if it is merely permuted, copied (the repeated heads of grouped queries) or scaled
    by one factor in between: then its values are still codes times one step. Rotary embeddings and norms on queries or
    keys mix values, so those operands count as 32 bits. Softmax weights always count as 32 bits.

    Args:
        model_or_config: a model (plain or with PEFT adapters), or a configuration to build on the meta device.
        tokens: length of the sequence, n.
        layers: the adapted layers; by default those of the model, as `bayeslora.describe` reports them. An empty list
            gives the base model without adapters.

    Returns:
        The products. Those of layers are named `<module path>.<weight|A|E|B>`, with `.positions` before the last part
        if a shared projection is applied to DeBERTa's positions; those of attention `<attention module>.<scores|
        weighted_values|content_to_position|position_to_content>`. Without adapted layers, the query, key and value
        projections have the scope "adapted", so that the scope covers the same layers in every run.

    Raises:
        BayesLoraError: `tokens` is not a positive whole number, or a layer is not part of the model.
    """
    model = as_model(model_or_config)
    layers = described_layers(model) if layers is None else layers
    return structure_operations(read_structure(model), tokens, layers)


def described_layers(model_or_config: ModelOrConfig) -> Sequence[LayerCost]:
    """Return the adapted layers of a model; an empty list for a configuration or a plain model."""
    model = under_wrappers(as_model(model_or_config))
    return describe(model) if any(is_adapted(module) for module in model.modules()) else []


def structure_operations(
    structure: ModelStructure, tokens: int, layers: Iterable[LayerCost], adapted: Iterable[str] | None = None
) -> list[Operation]:
    """Return `operations` of a structure; `adapted` names the layers of that scope, by default `layers`."""
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise BayesLoraError(f"tokens is {tokens!r}, but must be a whole number of at least 1: give a length")
    by_name = {layer.name: layer for layer in layers}
    for layer in by_name.values():
        _check(structure, layer)
    marked = set(by_name if adapted is None else adapted) or set(structure.projections)
    found = [
        operation
        for matrix in structure.matrices.values()
        for operation in _matrix_operations(structure, matrix, tokens, by_name.get(matrix.name), matrix.name in marked)
    ]
    for name in structure.embeddings:
        if name in by_name:  # reading rows of the table and of A multiplies nothing
            region = structure.region(name) if structure.attentions else "attention"
            found += _expansion(name, "adapted", region, tokens, by_name[name])
    for attention in structure.attentions:
        found += _products(structure, attention, tokens, by_name)
    return found


def _check(structure: ModelStructure, layer: LayerCost) -> None:
    matrix = structure.matrices.get(layer.name)
    if matrix is None and layer.name not in structure.embeddings:
        raise BayesLoraError(
            f"layer {layer.name!r} is given, but is not a linear layer of the model: describe the layers of this model"
        )
    shape = (matrix.in_features, matrix.out_features) if matrix is not None else structure.embeddings[layer.name]
    if shape != (layer.in_features, layer.out_features):
        raise BayesLoraError(
            f"layer {layer.name!r} is described as {layer.in_features} → {layer.out_features}, but the model's is "
            f"{shape[0]} → {shape[1]}: describe the layers of this model"
        )
    if layer.rank < 0:
        raise BayesLoraError(f"layer {layer.name!r} has rank {layer.rank}, but must have at least 0: give its rank")


class _Operand(NamedTuple):
    """The width of one side of a product, and the adapted layer's tensor that has it."""

    bits: int
    tensor: TensorKey | None


def _operand(layer: LayerCost | None, kind: str, default: int = FULL_WIDTH) -> _Operand:
    if layer is None:
        return _Operand(default, None)
    return _Operand(int(layer.bits.get(kind, default)), (layer.name, kind))


def _matrix_operations(
    structure: ModelStructure, matrix: Matrix, tokens: int, layer: LayerCost | None, adapted: bool
) -> Iterator[Operation]:
    region = structure.region(matrix.name)
    if not structure.attentions and adapted:
        # A budget on attention then applies to the adapted layers.
        region = "attention"
    scope: Scope = "adapted" if adapted else region
    calls = []
    attentions = [each for each in structure.attentions if matrix.name in each.position_projections]
    if all(matrix.name in attention.projections for attention in attentions):
        calls.append(("", structure.positions(matrix.name, tokens)))
    calls += [(".positions", attention.positions * structure.calls(matrix.name)) for attention in attentions]
    weight, x = _operand(layer, "weight", matrix.bits), _operand(layer, "in")
    for suffix, positions in calls:
        prefix, macs = matrix.name + suffix, positions * matrix.macs
        yield _operation(f"{prefix}.weight", scope, macs, weight, x, region)
        if layer is not None:
            macs = positions * layer.rank * matrix.in_features
            yield _operation(f"{prefix}.A", scope, macs, _operand(layer, "A"), x, region, layer.name)
            yield from _expansion(prefix, scope, region, positions, layer)


def _operation(
    name: str,
    scope: Scope,
    macs: int,
    weight: _Operand,
    x: _Operand,
    region: Region = "attention",
    rank_of: str | None = None,
) -> Operation:
    return Operation(name, scope, macs, weight.bits, x.bits, region, weight.tensor, x.tensor, rank_of)


def _expansion(prefix: str, scope: Scope, region: Region, positions: int, layer: LayerCost) -> Iterator[Operation]:
    """Yield the products of E and B; without an E, the n · r operations are the scaling by α / r."""
    macs = positions * layer.rank
    for kind, x, each in (("E", "A_out", 1), ("B", "E_out", layer.out_features)):
        operands = _operand(layer, kind), _operand(layer, x)
        yield _operation(f"{prefix}.{kind}", scope, macs * each, *operands, region, layer.name)


def _products(
    structure: ModelStructure, attention: Attention, tokens: int, layers: Mapping[str, LayerCost]
) -> Iterator[Operation]:
    """Yield the products between activations of one attention module."""
    full = _Operand(FULL_WIDTH, None)

    def out(name: str, exact: bool) -> _Operand:
        return _operand(layers.get(name), "out") if exact else full

    calls = structure.calls(f"{attention.name}.scores")
    query = out(attention.query, attention.exact_scores)
    key = out(attention.key, attention.exact_scores)
    value = out(attention.value, attention.exact_values)
    squared = calls * tokens * tokens
    yield _operation(f"{attention.name}.scores", "attention", squared * attention.score_width, query, key)
    yield _operation(f"{attention.name}.weighted_values", "attention", squared * attention.value_width, full, value)
    between = calls * tokens * attention.positions * attention.score_width
    for kind, content, positions in (
        ("content_to_position", query, attention.content_to_position),
        ("position_to_content", key, attention.position_to_content),
    ):
        if positions is not None:
            yield _operation(f"{attention.name}.{kind}", "attention", between, content, out(positions, True))

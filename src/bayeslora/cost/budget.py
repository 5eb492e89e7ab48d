"""The costs that bit-widths and ranks are chosen under, as sums of products that `methods.allocation` can vary.

Bit operations come from the same operations and the same baseline as `relative_bops`, so that a choice costs what the
finished model is reported to cost.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from bayeslora.cost.bops import baseline_operations, bops_by_scope
from bayeslora.cost.macs import SCOPES, LayerCost, Operation, Scope, described_layers, structure_operations
from bayeslora.cost.structure import ModelOrConfig, as_model, read_structure
from bayeslora.errors import BayesLoraError
from bayeslora.methods import LayerDescription
from bayeslora.methods.allocation import CostModel, Product
from bayeslora.methods.tuner import tuner_of
from bayeslora.vocabulary import BASE_WEIGHT, MATRICES


def bops_cost(
    model: ModelOrConfig,
    scope: Scope = "adapted",
    tokens: int = 128,
    baseline_rank: int = 16,
    layers: Sequence[LayerCost] | None = None,
) -> CostModel:
    """Return the bit operations of a model as a function of its adapted layers' widths and ranks.

    For the layers' own widths and ranks, its `share` is `relative_bops(...)[scope]`. Tensors and layers that are not
    passed to `share` count at the width and rank in their description.

    The arguments are those of `relative_bops`, and the scope: "adapted", "attention", "encoder" or "model".

    Raises:
        BayesLoraError: the scope is unknown.
    """
    if scope not in SCOPES:
        raise BayesLoraError(f"scope is {scope!r}, but must be one of {', '.join(SCOPES)}: choose one")
    built = as_model(model)
    layers = described_layers(built) if layers is None else layers
    structure = read_structure(built)
    # With one rank, the operations of a layer are those of each of its ranks.
    of_one = [LayerDescription(e.name, e.in_features, e.out_features, 1, 1, 0, dict(e.bits)) for e in layers]
    per_rank = structure_operations(structure, tokens, of_one)
    baseline = bops_by_scope(baseline_operations(structure, tokens, layers, baseline_rank))[scope]
    found = [operation for operation in per_rank if operation.counts_in(scope)]
    sides = [each for op in found for each in ((op.weight_of, op.weight_bits), (op.input_of, op.input_bits))]
    # Of every tensor, also of a base weight loaded in few bits, which only the operations know.
    widths = {tensor: bits for tensor, bits in sides if tensor is not None}
    return CostModel(tuple(map(_product, found)), baseline, widths, _ranks(layers))


def bytes_cost(
    model: ModelOrConfig,
    baseline_rank: int = 16,
    weights: Collection[str] | None = None,
    layers: Sequence[LayerCost] | None = None,
) -> CostModel:
    """Return the bytes of the adapted layers' weights as a function of their widths and ranks.

    At b bits and rank r, A, E and B take d_in r b / 8, r b / 8 and d_out r b / 8 bytes; a base weight with a learned
    width takes d_in d_out b / 8. Ranges, biases and all other layers do not count. The baseline is the same base
    weights in float32, with A and B of a LoRA of rank `baseline_rank`.

    Args:
        model: a model or a configuration.
        baseline_rank: rank r of the baseline.
        weights: names of the layers whose base weights count; by default those that the adapter quantizes.
        layers: the adapted layers, by default `bayeslora.describe(model)`.
    """
    built = as_model(model)
    layers = described_layers(built) if layers is None else layers
    weights = _learned_weights(built) if weights is None else weights
    products, baseline = [], 0
    for layer in layers:
        d_in, d_out = layer.in_features, layer.out_features
        if layer.name in weights:
            products.append(Product(d_in * d_out / 8, (layer.name, BASE_WEIGHT)))
            baseline += 4 * d_in * d_out
        for kind, size in zip(MATRICES, (d_in, 1, d_out), strict=True):
            products.append(Product(size / 8, (layer.name, kind), rank_of=layer.name))
        baseline += 4 * baseline_rank * (d_in + d_out)
    widths = {(layer.name, kind): bits for layer in layers for kind, bits in layer.bits.items()}
    return CostModel(tuple(products), baseline, widths, _ranks(layers))


def rank_cost(model: ModelOrConfig, layers: Sequence[LayerCost] | None = None) -> CostModel:
    """Return a cost model whose `share` is the mean rank; `model` and `layers` are as for `relative_bops`."""
    layers = described_layers(model) if layers is None else layers
    products = tuple(Product(1, 1, rank_of=layer.name) for layer in layers)
    return CostModel(products, len(layers), default_ranks=_ranks(layers))


def _product(operation: Operation) -> Product:
    left = operation.weight_bits if operation.weight_of is None else operation.weight_of
    right = operation.input_bits if operation.input_of is None else operation.input_of
    return Product(operation.macs, left, right, operation.rank_of)


def _ranks(layers: Sequence[LayerCost]) -> dict[str, int]:
    return {layer.name: layer.rank for layer in layers}


def _learned_weights(model: nn.Module) -> set[str]:
    """Return the names of the layers whose active adapter has a quantizer for the base weight."""
    tuner = tuner_of(model)
    if tuner is None:
        return set()
    adapter = tuner.training_adapter()
    packed = {name: layer.packed_tensors(adapter) for name, layer in tuner.named_layers(adapter).items()}
    return {name for name, tensors in packed.items() if tensors is not None and BASE_WEIGHT in tensors.widths}

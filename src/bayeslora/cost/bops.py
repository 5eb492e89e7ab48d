"""Bit operations (BOPs): MACs × the widths of the two operands, by scope, and relative to a 32-bit LoRA.

BOPs = Σ MACs · b_weight · b_input (appendix D of the Bayesian-LoRA paper). They are a proxy for energy: narrow
operands save energy only on hardware with a kernel for both widths, and without an input quantizer every linear layer
keeps one 32-bit operand.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from bayeslora.cost.macs import SCOPES, LayerCost, Operation, described_layers, structure_operations
from bayeslora.cost.structure import ModelOrConfig, ModelStructure, as_model, read_structure
from bayeslora.methods import LayerDescription


def bops_by_scope(operations: Iterable[Operation]) -> dict[str, int]:
    """Return the bit operations of one sequence in each scope: adapted, attention, encoder, model."""
    found = list(operations)
    return {scope: sum(op.bops for op in found if op.counts_in(scope)) for scope in SCOPES}


def macs_by_scope(operations: Iterable[Operation]) -> dict[str, int]:
    """Return the multiply-accumulate operations of one sequence in each scope."""
    found = list(operations)
    return {scope: sum(op.macs for op in found if op.counts_in(scope)) for scope in SCOPES}


def relative_bops(
    model: ModelOrConfig, layers: Sequence[LayerCost] | None = None, tokens: int = 128, baseline_rank: int = 16
) -> dict[str, float]:
    """Return a model's bit operations as a share of those of 32-bit LoRA on query, key and value of the same model.

    LoRA of rank `baseline_rank` on all query, key and value projections is exactly 1 in every scope. "adapted"
    compares the adapted layers with the same layers of the baseline, which adapts only query, key and value
    projections. The other scopes compare all their operations, so adapters on more layers cost more. The paper's
    headline figures count attention alone; with the feed-forward layers ("encoder") the same run saves about half as
    much, so every scope is reported.

    In a model without a recognisable attention module, the baseline adapts the same layers as the model, and they
    count as "attention" (see `bayeslora.cost.operations`). An empty scope is 1.0: there is nothing to save in it.

    Args:
        model: a model or a configuration, as in `bayeslora.cost.operations`.
        layers: the adapted layers, by default `bayeslora.describe(model)`; an empty list gives the base model alone.
        tokens: length of the sequence in tokens.
        baseline_rank: rank of the baseline.

    Returns:
        The share for each of "adapted", "attention", "encoder" and "model"; 1.0 is the baseline.
    """
    built = as_model(model)
    layers = described_layers(built) if layers is None else layers
    structure = read_structure(built)
    actual = bops_by_scope(structure_operations(structure, tokens, layers))
    baseline = bops_by_scope(baseline_operations(structure, tokens, layers, baseline_rank))
    return {scope: actual[scope] / baseline[scope] if baseline[scope] else 1.0 for scope in SCOPES}


def baseline_operations(
    structure: ModelStructure, tokens: int, layers: Sequence[LayerCost], rank: int
) -> list[Operation]:
    """Return the operations that `relative_bops` compares a model with these adapted layers to."""
    targets = structure.projections or [layer.name for layer in layers if layer.name in structure.matrices]
    matrices = [structure.matrices[name] for name in targets]
    lora = [LayerDescription(m.name, m.in_features, m.out_features, rank, rank, parameters=0) for m in matrices]
    # The scope "adapted" must hold the same layers on both sides.
    marked = [layer.name for layer in layers] or targets
    full_width = {name: replace(matrix, bits=32) for name, matrix in structure.matrices.items()}
    return structure_operations(replace(structure, matrices=full_width), tokens, lora, marked)

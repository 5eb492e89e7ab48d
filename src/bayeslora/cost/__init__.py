"""What a model costs: multiply-accumulates, bit operations by scope, parameters. Shapes are enough; nothing is run."""

from __future__ import annotations

from bayeslora.cost._tree import build_on_meta, from_config
from bayeslora.cost.bops import bops_by_scope, macs_by_scope, relative_bops
from bayeslora.cost.macs import SCOPES, LayerCost, Operation, Scope, operations
from bayeslora.cost.parameters import adapter_matrices, adapter_parameters, count_parameters

__all__ = [
    "SCOPES",
    "LayerCost",
    "Operation",
    "Scope",
    "adapter_matrices",
    "adapter_parameters",
    "bops_by_scope",
    "build_on_meta",
    "count_parameters",
    "from_config",
    "macs_by_scope",
    "operations",
    "relative_bops",
]

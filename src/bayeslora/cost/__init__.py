"""The cost of a model from its shapes alone: multiply-accumulates, bit operations by scope, parameters, memory."""

from __future__ import annotations

from bayeslora.cost.bops import bops_by_scope, macs_by_scope, relative_bops
from bayeslora.cost.budget import bops_cost, bytes_cost, rank_cost
from bayeslora.cost.macs import SCOPES, LayerCost, Operation, Scope, operations
from bayeslora.cost.parameters import count_parameters
from bayeslora.cost.plan import TASK_TYPES, Plan, build_for_task, plan
from bayeslora.cost.structure import build_on_meta, from_config

__all__ = [
    "SCOPES",
    "TASK_TYPES",
    "LayerCost",
    "Operation",
    "Plan",
    "Scope",
    "bops_by_scope",
    "bops_cost",
    "build_for_task",
    "build_on_meta",
    "bytes_cost",
    "count_parameters",
    "from_config",
    "macs_by_scope",
    "operations",
    "plan",
    "rank_cost",
    "relative_bops",
]

"""Find the place of an adapted matrix in the model from its module path alone."""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterable
from dataclasses import dataclass

from bayeslora.vocabulary import FUSED_PROJECTIONS, KEY_NAMES, QUERY_NAMES, VALUE_NAMES


def _last_part(names: Iterable[str]) -> str:
    return rf"(^|\.)({'|'.join(names)})$"


# Roles in the order in which a block uses them; the index of the first match is the sort key. Patterns match a
# matrix's path inside its block, e.g. "attention.self.query" or "mlp.c_proj".
_ROLES: list[tuple[str, str]] = [
    ("qkv", _last_part((*FUSED_PROJECTIONS, "in_proj"))),
    ("q", _last_part((*QUERY_NAMES, "wq"))),
    ("k", _last_part((*KEY_NAMES, "wk"))),
    ("v", _last_part((*VALUE_NAMES, "wv"))),
    ("output", r"(^|\.)(o|o_proj|out_proj|out_lin)$|att(n|ention).*\.(dense|c_proj|proj)$"),
    ("gate", r"(^|\.)gate(_proj)?$"),
    ("up", r"(^|\.)(up_proj|fc1|c_fc|lin1|wi|wi_\d|dense_h_to_4h)$|intermediate\.dense$"),
    ("down", r"(^|\.)(down_proj|fc2|lin2|wo|c_proj|dense_4h_to_h)$|output\.dense$"),
]


@dataclass(frozen=True)
class Address:
    """Place of a matrix: its stack of blocks, the number of its block, and its path inside the block.

    `index` is None for a module outside any numbered block (a head, an embedding). Further numbers (experts of a
    mixture, T5's sub-layers) are written `*`, so that the `up_proj` of all experts count as one matrix.
    """

    stack: str
    index: int | None
    matrix: str

    @property
    def role(self) -> str | None:
        """Return qkv, q, k, v, output, gate, up or down; None for other names."""
        return matrix_role(self.matrix)


def locate(name: str) -> Address:
    """Split a module path such as `bert.encoder.layer.0.attention.self.query` into stack, number and matrix."""
    parts = name.split(".")
    for position, part in enumerate(parts):
        if part.isdecimal() and position + 1 < len(parts):
            inner = ["*" if p.isdecimal() else p for p in parts[position + 1 :]]
            return Address(".".join(parts[:position]), int(part), ".".join(inner))
    return Address("", None, name)


def matrix_role(matrix: str) -> str | None:
    """Return the role of a matrix in its block, from its path inside the block."""
    return next((role for role, pattern in _ROLES if re.search(pattern, matrix, re.IGNORECASE)), None)


def order_matrices(matrices: Iterable[str]) -> list[str]:
    """Sort distinct matrices: Q, K, V, output, gate, up, down, then unknown names in the order given."""
    order = [*(role for role, _ in _ROLES), None]
    return sorted(dict.fromkeys(matrices), key=lambda matrix: order.index(matrix_role(matrix)))


def shortest_labels(paths: Iterable[str]) -> dict[str, str]:
    """Map each dotted path to its shortest unique tail, such as `query`."""
    distinct = list(dict.fromkeys(paths))
    labels: dict[str, str] = {}
    for path in distinct:
        parts = path.split(".")
        for length in range(1, len(parts) + 1):
            tail = parts[-length:]
            if not any(other != path and other.split(".")[-length:] == tail for other in distinct):
                break
        labels[path] = ".".join(parts[-length:]).replace("*.", "")
    if len(set(labels.values())) < len(labels):
        return {path: path for path in distinct}
    return labels


def stack_labels(stacks: Iterable[str]) -> dict[str, str]:
    """Map each stack to the first part of its path that distinguishes it (`encoder`, `decoder`)."""
    distinct = list(dict.fromkeys(stacks))
    if len(distinct) < 2:
        return dict.fromkeys(distinct, "")
    split = [stack.split(".") for stack in distinct]
    depth = min(len(os.path.commonprefix(split)), min(map(len, split)) - 1)
    labels = {stack: parts[depth] for stack, parts in zip(distinct, split, strict=True)}
    return labels if len(set(labels.values())) == len(distinct) else {stack: stack for stack in distinct}

"""Export: ranks cut out for real, and the forms that other programs load."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bayeslora.errors import BayesLoraError
from bayeslora.export.integer import export_integer
from bayeslora.export.integer.reader import load_integer
from bayeslora.export.lora import export_lora
from bayeslora.export.merged import export_merged
from bayeslora.export.packed import export_packed
from bayeslora.export.packed.reader import load_packed
from bayeslora.export.shrink import shrink

FORMATS: dict[str, Callable[..., dict[str, Any]]] = {
    "integer": export_integer,
    "lora": export_lora,
    "merged": export_merged,
    "packed": export_packed,
}

__all__ = [
    "FORMATS",
    "export",
    "export_integer",
    "export_lora",
    "export_merged",
    "export_packed",
    "load_integer",
    "load_packed",
    "shrink",
]


def export(
    model: nn.Module,
    path: str | Path,
    format: str = "lora",  # noqa: A002 - the command's own word
    adapter_name: str | None = None,
    batch: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Write an adapter to the folder `path` in another form and return what was measured on the way.

    Args:
        model: a PEFT model with an adapter of this library.
        path: folder to write into.
        format: one of `FORMATS`: `lora` for plain LoRA, which needs nothing but PEFT; `packed` for the adapter at its
            learned widths; `merged` for one model without an adapter; `integer` for
            one model of codes, which `load_integer` loads.
        adapter_name: by default the active adapter.
        batch: inputs to measure the output error on.
        options: what the format takes besides, the keyword arguments of its function in `FORMATS`.

    Raises:
        BayesLoraError: for an unknown format or option, or a model without an adapter of this library.
    """
    if format not in FORMATS:
        raise BayesLoraError(f"format must be one of {sorted(FORMATS)}, not {format!r}")
    taken = inspect.signature(FORMATS[format]).parameters
    if unknown := sorted(set(options) - set(taken)):
        raise BayesLoraError(f"format {format!r} takes no option {unknown[0]!r}: drop it, or choose another format")
    return FORMATS[format](model, path, adapter_name, batch, **options)

"""Export: ranks cut out for real, and the forms that other programs load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bayeslora.errors import BayesLoraError
from bayeslora.export.lora import export_lora
from bayeslora.export.shrink import shrink

FORMATS = {"lora": export_lora}

__all__ = ["FORMATS", "export", "export_lora", "shrink"]


def export(
    model: nn.Module,
    path: str | Path,
    format: str = "lora",  # noqa: A002 - the command's own word
    adapter_name: str | None = None,
    batch: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Write an adapter to the folder `path` in another form and return what was measured on the way.

    Args:
        model: a PEFT model with an adapter of this library.
        path: folder to write into.
        format: one of `FORMATS`: `lora` for plain LoRA, which needs nothing but PEFT.
        adapter_name: by default the active adapter.
        batch: inputs to measure the output error on.

    Raises:
        BayesLoraError: for an unknown format, or a model without an adapter of this library.
    """
    if format not in FORMATS:
        raise BayesLoraError(f"format must be one of {sorted(FORMATS)}, not {format!r}")
    return FORMATS[format](model, path, adapter_name, batch)

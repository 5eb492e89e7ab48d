"""`bayeslora plan`: what fine-tuning a model will cost, from its configuration alone."""

from __future__ import annotations

import json
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from peft import PeftConfig
from transformers import AutoConfig, PretrainedConfig

from bayeslora.cli.arguments import METHOD_DEFAULTS, method_field_hints, unknown_option
from bayeslora.cli.coercion import coerce
from bayeslora.cli.progress import disable_progress_bars
from bayeslora.cli.registry import method_config_class
from bayeslora.cost import TASK_TYPES, Plan, build_for_task, from_config, plan
from bayeslora.errors import BayesLoraError, close_matches, option
from bayeslora.runs.adapt import check_targets, default_targets, option_errors
from bayeslora.runs.base import load_errors, resolve_model

_UNITS = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"), (1, "bytes"))


@dataclass
class PlanOptions:
    """The options of `bayeslora plan` beside the fields of the method's config."""

    model: str | None = None
    method: str = "blora"
    task_type: str | None = None
    num_labels: int | None = None
    batch_size: int = 32
    tokens: int = 128
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Literal["cpu", "cuda"] = "cpu"
    json: bool = False


def run(given: dict[str, Any]) -> int:
    """The command; `given` are the options on the command line."""
    disable_progress_bars()
    options, method_options, config_class = _resolve(given)
    config = read_configuration(options.model)
    if options.num_labels is not None:
        config.num_labels = options.num_labels
    task_type = options.task_type.upper() if options.task_type else None
    method = None
    if config_class is not None:
        method = _method_config(config, task_type, config_class, method_options)
    found = plan(
        config,
        method,
        task_type=task_type,
        batch_size=options.batch_size,
        tokens=options.tokens,
        dtype=options.dtype,
        device=options.device,
    )
    if options.json:
        record = {"method": options.method, **found.to_dict(), "model": options.model, "class": found.model}
        print(json.dumps(record, indent=2, ensure_ascii=False))
    else:
        print(table(found, options.method, options.model))
    return 0


def read_configuration(name: str | None) -> PretrainedConfig:
    """The configuration in a model folder, a `config.json`, a GGUF file or an installed package, or of a hub id."""
    if name is None:
        raise BayesLoraError("no model given; add --model with a folder, a config.json or a hub id.")
    path = Path(name).expanduser()
    if path.suffix == ".json":
        return from_config(path)
    if path.is_file() and path.suffix != ".gguf":
        raise BayesLoraError(f"{name} is no configuration; give a model folder, its config.json or a hub id.")
    resolved = Path(resolve_model(name))
    if resolved.is_dir():
        return from_config(resolved)
    with load_errors(f"the configuration of {name}"):
        if resolved.is_file():
            return AutoConfig.from_pretrained(resolved.parent, gguf_file=resolved.name)
        return AutoConfig.from_pretrained(name)


def _resolve(given: dict[str, Any]) -> tuple[PlanOptions, dict[str, Any], type[PeftConfig] | None]:
    """The command's own options, those of the method, and its config class."""
    hints = typing.get_type_hints(PlanOptions)
    options = PlanOptions(**{name: coerce(name, given[name], hints[name]) for name in hints if name in given})
    config_class = method_config_class(options.method)
    fields = method_field_hints(config_class)
    method_options = {name: value for name, value in METHOD_DEFAULTS.items() if name in fields}
    for name, value in given.items():
        if name in hints:
            continue
        if name not in fields:
            where = (
                "`bayeslora plan --help` shows its own options, and "
                f"`bayeslora train --method {options.method} --list-options` those of the method"
            )
            raise unknown_option(name, options.method, {*hints, *fields}, where)
        method_options[name] = coerce(name, value, fields[name])
    rank = method_options.get("r")
    if isinstance(rank, int) and rank < 1:
        raise BayesLoraError(f"--r is {rank}; a rank of at least 1 is needed.")
    for name in ("num_labels", "batch_size", "tokens"):
        number = getattr(options, name)
        if number is not None and number < 1:
            raise BayesLoraError(f"{option(name)} is {number}; give at least 1.")
    if options.task_type is not None and options.task_type.upper() not in TASK_TYPES:
        known = [name.lower() for name in TASK_TYPES]
        raise BayesLoraError(
            f"unknown --task-type {options.task_type!r}{close_matches(options.task_type.lower(), known)}; "
            f"choose from {', '.join(known)}."
        )
    return options, method_options, config_class


def _method_config(
    config: PretrainedConfig, task_type: str | None, config_class: type[PeftConfig], options: dict[str, Any]
) -> PeftConfig:
    """The adapter's configuration, with the default targets of `bayeslora train` where none are given."""
    model, _, _ = build_for_task(type(config).from_dict(config.to_dict()), task_type)
    targets = options.get("target_modules") or default_targets(model)
    if targets is not None:
        check_targets(model, targets)
        options = {**options, "target_modules": targets}
    with option_errors(config_class.__name__):
        return config_class(**options)


def table(found: Plan, method: str, name: str | None) -> str:
    """The plan for people, a line a number."""
    trainable, total = found.parameters["trainable"], found.parameters["total"]
    sizes = found.bytes
    rows = [
        ("model", f"{name} ({found.model})"),
        ("method", f"{method}, {_adapted(found)}"),
        ("parameters", ""),
        ("  trainable", f"{trainable:,} ({trainable / total:.3%} of all)"),
        ("  adapter", f"{found.parameters['adapter']:,}"),
        ("  total", f"{total:,}"),
        (f"memory of a step on {found.batch_size} x {found.tokens} tokens", ""),
        (f"  weights ({found.dtype})", size(sizes["weights"])),
        ("  gradients", size(sizes["gradients"])),
        ("  optimizer (AdamW)", size(sizes["optimizer"])),
        ("  activations, about", size(sizes["activations"])),
        ("  together, about", size(sizes["training"])),
        ("on disk", size(sizes["file"])),
        ("  in 16 bits", size(sizes["file_16bit"])),
        (f"operations on {found.tokens} tokens", f"{'10^9 MACs':<12}BOPs relative to LoRA r=16 at 32 bits"),
    ]
    for scope, share in found.relative_bops.items():
        rows.append((f"  {scope}", f"{found.macs[scope] / 1e9:<12,.2f}{share:.2%}"))
    width = max(len(label) for label, _ in rows) + 2
    lines = [f"{label:<{width}}{value}".rstrip() for label, value in rows]
    return "\n".join([*lines, *found.notes])


def _adapted(found: Plan) -> str:
    if not found.layers:
        return "every weight"
    ranks = sorted({layer.rank for layer in found.layers})
    names = dict.fromkeys(layer.name.rpartition(".")[2] for layer in found.layers)
    return f"rank {', '.join(map(str, ranks))} on {len(found.layers)} layers: {', '.join(names)}"


def size(count: int | None) -> str:
    """Bytes in decimal units with three digits."""
    if count is None:
        return "not known"
    unit, name = next((unit, name) for unit, name in _UNITS if count >= unit or unit == 1)
    return f"{count / unit:.{2 if 1 < unit and count < 100 * unit else 0}f} {name}"

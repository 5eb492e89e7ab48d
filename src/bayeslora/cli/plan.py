"""`bayeslora plan`: predict the cost of fine-tuning a model from its configuration alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftConfig
from transformers import AutoConfig, PretrainedConfig

from bayeslora.cli.arguments import fields_as_options
from bayeslora.cli.commands import PlanOptions
from bayeslora.cli.inputs import print_json
from bayeslora.cli.progress import disable_progress_bars
from bayeslora.cost import Plan, build_for_task, from_config, plan
from bayeslora.errors import BayesLoraError, counted
from bayeslora.runs.adapt import check_targets, default_targets, option_errors
from bayeslora.runs.base import load_errors, resolve_model, source

_UNITS = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"), (1, "bytes"))


def run(resolved: tuple[PlanOptions, dict[str, Any], type[PeftConfig] | None]) -> int:
    """Run the command with its options, the method's options and the method's config class."""
    disable_progress_bars()
    options, method_options, config_class = resolved
    assert options.model is not None
    config = read_configuration(options.model)
    if options.num_labels is not None:
        config.num_labels = options.num_labels
    task_type = options.task_type.upper() if options.task_type else None
    with fields_as_options(options.method), option_errors("full" if config_class is None else config_class.__name__):
        method = None
        if config_class is not None:
            method = _method_config(config, task_type, config_class, method_options)
        sizes = {name: getattr(options, name) for name in ("batch_size", "tokens", "dtype", "device")}
        found = plan(config, method, task_type=task_type, **sizes)
    if options.json:
        print_json({"method": options.method, **found.to_dict(), "model": options.model, "class": found.model})
    else:
        print(table(found, options.method, options.model))
    return 0


def read_configuration(name: str) -> PretrainedConfig:
    """Read the configuration of a model folder, a `config.json`, a GGUF file, a package or a hub id."""
    path = Path(name).expanduser()
    if path.suffix == ".json":
        return from_config(path)
    if path.is_file() and path.suffix != ".gguf":
        raise BayesLoraError(f"{name} is a file, but must be a configuration: give a folder, config.json or hub id")
    resolved = Path(resolve_model(name))
    if resolved.is_dir():
        return from_config(resolved)
    with load_errors(f"the configuration of {name}", str(resolved)):
        return AutoConfig.from_pretrained(**source(str(resolved)))


def _method_config(
    config: PretrainedConfig, task_type: str | None, config_class: type[PeftConfig], options: dict[str, Any]
) -> PeftConfig:
    """Return the adapter's configuration; target modules default to those of `bayeslora train`."""
    model, _, _ = build_for_task(type(config).from_dict(config.to_dict()), task_type)
    targets = options.get("target_modules") or default_targets(model)
    if targets is not None:
        check_targets(model, targets)
        options = {**options, "target_modules": targets}
    with option_errors(config_class.__name__):
        return config_class(**options)


def table(found: Plan, method: str, name: str | None) -> str:
    """Return the plan as readable text, one line per number."""
    trainable, total = found.parameters["trainable"], found.parameters["total"]
    sizes = found.bytes
    rows = [
        ("model", f"{name} ({found.model})"),
        ("method", f"{method}, {_adapted(found)}"),
        ("parameters", ""),
        ("  trainable", f"{trainable:,} ({trainable / total:.3%} of all)"),
        ("  adapter", f"{found.parameters['adapter']:,}"),
        ("  total", f"{total:,}"),
        (f"memory for a step on {found.batch_size} x {counted(found.tokens, 'token')}", ""),
        (f"  weights ({found.dtype})", size(sizes["weights"])),
        ("  gradients", size(sizes["gradients"])),
        ("  optimizer (AdamW)", size(sizes["optimizer"])),
        ("  activations, about", size(sizes["activations"])),
        ("  together, about", size(sizes["training"])),
        ("on disk", size(sizes["file"])),
        ("  in 16 bits", size(sizes["file_16bit"])),
        (f"operations on {counted(found.tokens, 'token')}", f"{'10^9 MACs':<12}BOPs relative to LoRA r=16 at 32 bits"),
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
    return f"rank {', '.join(map(str, ranks))} on {counted(len(found.layers), 'layer')}: {', '.join(names)}"


def size(count: int | None) -> str:
    """Format a number of bytes in decimal units with about three digits."""
    if count is None:
        return "unknown"
    unit, name = next((unit, name) for unit, name in _UNITS if count >= unit or unit == 1)
    return f"{count / unit:.{2 if 1 < unit and count < 100 * unit else 0}f} {name}"

"""`bayeslora export OUT --format NAME --output-dir DIR`: a finished run in the form that is deployed."""

from __future__ import annotations

import dataclasses
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayeslora.cli.folders import new_folder
from bayeslora.cli.results import finite
from bayeslora.errors import BayesLoraError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from bayeslora.cli.models import RunInfo

_CALIBRATION_BATCHES = 8

FORMATS = {
    "integer": "model of integer codes",
    "lora": "plain LoRA adapter",
    "merged": "merged Transformers model",
    "packed": "packed adapter",
}


def run(given: dict[str, Any]) -> int:
    """The command; `given` are the options on the command line."""
    form = given["format"]
    if form not in FORMATS:
        raise BayesLoraError(f"format {form!r} is not available; choose from {', '.join(FORMATS)}.")
    if given.get("allow_error") and form != "merged":
        raise BayesLoraError(f"--allow-error is for --format merged, not {form}; leave it out.")
    if "unadapted" in given and form != "integer":
        raise BayesLoraError(f"--unadapted is for --format integer, not {form}; leave it out.")
    if given.get("calibrate") and form != "integer":
        raise BayesLoraError(f"--calibrate is for --format integer, not {form}; leave it out.")
    for name in ("uniform", "draws", "seed"):
        if name in given and form != "lora":
            raise BayesLoraError(f"--{name} is for --format lora, not {form}; leave it out.")
    if "seed" in given and "draws" not in given:
        raise BayesLoraError(f"--seed is {given['seed']}, but nothing is drawn without --draws; leave it out.")
    from bayeslora.cli.models import RunInfo, load_run

    source, target = Path(given["folder"]), Path(given["output_dir"])
    method, rank = RunInfo.load(source).method, given.get("rank")
    if method == "full":
        raise BayesLoraError(f"{source} is a fully fine-tuned model without an adapter; use it as it is.")
    if rank is not None and method != "dylora":
        raise BayesLoraError(f"--rank is {rank}, but {source} was trained with {method}; leave it out.")
    with new_folder(target) as partial:
        import bayeslora

        model, tokenizer, info = load_run(source, given.get("model"))
        batches = _batches(form, given, info, tokenizer)
        options = {**_options(form, given, model, source), **batches}
        with bayeslora.at_rank(model, rank) if rank is not None else nullcontext():
            measured = bayeslora.export(model, partial, format=form, **options)
        for folder in sorted(partial.glob("draw-*")) or [partial]:
            tokenizer.save_pretrained(folder)
            # With it `evaluate` and `predict` work on the export as on the run.
            dataclasses.replace(info, **_loaded_as(form, folder)).save(folder)
    if given.get("json"):
        print(json.dumps(finite({"folder": str(target), **measured}), indent=2))
        return 0
    print(f"{target}: {FORMATS[form]}")
    for name, value in measured.items():
        if isinstance(value, (int, float, str)):
            shown = f"{value:.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
            print(f"  {name.replace('_', ' ')}: {shown}")
    return 0


def _batches(form: str, given: dict[str, Any], info: RunInfo, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Rows that the run was trained on: to measure what an export changes, and to fix ranges on."""
    if form == "packed":
        return {}
    from bayeslora.cli.choices import training_batches

    try:
        batches = training_batches(info, tokenizer, _CALIBRATION_BATCHES if given.get("calibrate") else 1)
    except BayesLoraError as error:
        if given.get("calibrate"):
            raise
        print(f"note: output errors are measured on the model's dummy inputs, for {error}", file=sys.stderr)
        return {}
    return {"batch": batches[0], **({"calibration": batches} if given.get("calibrate") else {})}


def _options(form: str, given: dict[str, Any], model: nn.Module, source: Path) -> dict[str, Any]:
    """What `bayeslora.export` is told besides the format."""
    if form == "merged":
        return {"allow_error": bool(given.get("allow_error"))}
    if form == "integer":
        return {"unadapted": given["unadapted"]} if "unadapted" in given else {}
    from bayeslora import describe, load_posterior
    from bayeslora.posterior import POSTERIOR_FILE

    if form == "lora":
        options: dict[str, Any] = {name: given[name] for name in ("uniform", "draws", "seed") if name in given}
        drawn = "draws" in given and (source / POSTERIOR_FILE).is_file()
        return {**options, "posterior": load_posterior(model, source)} if drawn else options
    if form == "packed" and (source / POSTERIOR_FILE).is_file():
        if all(layer.bits[kind] == 32 for layer in describe(model) for kind in ("A", "E", "B")):
            return {"posterior": source}
        print("note: matrices below 32 bits have no posterior; posterior.safetensors is left out.", file=sys.stderr)
    return {}


def _loaded_as(form: str, folder: Path) -> dict[str, Any]:
    """What `run.json` of the export says otherwise than that of the run."""
    if form in ("integer", "merged"):
        return {"method": "full"}
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    changed = {"method": "lora"} if form == "lora" else {}
    return {**changed, "base_name": config["base_model_name_or_path"]}

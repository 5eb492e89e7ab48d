"""`bayeslora export OUT --format lora --output-dir DIR`: a finished run for programs that do not know bayeslora."""

from __future__ import annotations

import dataclasses
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from bayeslora.cli.folders import new_folder
from bayeslora.cli.results import finite
from bayeslora.errors import BayesLoraError

FORMATS = ("lora",)


def run(given: dict[str, Any]) -> int:
    """The command; `given` are the options on the command line."""
    if given["format"] not in FORMATS:
        raise BayesLoraError(f"format {given['format']!r} is not available; choose from {', '.join(FORMATS)}.")
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
        with bayeslora.at_rank(model, rank) if rank is not None else nullcontext():
            measured = bayeslora.export(model, partial, format=given["format"])
        tokenizer.save_pretrained(partial)
        config = json.loads((partial / "adapter_config.json").read_text(encoding="utf-8"))
        # With it `evaluate` and `predict` work on the export as on the run.
        dataclasses.replace(info, method="lora", base_name=config["base_model_name_or_path"]).save(partial)
    if given.get("json"):
        print(json.dumps(finite({"folder": str(target), **measured}), indent=2))
        return 0
    print(f"{target}: plain LoRA adapter")
    for name, value in measured.items():
        if isinstance(value, (int, float)):
            print(f"  {name.replace('_', ' ')}: {value:.3g}")
    return 0

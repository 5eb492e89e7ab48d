"""`bayeslora export OUT --format NAME --output-dir DIR`: write a finished run for deployment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bayeslora.cli.inputs import load_run, print_json
from bayeslora.errors import BayesLoraError
from bayeslora.files import new_folder
from bayeslora.runs.export_run import check_names, export_run
from bayeslora.runs.info import RunInfo

FORMATS = {
    "gguf": "GGUF model",
    "integer": "integer model",
    "lora": "plain LoRA adapter",
    "merged": "merged Transformers model",
    "onnx": "ONNX model",
    "packed": "packed adapter",
    "torchao": "model in torchao's int8",
}


def run(given: dict[str, Any]) -> int:
    """Run the command with the options `given` on the command line."""
    form = given["format"]
    source, target = Path(given["folder"]), Path(given["output_dir"])
    method, rank = RunInfo.load(source).method, given.get("rank")
    if method == "full":
        raise BayesLoraError(f"{source} is fully fine-tuned, but export needs an adapter: use the model as it is")
    if rank is not None and method != "dylora":
        raise BayesLoraError(f"--rank is {rank}, but {source} was trained with {method}, not dylora: leave it out")
    if "mean_rank" in given and method != "lora":
        raise BayesLoraError(
            f"--mean-rank is {given['mean_rank']:g}, but {source} was trained with {method}, not lora: export it "
            "as plain LoRA first, and cut that export"
        )
    check_names(given)
    with new_folder(target) as partial:
        measured = export_run(load_run(source, given), form, partial, given)
    if given.get("json"):
        print_json({"folder": str(target), **measured})
        return 0
    print(f"{target}: {FORMATS[form]}")
    for name, value in measured.items():
        if isinstance(value, (int, float, str)):
            shown = f"{value:.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
            print(f"  {name.replace('_', ' ')}: {shown}")
    return 0

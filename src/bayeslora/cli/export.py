"""`bayeslora export OUT --format NAME --output-dir DIR`: write a finished run for deployment."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayeslora.cli.inputs import load_run
from bayeslora.errors import BayesLoraError
from bayeslora.files import finite, new_folder
from bayeslora.vocabulary import FORMATS_FOR_OTHERS

if TYPE_CHECKING:
    from bayeslora.runs.run import Run

_CALIBRATION_BATCHES = 8
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
    from bayeslora.cli.progress import disable_progress_bars
    from bayeslora.export.noise import moved_by_noise
    from bayeslora.export.record import ExportRecord
    from bayeslora.runs.exports import info_of_export
    from bayeslora.runs.info import RunInfo

    disable_progress_bars()
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
    with new_folder(target) as partial:
        import bayeslora

        loaded = load_run(source, given)
        if "mean_rank" in given:
            from bayeslora.runs.cut import export_cut

            measured = export_cut(loaded, given["mean_rank"], partial)
        else:
            options = {**_options(form, given, loaded), **_batches(form, given, loaded)}
            with bayeslora.at_rank(loaded.model, rank) if rank is not None else nullcontext():
                measured = bayeslora.export(loaded.model, partial, format=form, **options)
            if form != "packed":
                measured |= moved_by_noise(loaded.model, options.get("rows") or [options.get("batch")])
        ExportRecord.of(form, measured).save(partial)
        for folder in _folders(partial):
            loaded.tokenizer.save_pretrained(folder)
            # run.json lets `bayeslora.load`, `evaluate` and `predict` read the export like the run.
            info_of_export(form, folder, loaded.info).save(folder)
    if given.get("json"):
        print(json.dumps(finite({"folder": str(target), **measured}), indent=2))
        return 0
    print(f"{target}: {FORMATS[form]}")
    for name, value in measured.items():
        if isinstance(value, (int, float, str)):
            shown = f"{value:.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
            print(f"  {name.replace('_', ' ')}: {shown}")
    return 0


def _folders(partial: Path) -> list[Path]:
    """Return the folders that `bayeslora.load` reads like the run."""
    return sorted([*partial.glob("draw-*"), *partial.glob("member-*")]) or [partial]


def _batches(form: str, given: dict[str, Any], loaded: Run) -> dict[str, Any]:
    """Return training rows to measure the export's error on, and to calibrate on."""
    if form == "packed":
        return {}
    from bayeslora.runs.rows import training_batches

    try:
        if form == "onnx" and loaded.info.head == "sequence":
            batches = training_batches(loaded.info, loaded.tokenizer, 2 * _CALIBRATION_BATCHES, seed=0)
            return {"rows": batches[::2], "calibration": batches[1::2]}
        count = _CALIBRATION_BATCHES if given.get("calibrate") else 1
        batches = training_batches(loaded.info, loaded.tokenizer, count)
        if form in FORMATS_FOR_OTHERS:
            return {"rows": batches}
    except BayesLoraError as error:
        if given.get("calibrate"):
            raise
        print(f"note: output errors are measured on dummy inputs, because {error}", file=sys.stderr)
        return {}
    return {"batch": batches[0], **({"calibration": batches} if given.get("calibrate") else {})}


def _options(form: str, given: dict[str, Any], loaded: Run) -> dict[str, Any]:
    """Return the options of `bayeslora.export` for this format."""
    allowed = {"allow_error": bool(given.get("allow_error"))}
    if form == "merged":
        return allowed
    unadapted = {"unadapted": given["unadapted"]} if "unadapted" in given else {}
    if form in ("gguf", "torchao"):
        beside = {"adapter": given["adapter"]} if "adapter" in given else {}
        return {"tokenizer": loaded.tokenizer, **unadapted, **beside, **allowed}
    if form == "integer":
        return unadapted
    if form == "onnx":
        return {"tokenizer": loaded.tokenizer, "max_length": loaded.info.max_length, **unadapted, **allowed}
    from bayeslora import describe
    from bayeslora.posterior import POSTERIOR_FILE

    if form == "lora":
        own = ("uniform", "draws", "seed", "members")
        options: dict[str, Any] = {**allowed, **{name: given[name] for name in own if name in given}}
        drawn = "draws" in given and (loaded.folder / POSTERIOR_FILE).is_file()
        return {**options, "posterior": loaded.predictor} if drawn else options
    if form == "packed" and (loaded.folder / POSTERIOR_FILE).is_file():
        if all(layer.bits[kind] == 32 for layer in describe(loaded.model) for kind in ("A", "E", "B")):
            return {"posterior": loaded.folder}
        print("note: posterior.safetensors is left out, because matrices below 32 bits lack one", file=sys.stderr)
    return {}

"""Export a run: with its rows to measure the error on, its tokenizer, and what loads the export like the run."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import bayeslora
from bayeslora.errors import BayesLoraError
from bayeslora.export.formats import adapter_folders, check_hub_id
from bayeslora.export.noise import moved_by_noise
from bayeslora.export.record import ExportRecord
from bayeslora.model_card import check_license, complete_card
from bayeslora.posterior import POSTERIOR_FILE
from bayeslora.runs.cut import export_cut
from bayeslora.runs.exports import info_of_export
from bayeslora.runs.rows import training_batches
from bayeslora.runs.run import Run
from bayeslora.vocabulary import FORMATS_FOR_OTHERS

_CALIBRATION_BATCHES = 8
_PASSED_ON = ("unadapted", "adapter", "uniform", "draws", "seed", "members")
"""Options that `bayeslora.export` takes as they are; the command refuses those of other formats."""


def export_run(run: Run, form: str, folder: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Write a run in another format, with everything that `bayeslora.load` reads, and return the measurements.

    The format is a key of `bayeslora.export.formats.FORMATS`; `given` holds options of `bayeslora export`, by name.

    Raises:
        BayesLoraError: for whatever `bayeslora.export` refuses.
    """
    base, rank = given.get("base_model_id"), given.get("rank")
    if "mean_rank" in given:
        measured = export_cut(run, given["mean_rank"], folder, base)
    else:
        options = {**_options(form, given, run), **_batches(form, given, run), "base_model_id": base}
        with bayeslora.at_rank(run.model, rank) if rank is not None else nullcontext():
            measured = bayeslora.export(run.model, folder, format=form, **options)
        if form != "packed":
            measured |= moved_by_noise(run.model, options.get("rows") or [options.get("batch")])
    ExportRecord.of(form, measured).save(folder)
    for each in adapter_folders(folder, given):
        is_whole = form not in FORMATS_FOR_OTHERS and not given.get("no_tokenizer")
        complete_card(each, run.folder, given.get("license"), loads_as_run=is_whole)
        if not given.get("no_tokenizer"):
            run.tokenizer.save_pretrained(each)
        # run.json lets `bayeslora.load`, `evaluate` and `predict` read the export like the run.
        info_of_export(form, each, run.info, base).save(each)
    return measured


def check_names(given: Mapping[str, Any]) -> None:
    """Raise `BayesLoraError` unless `base_model_id` and `license`, where given, could be names on the hub."""
    if "base_model_id" in given:
        check_hub_id(given["base_model_id"])
    if "license" in given:
        check_license(given["license"])


def _batches(form: str, given: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """Return training rows to measure the export's error on, and to calibrate on."""
    if form == "packed":
        return {}
    try:
        if form == "onnx" and run.info.head == "sequence":
            batches = training_batches(run.info, run.tokenizer, 2 * _CALIBRATION_BATCHES, seed=0)
            return {"rows": batches[::2], "calibration": batches[1::2]}
        count = _CALIBRATION_BATCHES if given.get("calibrate") else 1
        batches = training_batches(run.info, run.tokenizer, count)
        if form in FORMATS_FOR_OTHERS:
            return {"rows": batches}
    except BayesLoraError as error:
        if given.get("calibrate"):
            raise
        print(f"note: output errors are measured on dummy inputs, because {error}", file=sys.stderr)
        return {}
    return {"batch": batches[0], **({"calibration": batches} if given.get("calibrate") else {})}


def _options(form: str, given: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """Return the options of `bayeslora.export` for this format."""
    options: dict[str, Any] = {name: given[name] for name in _PASSED_ON if name in given}
    if form in ("lora", "merged", *FORMATS_FOR_OTHERS):
        options["allow_error"] = bool(given.get("allow_error"))
    if form in FORMATS_FOR_OTHERS:
        options["tokenizer"] = run.tokenizer
    if form == "onnx":
        options["max_length"] = run.info.max_length
    has_posterior = (run.folder / POSTERIOR_FILE).is_file()
    if form == "lora" and "draws" in given and has_posterior:
        options["posterior"] = run.predictor
    if form == "packed" and has_posterior:
        if all(layer.bits[kind] == 32 for layer in bayeslora.describe(run.model) for kind in ("A", "E", "B")):
            options["posterior"] = run.folder
        else:
            print("note: posterior.safetensors is left out, because matrices below 32 bits lack one", file=sys.stderr)
    return options

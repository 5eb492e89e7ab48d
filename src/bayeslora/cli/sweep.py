"""`bayeslora train --seeds A,B`: one run a seed in a folder each, and their comparison."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bayeslora.cli.arguments import build_plan
from bayeslora.cli.coercion import coerce
from bayeslora.cli.compare import SEED_FOLDER, compare, runs_in, show
from bayeslora.errors import BayesLoraError, Problems
from bayeslora.runs.plan import TrainPlan
from bayeslora.runs.record import METRICS_FILE

COMPARISON = "compare"


@dataclass(frozen=True)
class Sweep:
    """Runs that are still to be made, and the folder of all."""

    plans: list[TrainPlan]
    folder: Path


def build_sweep(given: dict[str, Any], problems: Problems) -> Sweep:
    """Return the plans of one run a seed, in `OUT/seed-N`.

    With `resume` finished runs stay, an interrupted one continues, and the others begin.

    Raises:
        BayesLoraError: as for `build_plan`, seeds are not a list of different whole numbers, or a folder exists.
    """
    seeds: list[int] = []
    with problems.collected():
        seeds = coerce("seeds", given["seeds"], list[int])
    if "seed" in given:
        problems.append("--seed is given with --seeds, which lists all of them: leave one out")
    if not problems and (not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0 or max(seeds) >= 2**32):
        problems.append(
            f"--seeds is {given['seeds']}, but must be different whole numbers below 2^32: write --seeds 0,1,2"
        )
    if os.environ.get("WORLD_SIZE", "1") != "1":
        problems.append("--seeds is given to several processes, but they share one run: give a command to each seed")
    shared = {name: value for name, value in given.items() if name not in ("seeds", "seed", "resume")}
    out = build_plan(shared, problems).output_dir  # of the command line or of its file; says what else is wrong
    folders = {seed: out / f"{SEED_FOLDER}{seed}" for seed in seeds}
    plans = [
        build_plan({**shared, "seed": seed, "output_dir": str(folder), **_resumed(folder, given)})
        for seed, folder in folders.items()
        if not (given.get("resume") and (folder / METRICS_FILE).exists())
    ]
    present = [folder for folder in (*(plan.output_dir for plan in plans), out / COMPARISON) if folder.exists()]
    if present:
        raise BayesLoraError(f"{present[0]} exists, but must be new: name another --output-dir")
    return Sweep(plans, out)


def run(sweep: Sweep) -> int:
    """Train as planned, one after the other, and compare all runs of the folder; return 0."""
    from bayeslora.cli.train import run as train

    for plan in sweep.plans:
        try:
            train(plan)
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt("interrupted; go on with the same command and --resume") from error
    target = sweep.folder / COMPARISON
    compare(runs_in(sweep.folder), target)
    show(target)
    return 0


def _resumed(folder: Path, given: dict[str, Any]) -> dict[str, Any]:
    is_there = folder.with_name(folder.name + ".partial").is_dir()
    return {"resume": True} if given.get("resume") and is_there else {}

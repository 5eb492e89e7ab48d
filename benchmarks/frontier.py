"""Score against bit operations: B-LoRA at several budgets, beside a LoRA that is rounded after training.

    python benchmarks/frontier.py --data-dir DATA --threads 1                    # every missing run
    python benchmarks/frontier.py --data-dir DATA --tasks sst2 --seeds 0 --scopes attention
    python benchmarks/frontier.py --data-dir DATA --model FOLDER --budgets .03    # another encoder, in frontier-FOLDER

One file a run, in results/frontier. Each trains the widths of query, key and value, or of all linear layers of the
blocks, under the steps and the rate of the GLUE table (`glue.py`), to a budget that one of the roundings in
`rounding.py` costs in the same scope. Ranks close where that is the cheapest way to save bit operations. The score is
the task's metric on all held-out rows, looked at once, after training. With `--select` a fifth of the training rows is
held out and scored instead, in results/frontier-selection.

The budgets of a task, scope and seed have the same warm-up. With `--warm-ups FOLDER` it is trained once and kept
there, and the other runs resume from it: the clocks then show the rest of the run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from glue import TRAINING, Job, run
from harness import encoder_parser, parsed, run_missing
from rows import target_modules

BUDGETS = {"attention": (0.075, 0.039, 0.033, 0.018), "encoder": (0.066, 0.037, 0.023, 0.0154)}
"""Shares of the bit operations of LoRA r = 16 at 32 bits: of W8A8, W4A4, W2A4 with outputs at 8 bits and W2A4 with
outputs at 4 in attention; of W8A8, W4A8, W4A4 and W2A4, with outputs at 8 bits, in the encoder."""


def jobs(given: argparse.Namespace) -> dict[Path, Job]:
    what = "frontier-selection" if given.select else "frontier"
    folder = given.results / (what if given.model == "minilm" else f"{what}-{Path(given.model).name}")
    found = {}
    for seed in given.seeds:
        for task in given.tasks:
            for scope in given.scopes:
                targets = target_modules(given.model, all_linear=scope == "encoder")
                for budget in given.budgets or BUDGETS[scope]:
                    options = {"target_bops": budget, "bops_scope": scope, "rank_price": 0.0}
                    file = folder / f"{task}-{scope}-{budget}-{seed}.json"
                    warm_up = given.warm_ups and given.warm_ups / folder.name / f"{task}-{scope}-{seed}"
                    found[file] = Job(
                        task, "evidence-q+ra", seed, given.model, given.data_dir, targets, given.select,
                        options=options, warm_up=warm_up,
                    )  # fmt: skip
    return found


def main() -> None:
    parser = encoder_parser(__doc__)
    parser.add_argument("--tasks", nargs="+", choices=list(TRAINING), default=["sst2", "mrpc"])
    parser.add_argument("--scopes", nargs="+", choices=list(BUDGETS), default=list(BUDGETS))
    parser.add_argument("--budgets", nargs="+", type=float, help="other shares than those of the roundings")
    parser.add_argument("--select", action="store_true", help="hold rows of train out, and score on them alone")
    parser.add_argument("--warm-ups", type=Path, metavar="FOLDER", help="train each warm-up once, and keep it here")
    given = parsed(parser)
    run_missing(parser, jobs(given), run)


if __name__ == "__main__":
    main()

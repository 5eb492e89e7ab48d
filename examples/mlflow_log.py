"""Log finished runs to MLflow: options, scores, the training's curves, the report.

    python examples/mlflow_log.py OUT [OUT ...] --experiment tickets
    mlflow ui

The script reads `config.yaml`, `metrics.json` and `history.json` of each folder, so it can log old runs too.
`bayeslora train --report-to mlflow` (or wandb, or tensorboard) sends the losses during training, and this script adds
the final scores and the report. Needs `pip install mlflow`; the server is MLFLOW_TRACKING_URI, or MLflow's own store
in this folder.
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from bayeslora.runs.record import read_history, read_run


def log(mlflow: Any, folder: Path) -> None:
    """Log one run; `mlflow` is the module, or an object with the same functions."""
    record = read_run(folder)
    options = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    with mlflow.start_run(run_name=folder.name):
        mlflow.log_params({name: str(value)[:500] for name, value in options.items()})
        mlflow.log_metrics(record.scores)
        mlflow.log_metrics({f"baseline_{name}": value for name, value in record.baseline.items()})
        mlflow.log_metrics({f"bops_{scope}": share for scope, share in record.relative_bops.items()})
        for entry in read_history(folder):
            step = int(entry.pop("step", 0))
            # A slash makes a group, as in bits/A; MLflow refuses spaces.
            mlflow.log_metrics({f"train/{name}".replace(" ", "_"): value for name, value in entry.items()}, step=step)
        for name in ("report.html", "metrics.json", "README.md"):
            if (folder / name).is_file():
                mlflow.log_artifact(str(folder / name))


def main(argv: list[str]) -> dict[str, float]:
    """Log every folder on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="output folders of bayeslora train")
    parser.add_argument("--experiment", default="bayeslora", help="name of the experiment")
    given = parser.parse_args(argv)
    if find_spec("mlflow") is None:
        sys.exit("mlflow is not installed, but the log needs it: pip install mlflow")
    import mlflow

    mlflow.set_experiment(given.experiment)
    for folder in given.folders:
        log(mlflow, folder)
        print(f"{folder}: logged to {given.experiment}")
    return {"runs": len(given.folders)}


if __name__ == "__main__":
    main(sys.argv[1:])

"""`bayeslora compare OUT… --output-dir DIR`: finished runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bayeslora.cli.inputs import print_json
from bayeslora.files import new_folder
from bayeslora.report import check_installed
from bayeslora.runs.record import METRICS_FILE

SEED_FOLDER = "seed-"
"""Beginning of the name of a run's folder in one of `train --seeds`; the seed follows."""


def run(given: dict[str, Any]) -> int:
    """Run the command with the options `given` on the command line."""
    target = Path(given["output_dir"])
    table = compare([run for folder in given["folders"] for run in runs_in(Path(folder))], target)
    if given.get("json"):
        print_json(table)
    else:
        show(target)
    return 0


def runs_in(folder: Path) -> list[Path]:
    """Return the finished runs of a folder of `train --seeds`, by seed; another folder is a run itself."""
    found = [path.parent for path in folder.glob(f"{SEED_FOLDER}*/{METRICS_FILE}")]
    return sorted(found, key=lambda run: int(run.name.removeprefix(SEED_FOLDER))) or [folder]


def show(target: Path) -> None:
    """Print the table of a comparison, and where it is in other forms."""
    print((target / "table.md").read_text(encoding="utf-8").rstrip())
    print(f"\n{target}: these tables as Markdown, LaTeX, CSV and JSON, and the figures as PDF and PNG")


def compare(folders: list[Path], target: Path) -> dict[str, Any]:
    """Write the table and figures of `folders` into the new folder `target`; return the content of `table.json`."""
    check_installed()
    from bayeslora.report import write_comparison  # which imports Matplotlib

    with new_folder(target) as partial:
        return write_comparison(folders, partial)

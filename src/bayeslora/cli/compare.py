"""`bayeslora compare OUT… --output-dir DIR`: finished runs side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bayeslora.files import new_folder
from bayeslora.report import check_installed


def run(given: dict[str, Any]) -> int:
    """Run the command with the options `given` on the command line."""
    target = Path(given["output_dir"])
    table = compare([Path(folder) for folder in given["folders"]], target)
    if given.get("json"):
        print(json.dumps(table, indent=2, ensure_ascii=False))
    else:
        print((target / "table.md").read_text(encoding="utf-8").rstrip())
    return 0


def compare(folders: list[Path], target: Path) -> dict[str, Any]:
    """Write the table and figures of `folders` into the new folder `target`; return the content of `table.json`."""
    check_installed()
    from bayeslora.report import write_comparison  # which imports Matplotlib

    with new_folder(target) as partial:
        return write_comparison(folders, partial)

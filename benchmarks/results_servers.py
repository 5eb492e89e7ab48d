"""The table of `servers.py`: how near vLLM and llama.cpp are to this library with the same adapters."""

from __future__ import annotations

import json
from pathlib import Path

from records import markdown_table

FILE = "servers.json"


def servers_table(results: Path) -> str:
    """A line for each adapter, two columns for each server; nothing if it has not been run."""
    path = results / FILE
    if not path.is_file():
        return ""
    found = json.loads(path.read_text(encoding="utf-8"))
    servers, moved = found["servers"], found["moved_by_adapter"]
    head = ["adapter", "moves a log-probability by up to"]
    for name in servers:
        head += [f"{name}: largest difference", f"shared of the {found['top']}"]
    rows = []
    for case in next(iter(servers.values()))["cases"]:
        cells = [case, f"{moved[case]:.2g}" if case in moved else "–"]
        for server in servers.values():
            own = server["cases"].get(case)
            cells += [f"{own['max_difference']:.1e}", f"{own['shared_of_top']:.0%}"] if own else ["–", "–"]
        rows.append(cells)
    versions = " and ".join(f"{name} {server['version']}" for name, server in servers.items())
    out = f" {' and '.join(found['left_out'])} left out." if found["left_out"] else ""
    return (
        f"{markdown_table(head, rows)}\n"
        f"`python benchmarks/servers.py`: SmolLM2-135M, adapters on all linear layers after {found['steps']} steps, "
        f"in float32 in {versions}, {found['prompts']} prompts. Differences are of log-probabilities, in nats, from "
        f"this library's, over the {found['top']} most probable next tokens.{out}\n"
    )

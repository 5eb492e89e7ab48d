"""What the papers report about ranks, bits and scores, and whether the result files show it too."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from records import Run, markdown_table, score

from bayeslora.runs.names import locate

ADAPTER, BASE = ("A", "E", "B"), ("weight", "out")
HEADS = ("classifier", "score", "lm_head")
LOW_BITS = 4
MANY = 0.25
"""Share of matrices at rank 1 from which they are called many."""
CLOSE = 0.5
"""Points between two mean scores that still count as equal."""


@dataclass(frozen=True)
class Verdict:
    """Whether a pattern holds, and the numbers that say so; `holds` is None where it cannot be asked."""

    holds: bool | None
    seen: str

    @property
    def text(self) -> str:
        return {True: "holds", False: "does not hold", None: "–"}[self.holds]

    @property
    def cell(self) -> str:
        return f"{self.text}: {self.seen}" if self.seen else self.text


Pattern = Callable[[Sequence[Run]], Verdict]


def layers_of(runs: Iterable[Run]) -> list[dict]:
    return [layer for run in runs for layer in run["layers"]]


def _by_role(runs: Sequence[Run], value: Callable[[dict], float]) -> Verdict:
    found: dict[str, list[float]] = {}
    for layer in layers_of(runs):
        found.setdefault(locate(layer["name"]).role or "", []).append(value(layer))
    if not {"q", "k", "v"} <= set(found):
        return Verdict(None, "")
    q, k, v = (statistics.fmean(found[role]) for role in "qkv")
    return Verdict(v > q and v > k, f"V {v:.2f}, Q {q:.2f}, K {k:.2f}")


def value_has_more_rank(runs: Sequence[Run]) -> Verdict:
    return _by_role(runs, lambda layer: layer["rank"])


def value_has_more_bits(runs: Sequence[Run]) -> Verdict:
    return _by_role(runs, lambda layer: statistics.fmean(layer["bits"].values()))


def later_layers_have_more_rank(runs: Sequence[Run]) -> Verdict:
    placed = [(locate(layer["name"]).index, layer["rank"]) for layer in layers_of(runs)]
    inside = [(index, rank) for index, rank in placed if index is not None]
    blocks = 1 + max((index for index, _ in inside), default=0)
    early = [rank for index, rank in inside if index < blocks / 2]
    late = [rank for index, rank in inside if index >= blocks / 2]
    if not early or not late:
        return Verdict(None, "")
    first, second = statistics.fmean(early), statistics.fmean(late)
    return Verdict(second > first, f"second half {second:.2f}, first half {first:.2f}")


def many_matrices_at_rank_one(runs: Sequence[Run]) -> Verdict:
    ranks = [layer["rank"] for layer in layers_of(runs)]
    if not ranks:
        return Verdict(None, "")
    share = statistics.fmean(rank <= 1 for rank in ranks)
    return Verdict(share >= MANY, f"{100 * share:.0f}%")


def _bits(runs: Sequence[Run], kinds: Sequence[str]) -> list[int]:
    return [layer["bits"][kind] for layer in layers_of(runs) for kind in kinds]


def adapter_bits_are_low(runs: Sequence[Run]) -> Verdict:
    widths = _bits(runs, ADAPTER)
    if not widths:
        return Verdict(None, "")
    share = statistics.fmean(width <= LOW_BITS for width in widths)
    median = statistics.median(widths)
    return Verdict(median <= LOW_BITS, f"median {median:g}, {100 * share:.0f}% at 2–4")


def base_has_more_bits(runs: Sequence[Run]) -> Verdict:
    if not layers_of(runs):
        return Verdict(None, "")
    base, adapter = statistics.fmean(_bits(runs, BASE)), statistics.fmean(_bits(runs, ADAPTER))
    return Verdict(base > adapter, f"W0 and outputs {base:.1f}, A, E, B {adapter:.1f}")


def head_is_untouched(runs: Sequence[Run]) -> Verdict:
    layers = layers_of(runs)
    if not layers:
        return Verdict(None, "")
    touched = {layer["name"] for layer in layers if layer["name"].rpartition(".")[2] in HEADS}
    return Verdict(not touched, ", ".join(sorted(touched)))


RANK_PATTERNS: dict[str, Pattern] = {
    "V has a higher rank than Q and K": value_has_more_rank,
    "later layers have a higher rank than earlier ones": later_layers_have_more_rank,
}
CLOSING_PATTERNS: dict[str, Pattern] = {
    **RANK_PATTERNS,
    f"many matrices end at rank 1 (at least {100 * MANY:.0f}%)": many_matrices_at_rank_one,
}
BLORA_PATTERNS: dict[str, Pattern] = {
    **CLOSING_PATTERNS,
    "V has more bits than Q and K": value_has_more_bits,
    "A, E and B end at 2 to 4 bits (their median does)": adapter_bits_are_low,
    "the base weight and the output have more bits than A, E and B": base_has_more_bits,
    "the task's head keeps full precision": head_is_untouched,
}


def pattern_table(title: str, groups: Mapping[str, Sequence[Run]], patterns: Mapping[str, Pattern]) -> str:
    """A line for each pattern: what each group of runs shows, and whether all of them show it."""
    rows = []
    for claim, pattern in patterns.items():
        verdicts = [pattern(group) for group in groups.values()]
        together = all(verdict.holds for verdict in verdicts)
        rows.append([claim, *(v.cell for v in verdicts), Verdict(together, "").text])
    head = [f"{title}: the pattern", *groups, "together"]
    return markdown_table(head, rows, left=len(head))


def paired_means(runs: Iterable[Run], first: str, second: str) -> list[tuple[str, float, float]]:
    """Task, mean score of `first` and of `second`, over the seeds that both have, for every task with such seeds."""
    scores: dict[str, dict[tuple[str, int], float]] = {}
    for run in runs:
        scores.setdefault(run["task"], {})[run["method"], run["seed"]] = score(run)
    found = []
    for task, here in scores.items():
        seeds = [seed for method, seed in here if method == first and (second, seed) in here]
        if seeds:
            means = [statistics.fmean(here[method, seed] for seed in seeds) for method in (first, second)]
            found.append((task, means[0], means[1]))
    return found


def not_below(runs: Sequence[Run], first: str, second: str, by: float) -> Verdict:
    """Whether the average over tasks of `first` is at most `by` points below that of `second`."""
    pairs = paired_means(runs, first, second)
    if not pairs:
        return Verdict(None, "")
    difference = statistics.fmean(a - b for _, a, b in pairs)
    tasks = "1 task" if len(pairs) == 1 else f"{len(pairs)} tasks"
    return Verdict(difference >= -by, f"{difference:+.2f} points over {tasks}")


def attention_bops_at_most(runs: Iterable[Run], method: str, share: float) -> Verdict:
    """Whether attention costs at most `share` on average over a method's tasks."""
    by_task: dict[str, list[float]] = {}
    for run in runs:
        if run["method"] == method:
            by_task.setdefault(run["task"], []).append(run["relative_bops"]["attention"])
    if not by_task:
        return Verdict(None, "")
    mean = statistics.fmean(statistics.fmean(values) for values in by_task.values())
    return Verdict(mean <= share, f"{100 * mean:.1f}%")

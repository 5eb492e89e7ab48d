r"""Length of a run: its phases, and whether its decisions will have enough evidence.

Δ is half a mean of squares over n rows. If a square has c times its squared mean as variance, the relative standard
error of Δ is $\sqrt{c / n}$.
"""

from __future__ import annotations

import bisect
import math

from bayeslora.methods.blora.config import BLoraConfig
from bayeslora.methods.blora.decisions import DECISIONS, MEMORY, Schedule

GATE_STEPS = 8
"""Fewest steps for the gates, whatever the fractions, but at most a third of the run."""

SPREAD = 10.0
"""Variance of a row's square over its squared mean, c. It is 2 for a Gaussian, 2 to 4 in a tiny random model and 9 to
10 in a MiniLM that has learned its task (medians over widths and ranks): rows that it is sure of show next to nothing.
"""

LARGEST_ERROR = 0.5
"""Largest relative standard error of Δ that is taken as good enough: within two of them Δ is at most doubled.

From one width to the next Δ falls by a factor of 16 or more, and a factor of 2 is a quarter of that in bits. Ranks are
closer together, but to confuse two of them costs no more than what they differ by.
"""

LEAST_ROWS = SPREAD / LARGEST_ERROR**2
"""Fewest rows, of equal weight, that the last decision should rest on."""


def phases(config: BLoraConfig, total_steps: int) -> tuple[int, int]:
    """Return the first step in which gates learn, and the first in which they do not.

    The fractions yield in a short run.
    """
    outside, most = _shares_outside(config, total_steps)
    steps = total_steps * (most / outside if outside > most else 1)
    first, last = config.phase_shares
    return max(1, math.ceil(first * steps)), total_steps - math.floor(last * steps)


def _shares_outside(config: BLoraConfig, total_steps: int) -> tuple[float, float]:
    """Return the share of the steps that the other two phases are configured to have, and the most they can have."""
    return sum(config.phase_shares), 1 - min(GATE_STEPS, total_steps // 3) / total_steps


def shortfall(config: BLoraConfig, total_steps: int, rows: float | None) -> str | None:
    """Return a sentence on what a run is too short for and what it would need; None if it is long enough.

    Args:
        config: the method's configuration.
        total_steps: optimizer steps of the run.
        rows: rows in an optimizer step, over its micro-batches and all ranks; None where they are unknown: then only
            the phases are looked at.
    """
    lacks = _lacks(config, total_steps, rows)
    if not lacks:
        return None
    remedy = f"train for at least {_steps_needed(config, total_steps, rows)} steps"
    if rows is not None and not _has_rows(config, total_steps, rows):
        least = _steps_needed(config, total_steps, None)
        remedy += f", or for {least} with {math.ceil(LEAST_ROWS / _passes(config, least))} rows in each"
    return f"{total_steps} training steps are few for B-LoRA to choose well: {', '.join(lacks)}: {remedy}"


def _lacks(config: BLoraConfig, total_steps: int, rows: float | None) -> list[str]:
    lacks = []
    begin, end = phases(config, total_steps)
    outside, most = _shares_outside(config, total_steps)
    if outside > most:
        left = f"{end - begin} steps for the gates leave less than the configured {outside:.0%} to the other phases"
        lacks.append(left)
    decisions = len(_schedule(config, total_steps).decisions)
    if config.learns_bits and decisions < DECISIONS:
        lacks.append(f"there is time for {decisions} of {DECISIONS} decisions")
    if rows is not None and not _has_rows(config, total_steps, rows):
        known = rows * _passes(config, total_steps)
        lacks.append(
            f"the last decision rests on about {known:.0f} rows of evidence, a relative error of about "
            f"{math.sqrt(SPREAD / known):.0%} where {LARGEST_ERROR:.0%} is acceptable"
        )
    return lacks


def _steps_needed(config: BLoraConfig, total_steps: int, rows: float | None) -> int:
    """Return about the fewest steps, and at least `total_steps`, that are enough."""

    def is_enough(steps: int) -> bool:
        return not _lacks(config, steps, rows)

    enough = total_steps
    while not is_enough(enough):
        enough *= 2
    return bisect.bisect_left(range(enough), True, lo=total_steps, key=is_enough)


def _has_rows(config: BLoraConfig, total_steps: int, rows: float) -> bool:
    return rows * _passes(config, total_steps) >= LEAST_ROWS


def _passes(config: BLoraConfig, total_steps: int) -> float:
    r"""Return how many passes of equal weight are as precise as those of the last decision.

    Passes before an earlier decision weigh less by `MEMORY`: of weights w there are $(\sum w)^2 / \sum w^2$.
    """
    schedule = _schedule(config, total_steps)
    weights = [MEMORY ** sum(step <= made for made in schedule.decisions[:-1]) for step in schedule.passes]
    return sum(weights) ** 2 / sum(weight**2 for weight in weights)


def _schedule(config: BLoraConfig, total_steps: int) -> Schedule:
    return Schedule.of(*phases(config, total_steps), total_steps, learns_bits=config.learns_bits)

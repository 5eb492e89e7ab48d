"""Shift texts by a fixed suite and severity, to see how scores change: typos, truncation, casing, punctuation.

A severity is the share of letters, words or marks that change. What changes in a row depends only on its number, its
column, the suite and the seed. It includes what changes at a lower severity, so that levels differ by what was added
and not by luck. A text never becomes empty, and labels are not touched.
"""

from __future__ import annotations

import itertools
import math
import random
import re
import unicodedata
from collections.abc import Callable, Sequence

from datasets import Dataset

from bayeslora.errors import BayesLoraError, close_matches
from bayeslora.vocabulary import SHIFTS

SEVERITIES: dict[str, tuple[float, ...]] = {
    "typos": (0.02, 0.05, 0.10),
    "truncation": (0.25, 0.50, 0.75),
    "casing": (0.25, 0.50, 1.00),
    "punctuation": (0.25, 0.50, 1.00),
}
"""Levels of each suite: share of letters with a typo, of words cut off at the end, of words in capitals, of
punctuation marks removed."""

_KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_EDITS = ("keyboard", "swap", "drop", "duplicate")


def shifted(dataset: Dataset, columns: Sequence[str], suite: str, severity: float, seed: int = 0) -> Dataset:
    """Return a copy of a data set with the texts in `columns` shifted, for scores under distribution shift.

    Args:
        dataset: data set in which each of `columns` holds strings.
        columns: names of the columns to shift.
        suite: kind of shift, one of `SEVERITIES`.
        severity: share of the text that changes, 0 to 1; 0 changes nothing. `SEVERITIES` has the command's levels.
        seed: seed of the edits; the same seed gives the same texts in every process.

    Raises:
        BayesLoraError: the suite or a column is unknown, or the severity is outside [0, 1].
    """
    if suite not in _SUITES:
        raise BayesLoraError(
            f"the suite is {suite!r}, but must be one of {', '.join(SHIFTS)}{close_matches(suite, SHIFTS)}"
        )
    if not 0 <= severity <= 1:
        raise BayesLoraError(f"the severity is {severity}, but must be between 0 and 1: give the share that changes")
    for column in columns:
        if column not in dataset.column_names:
            raise BayesLoraError(
                f"the rows lack column {column!r}, but have {', '.join(dataset.column_names)}: name one of these"
            )
    content = {name: dataset[name][:] for name in dataset.column_names}
    for column in columns:
        content[column] = [
            _SUITES[suite](text, severity, random.Random(f"{seed}/{suite}/{column}/{row}"))
            for row, text in enumerate(content[column])
        ]
    return Dataset.from_dict(content, features=dataset.features)


def _typos(text: str, severity: float, generator: random.Random) -> str:
    """Edit each letter with probability `severity`: a neighbouring key, a swap, a loss or a duplicate.

    The first letter of a word is not dropped, so that the number of words stays.
    """
    draws = [(generator.random(), _EDITS[int(4 * generator.random())], generator.random()) for _ in text]
    hit = [letter.isalpha() and draw[0] < severity for letter, draw in zip(text, draws, strict=True)]
    found = []
    position = 0
    while position < len(text):
        letter, (_, edit, choice) = text[position], draws[position]
        after = text[position + 1] if position + 1 < len(text) and not hit[position + 1] else ""
        in_word = position > 0 and text[position - 1].isalpha()
        if not hit[position]:
            found.append(letter)
        elif edit == "swap" and after.isalpha() and after != letter:
            found.append(after + letter)
            position += 1
        elif edit == "drop" and in_word:
            pass
        elif edit == "duplicate" or not _neighbors(letter):
            found.append(letter * 2)
        else:
            near = _neighbors(letter)
            found.append(near[int(choice * len(near))])
        position += 1
    return "".join(found)


def _neighbors(letter: str) -> str:
    """Return the keys beside a letter on a QWERTY keyboard, in its case; "" for a letter that it lacks."""
    for row, keys in enumerate(_KEYBOARD):
        column = keys.find(letter.lower())
        if column >= 0:
            near = [keys[max(column - 1, 0) : column], keys[column + 1 : column + 2]]
            # A row is half a key to the right of the one above it.
            near += [_KEYBOARD[row - 1][column : column + 2]] if row else []
            near += [_KEYBOARD[row + 1][max(column - 1, 0) : column + 1]] if row + 1 < len(_KEYBOARD) else []
            return "".join(near).upper() if letter.isupper() else "".join(near)
    return ""


def _truncation(text: str, severity: float, generator: random.Random) -> str:
    """Keep the first words, rounded up and at least one."""
    ends = [word.end() for word in re.finditer(r"\S+", text)]
    kept = max(1, math.ceil((1 - severity) * len(ends) - 1e-9))
    return text[: ends[kept - 1]] if kept < len(ends) else text


def _casing(text: str, severity: float, generator: random.Random) -> str:
    """Write each word in capitals with probability `severity`."""
    return re.sub(r"\S+", lambda word: word[0].upper() if generator.random() < severity else word[0], text)


def _punctuation(text: str, severity: float, generator: random.Random) -> str:
    """Remove each punctuation mark with probability `severity`, unless nothing else would be left."""
    kept = (not (unicodedata.category(letter).startswith("P") and generator.random() < severity) for letter in text)
    found = "".join(itertools.compress(text, kept))
    return found if found.strip() else text


_SUITES: dict[str, Callable[[str, float, random.Random], str]] = {
    "typos": _typos,
    "truncation": _truncation,
    "casing": _casing,
    "punctuation": _punctuation,
}

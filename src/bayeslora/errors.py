"""The one exception a caller catches for everything that better input would mend, and words its messages share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BayesLoraError(ValueError):
    """Input, options or files that cannot work.

    The message is one sentence: the value seen, the value wanted, the way out. The command line prints it as it is
    and exits with status 2.
    """


def option(name: str) -> str:
    """Return the spelling of a field on the command line: `lora_alpha` is `--lora-alpha`."""
    return "--" + name.replace("_", "-")


def close_matches(word: str, known: Iterable[str]) -> str:
    """Return `", did you mean …"` with up to three near spellings of `word`, or an empty string."""
    near = difflib.get_close_matches(word, sorted(known), n=3, cutoff=0.6)
    return f", did you mean {' or '.join(near)}" if near else ""

"""The one exception a caller catches for everything that better input would mend, and words its messages share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class BayesLoraError(ValueError):
    """Input, options or files that cannot work.

    Each argument is one sentence: the value seen, the value wanted, the way out. The command line prints each on a
    line and exits with status 2.
    """

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


class Problems(list[str]):
    """Sentences about what is wrong with some input, so that all of them can be told at once."""

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Take over the sentences of a BayesLoraError raised inside."""
        try:
            yield
        except BayesLoraError as error:
            self += error.args

    def tell(self) -> None:
        """Raise BayesLoraError with all sentences, if there are any."""
        if self:
            raise BayesLoraError(*dict.fromkeys(self))


def option(name: str) -> str:
    """Return the spelling of a field on the command line: `lora_alpha` is `--lora-alpha`."""
    return "--" + name.replace("_", "-")


def close_matches(word: str, known: Iterable[str]) -> str:
    """Return `", did you mean …"` with up to three near spellings of `word`, or an empty string."""
    near = difflib.get_close_matches(word, sorted(known), n=3, cutoff=0.6)
    return f", did you mean {' or '.join(near)}" if near else ""

"""The exception for bad input, and helpers for its messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class BayesLoraError(ValueError):
    """Invalid input, options or files.

    Each argument is one sentence: "<what was given>, but <what is accepted>: <what to do>". The command line prints
    one per line and exits with status 2.
    """

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


class Problems(list[str]):
    """A list of error sentences, to report all of them together."""

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Collect the sentences of a BayesLoraError raised in the `with` block."""
        try:
            yield
        except BayesLoraError as error:
            self += error.args

    def tell(self) -> None:
        """Raise BayesLoraError with all sentences, if there are any."""
        if self:
            raise BayesLoraError(*dict.fromkeys(self))


def option(name: str) -> str:
    """Return the command-line spelling of a field: `lora_alpha` is `--lora-alpha`."""
    return "--" + name.replace("_", "-")


def close_matches(word: str, known: Iterable[str]) -> str:
    """Return `", did you mean …"` with up to three names similar to `word`, or an empty string."""
    near = difflib.get_close_matches(word, sorted(known), n=3, cutoff=0.6)
    return f", did you mean {' or '.join(near)}" if near else ""


def one_line(error: Exception) -> str:
    """Return the message of `error` without line breaks."""
    return " ".join(str(error).split())

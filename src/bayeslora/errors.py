"""The exception for bad input, and helpers for its messages."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager


class BayesLoraError(ValueError):
    """Raised for invalid input, options or files.

    Each argument is one sentence: "<what was given>, but <what is accepted>: <what to do>". The command line prints
    each on a line of its own and exits with status 2.
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


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, with an s unless it is one: `1 row`, `2,000 rows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def option(name: str) -> str:
    """Return the command-line spelling of a field: `lora_alpha` is `--lora-alpha`."""
    return "--" + name.replace("_", "-")


def spelled_as_options(sentence: str, options: Mapping[str, str]) -> str:
    """Return an error with the fields in it spelled as options: `gates='paper'` is `--gates paper`.

    A field of one word, such as `mode`, may be a word of the sentence too. It is taken for the field before its value,
    and where the sentence begins with "mode is". Values to type lose their Python quotes; the one that was given,
    after "is", keeps them.

    Args:
        sentence: the error.
        options: names of options by field, both with underscores.
    """
    names = "|".join(sorted(map(re.escape, options), key=len, reverse=True))
    value = r"=(?P<quote>['\"]?)(?P<value>[^\s'\",;:)]+)(?P=quote)"

    def spell(match: re.Match[str]) -> str:
        spelling, given = option(options[match["name"]]), match["value"]
        if given in ("True", "False"):
            return spelling if given == "True" else spelling.replace("--", "--no-", 1)
        if given is not None:
            return f"{spelling} {given}"
        following = sentence[match.end() :]
        is_field = "_" in match["name"] or (match.start() == 0 and following.startswith(" is "))
        has_value = re.match(r" ['\d]", following) and not sentence[: match.start()].endswith("the ")
        return spelling if is_field or has_value else match[0]

    # Not within a path, a dotted name, a quotation, or a call such as BLoraConfig(r=8).
    found = re.sub(rf"(?<![\w.'\"/-])(?<!\w\()(?P<name>{names})(?:{value}|(?![\w./(=-]))", spell, sentence)
    found = re.sub(r"(--[\w-]+) '([\w+.-]+)'", r"\1 \2", found)
    given = re.split(", but |: ", found, maxsplit=1)[0]
    return given + re.sub(r"(?<!\w)(?<! is )'([\w+-]+)'(?!\w)", r"\1", found[len(given) :])


def close_matches(word: str, known: Iterable[str]) -> str:
    """Return `", did you mean …"` with up to three names similar to `word`, or an empty string."""
    near = difflib.get_close_matches(word, sorted(known), n=3, cutoff=0.6)
    return f", did you mean {' or '.join(near)}" if near else ""


def one_line(error: Exception) -> str:
    """Return the message of `error` without line breaks."""
    return " ".join(str(error).split())

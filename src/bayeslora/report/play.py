"""Show the reply of a run to one text as a piece of HTML, for the page of `bayeslora app`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from bayeslora.report.answers import shade
from bayeslora.report.page import environment

if TYPE_CHECKING:
    from bayeslora.runs.answers import Answer
    from bayeslora.runs.play import Reply
    from bayeslora.runs.tagging import Tagging

_MOST_CLASSES = 8


def reply_html(reply: Reply) -> str:
    """Return a label with its confidence, bars of the classes and of the draws, and what is uncertain about it."""
    return _rendered(reply=reply, shown=list(reply.probabilities.items())[:_MOST_CLASSES])


def tags_html(tagging: Tagging) -> str:
    """Return the words of a text with their tags and how sure these are, and the spans that they mark."""
    return _rendered(tagging=tagging)


def answer_html(answer: Answer) -> str:
    """Return an answer whose tokens are shaded by what the draws disagree about, or without draws by their entropy."""
    return _rendered(answer=answer, tokens=shade(answer))


def _rendered(**shown: Any) -> str:
    given = {"reply": None, "tagging": None, "answer": None, **shown}
    return Markup(environment().get_template("reply.html.j2").render(given))

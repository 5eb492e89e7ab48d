"""Show the reply of a run to one text as a piece of HTML, for the page of `bayeslora app`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from markupsafe import Markup

from bayeslora.report.answers import shade
from bayeslora.report.page import environment

if TYPE_CHECKING:
    from bayeslora.runs.answers import Answer
    from bayeslora.runs.play import Reply

_MOST_CLASSES = 8


def reply_html(reply: Reply) -> str:
    """Return a label with its confidence, bars of the classes and of the draws, and what is uncertain about it."""
    shown = list(reply.probabilities.items())[:_MOST_CLASSES]
    return Markup(environment().get_template("reply.html.j2").render(reply=reply, shown=shown, answer=None, tokens=[]))


def answer_html(answer: Answer) -> str:
    """Return an answer whose tokens are shaded by what the draws disagree about, or without draws by their entropy."""
    template = environment().get_template("reply.html.j2")
    return Markup(template.render(reply=None, shown=[], answer=answer, tokens=shade(answer)))

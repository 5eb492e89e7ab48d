"""`bayeslora app RUN`: a page on this machine to type a text and see what the run makes of it."""

from __future__ import annotations

import importlib
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bayeslora.cli.inputs import load_run
from bayeslora.errors import BayesLoraError
from bayeslora.methods.registry import title_of
from bayeslora.runs.info import RunInfo

_PORT = 7860


def run(given: dict[str, Any]) -> int:
    """Run the command with the options `given` on the command line, until Ctrl-C."""
    RunInfo.load(Path(given["folder"]))  # a wrong folder is told before gradio is imported
    if find_spec("gradio") is None:
        raise BayesLoraError("gradio is not installed, but the page needs it: pip install bayeslora[app]")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    page(given).launch(server_name=given.get("host", "127.0.0.1"), server_port=given.get("port", _PORT), quiet=True)
    return 0


def page(given: dict[str, Any]) -> Any:
    """Return the `gradio.Interface` of the run in `folder`; its functions are those of `Playground`."""
    from bayeslora.report.play import answer_html, reply_html, tags_html
    from bayeslora.runs.play import Playground

    gradio: Any = importlib.import_module("gradio")
    play = Playground(load_run(given["folder"], given), given.get("samples"), given.get("risk", 0.05))

    def show(*texts: str) -> str:
        try:
            if play.run.kind == "generation":
                return answer_html(play.answer(*texts))
            if play.run.kind == "token_classification":
                return tags_html(play.tags(*texts))
            return reply_html(play.label(*texts))
        except BayesLoraError as error:
            raise gradio.Error(str(error)) from error

    print(
        f"{play.run}: open http://{given.get('host', '127.0.0.1')}:{given.get('port', _PORT)}, Ctrl-C ends", flush=True
    )
    inputs = [gradio.Textbox(label=name, lines=3) for name in play.columns]
    title = f"{title_of(play.run.method)} on {play.run.task}"
    return gradio.Interface(show, inputs, gradio.HTML(), title=title, flagging_mode="never")

"""Serve predictions with their uncertainty over HTTP, and flag those that a person should check.

    python examples/serve.py RUN --port 8000 --samples 10 --risk 0.05
    python examples/serve.py RUN --export EXPORT
    curl -s localhost:8000/predict -H 'Content-Type: application/json' -d '{"texts": ["A warm, clever film."]}'
    curl -s localhost:8000/health

RUN is an output folder of `bayeslora train` on a classification task. For a task on pairs, each text is a list of two
strings. `ask_a_human` is true if the confidence is not above a threshold. The server chooses the threshold on labelled
rows so that, with a probability of 95%, at most a share --risk of the answers is wrong (`bayeslora.RiskControl`). The
rows come from the file --calibration, from `bayeslora calibrate RUN`, or from the run's evaluation rows. With --export
the answers, also those on the labelled rows, come from an export of the run (ONNX, integer, merged, ...). The server
then ignores the results of `bayeslora calibrate`, which belong to the run itself.

One thread runs the model. Requests that arrive in the meantime wait, and then share one batch. The answer for a text
does not depend on the other texts, because all requests use the same draws of the weights (--seed). Needs
`pip install bayeslora[serve]`.
"""

from __future__ import annotations

import argparse
import asyncio
import queue
import sys
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

try:
    import uvicorn
    from fastapi import FastAPI, HTTPException, Request
    from pydantic import BaseModel, ConfigDict, ValidationError
except ModuleNotFoundError as missing:
    print(f"serve: {missing.name} is not installed, but needed: run `pip install bayeslora[serve]`", file=sys.stderr)
    raise SystemExit(2) from None

import bayeslora
from bayeslora.data import load_task
from bayeslora.posthoc.risk import RiskControl, Threshold
from bayeslora.prediction import Predictable, Prediction, check_samples
from bayeslora.runs.decisions import CALIBRATION_FILE, Calibration, calibration_for
from bayeslora.runs.rows import evaluation_task, labelled_rows
from bayeslora.runs.verify import load_export

Row = tuple[str, ...]
"""A text, or a pair of texts."""


@dataclass(frozen=True)
class Limits:
    """Limits of a request and of the queue; beyond them the server answers 422, 422, 413, 503 and 504."""

    texts: int = 32
    characters: int = 10_000
    body_bytes: int = 1_000_000
    waiting: int = 128
    seconds: float = 30.0
    batch: int = 32


class Question(BaseModel):  # the body of a request
    model_config = ConfigDict(extra="forbid", strict=True)
    texts: list[str | tuple[str, str]]


class Classifier:
    """A finished run, or an export of it, that predicts rows of text."""

    def __init__(
        self, run: Path, samples: int = 0, seed: int = 0, base: str | None = None, export: Path | None = None
    ) -> None:
        loaded = bayeslora.load(run, base)
        self.folder = loaded.folder
        self.model, self.tokenizer, self.info = loaded.model, loaded.tokenizer, loaded.info
        if self.info.kind != "classification":
            raise bayeslora.BayesLoraError(f"{run} is a run on {self.info.kind}: serve one on classification")
        self.is_export = export is not None
        self.predictor: Predictable = loaded.predictor
        calibration, self.samples, self.seed = calibration_for(self.folder, samples, seed, uncalibrated=self.is_export)
        if export is not None:
            _, self.model = load_export(export, loaded)
            self.predictor = self.model
        if calibration is not None:  # it holds a temperature, and its threshold is for scaled answers
            calibration.check_model(self.folder, self.model)
            self.predictor = calibration.around(loaded.predictor)
        check_samples(self.predictor, samples)

    def __call__(self, rows: Sequence[Row]) -> Prediction:
        columns = [list(column) for column in zip(*rows, strict=True)]
        length = self.info.max_length
        batch = self.tokenizer(*columns, truncation=True, max_length=length, padding=True, return_tensors="pt")
        return bayeslora.predict(self.predictor, dict(batch), self.samples, self.seed)

    def answers(self, rows: Sequence[Row], least: float) -> list[dict[str, Any]]:
        """Return the answer for each row; a person should decide those whose confidence is not above `least`."""
        prediction = self(rows)
        confidence, chosen = prediction.probabilities.max(dim=1)
        return [
            {
                "label": self.info.labels[int(chosen[row])],
                "probability": float(confidence[row]),
                "entropy": float(prediction.entropy[row]),
                "mutual_information": float(prediction.mutual_information[row]),
                "ask_a_human": float(confidence[row]) <= least,
            }
            for row in range(len(rows))
        ]

    def threshold(self, file: Path | None, risk: float, most: int) -> Threshold:
        """Return the threshold from at most `most` labelled rows of a file or of the run's evaluation rows.

        Without a file, all rows of `bayeslora calibrate` are used if the run has them.
        """
        info = self.info
        if file is None and not self.is_export and (self.folder / CALIBRATION_FILE).is_file():
            calibration = Calibration.load(self.folder)
            calibration.check(self.folder, self.samples, self.seed)
            calibration.check_model(self.folder, self.model)
            return calibration.threshold(risk)
        if file is None and info.task_name is not None:
            task = load_task(info.task_name, info.data_dir)
        else:
            task = labelled_rows(info, file) if file else evaluation_task(info)
        n = len(task.eval_split)  # evenly spaced: files may be sorted
        split = task.eval_split.select(np.linspace(0, n - 1, min(most, n)).astype(int))
        rows = list(zip(*(split[name] for name in task.text_columns), strict=True))
        probabilities = np.concatenate([self(rows[i : i + 32]).probabilities.numpy() for i in range(0, len(rows), 32)])
        return RiskControl(risk).fit(probabilities, list(split["label"])).threshold()


class Batcher:
    """One thread that runs the model on whole requests, several at a time, up to `batch` rows."""

    def __init__(self, answer: Callable[[list[Row]], list[Any]], batch: int, waiting: int) -> None:
        self._answer, self._batch = answer, batch
        self._jobs: queue.Queue[tuple[list[Row], Future[list[Any]]]] = queue.Queue(waiting)
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def submit(self, rows: list[Row]) -> Future[list[Any]]:
        """Put a request into the queue; raises `queue.Full` if too many requests are waiting."""
        future: Future[list[Any]] = Future()
        self._jobs.put_nowait((rows, future))
        return future

    def close(self) -> None:
        """Answer the waiting requests, then end the thread; an item without rows is the signal to stop."""
        self._jobs.put(([], Future()))
        self._thread.join()

    def _run(self) -> None:
        stopped = False
        while not stopped:
            jobs = [self._jobs.get()]
            while sum(len(rows) for rows, _ in jobs) < self._batch and not self._jobs.empty():
                jobs.append(self._jobs.get())
            stopped = not all(rows for rows, _ in jobs)
            # Skip requests whose client already got a timeout.
            self._work([job for job in jobs if job[0] and job[1].set_running_or_notify_cancel()])

    def _work(self, jobs: list[tuple[list[Row], Future[list[Any]]]]) -> None:
        try:
            answers = iter(self._answer([row for rows, _ in jobs for row in rows]) if jobs else ())
            for rows, future in jobs:
                future.set_result([next(answers) for _ in rows])
        except Exception as error:  # the thread must survive any error of the model
            for _, future in jobs:
                if not future.done():
                    future.set_exception(error)


def create_app(classifier: Classifier, threshold: Threshold, limits: Limits | None = None) -> FastAPI:
    """Return the application: POST /predict and GET /health."""
    limits = limits or Limits()
    batchers: list[Batcher] = []

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        answer = partial(classifier.answers, least=threshold.confidence)
        batchers.append(Batcher(answer, limits.batch, limits.waiting))
        yield
        await asyncio.to_thread(batchers.pop().close)

    app = FastAPI(title="bayeslora", lifespan=lifespan)

    async def answered(request: Request) -> list[Any]:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > limits.body_bytes:
                raise HTTPException(413, f"the body has more than {limits.body_bytes} bytes")
        rows = parsed(body, len(classifier.info.text_columns), limits)
        try:
            answer = batchers[0].submit(rows)
        except queue.Full:
            raise HTTPException(503, "too many requests are waiting: try again", {"Retry-After": "1"}) from None
        return await asyncio.wrap_future(answer)

    @app.post("/predict")
    async def predict(request: Request) -> dict[str, Any]:
        try:
            return {"predictions": await asyncio.wait_for(answered(request), limits.seconds)}
        except TimeoutError:
            raise HTTPException(504, f"no answer within {limits.seconds:g} seconds") from None

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "samples": classifier.samples, "threshold": vars(threshold)}

    return app


def parsed(body: bytes | bytearray, columns: int, limits: Limits) -> list[Row]:
    """Return the rows of a request; a 422 names the problem without repeating the texts."""
    try:
        question = Question.model_validate_json(body)
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_input=False, include_context=False)[0]
        raise HTTPException(422, f"{'.'.join(map(str, wrong['loc'])) or 'body'}: {wrong['msg']}") from None
    rows: list[Row] = [(text,) if isinstance(text, str) else text for text in question.texts]
    if not 1 <= len(rows) <= limits.texts:
        raise HTTPException(422, f"{len(rows)} texts were given, 1 to {limits.texts} are needed")
    for number, row in enumerate(rows):
        if len(row) != columns or not all(text.strip() and len(text) <= limits.characters for text in row):
            wanted = "two texts" if columns == 2 else "one text"
            raise HTTPException(422, f"texts.{number}: {wanted} of 1 to {limits.characters} characters needed")
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Serve a finished run over HTTP.")
    parser.add_argument("run", type=Path, help="output folder of `bayeslora train`")
    parser.add_argument("--model", help="base model, if it has moved since training")
    parser.add_argument("--export", type=Path, help="answer with this export of the run, of any format")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--samples", type=int, default=0, help="draws of the weights; 0 is their mean")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws")
    parser.add_argument(
        "--risk", type=float, default=0.05, help="maximum share of wrong answers, with probability 95%%"
    )
    parser.add_argument("--calibration", type=Path, help="labelled rows (default: conformal.json, or evaluation rows)")
    parser.add_argument("--calibration-rows", type=int, default=500, help="use at most this many of them")
    for name, value in vars(Limits()).items():
        parser.add_argument(f"--max-{name.replace('_', '-')}", type=type(value), default=value, dest=name)
    options = parser.parse_args(arguments)
    try:
        classifier = Classifier(options.run, options.samples, options.seed, options.model, options.export)
        threshold = classifier.threshold(options.calibration, options.risk, options.calibration_rows)
    except bayeslora.BayesLoraError as error:
        print(f"serve: {error}", file=sys.stderr)
        return 2
    print(f"serve: answers {threshold.coverage:.1%} of {threshold.rows} rows at an error rate of {threshold.risk:.3f}")
    limits = Limits(**{name: getattr(options, name) for name in vars(Limits())})
    uvicorn.run(create_app(classifier, threshold, limits), host=options.host, port=options.port, log_level="warning")
    return 0


if __name__ == "__main__":
    sys.exit(main())

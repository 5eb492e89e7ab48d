"""examples/serve.py under load, on loopback: errors, throughput, latency, memory, and whether the answers are right.

    python benchmarks/serve_load.py RUN --seconds 60 --clients 64 --samples 10
    python benchmarks/serve_load.py RUN --seconds 60 --output benchmarks/results/serve_load.json
    python benchmarks/serve_load.py RUN --export EXPORT --samples 0     # an export of the run, such as its ONNX form

Starts the server in a process of its own, and sends it requests of 1 to 4 texts from --clients clients, each
of which waits for its answer before it asks again, over a connection that it keeps. Meanwhile one more client sends
what must be refused: malformed, mistyped, empty, too many, too long and oversized bodies. Afterwards every text is
predicted in this process, on its own, and compared. Memory is the server's resident set after a warm-up of --warm-up
seconds, and at the end. The exit status is that of SIGTERM, which uvicorn raises again once it has shut down.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from measuring import print_result

import bayeslora
from bayeslora.data import load_files, load_task
from bayeslora.runs.verify import format_of, load_export

SERVER = Path(__file__).resolve().parents[1] / "examples" / "serve.py"
REFUSED: dict[str, tuple[bytes, int]] = {
    "malformed": (b'{"texts": [', 422),
    "mistyped": (b'{"texts": [1]}', 422),
    "empty": (b'{"texts": []}', 422),
    "too many": (json.dumps({"texts": ["a"] * 33}).encode(), 422),
    "too long": (json.dumps({"texts": ["a" * 10_001]}).encode(), 422),
    "oversized": (json.dumps({"texts": ["a" * 2_000_000]}).encode(), 413),
}
MOST_TEXTS = 200
Text = str | list[str]


class Client(threading.Thread):
    """Asks until it is told to stop, and keeps what it was told."""

    def __init__(self, port: int, texts: list[Text], seed: int, stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self.port, self.texts, self.stop = port, texts, stop
        self.random = random.Random(seed)
        self.latencies: list[tuple[float, float]] = []
        self.answers: list[tuple[int, dict[str, Any]]] = []
        self.errors: Counter[str] = Counter()

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        while not self.stop.is_set():
            chosen = [self.random.randrange(len(self.texts)) for _ in range(self.random.randint(1, 4))]
            body = json.dumps({"texts": [self.texts[index] for index in chosen]}).encode()
            start = time.monotonic()
            try:
                status, found = ask(connection, body)
            except (OSError, http.client.HTTPException) as error:
                self.errors[type(error).__name__] += 1
                connection.close()
                continue
            self.latencies.append((start, time.monotonic() - start))
            if status == 200 and len(found["predictions"]) == len(chosen):
                self.answers += zip(chosen, found["predictions"], strict=True)
            else:
                self.errors[str(status)] += 1
        connection.close()


class Intruder(threading.Thread):
    """Sends what must be refused, and counts by kind what was."""

    def __init__(self, port: int, stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self.port, self.stop = port, stop
        self.refused: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()

    def run(self) -> None:
        while not self.stop.is_set():
            for name, (body, expected) in REFUSED.items():
                try:
                    status, _ = ask(http.client.HTTPConnection("127.0.0.1", self.port, timeout=120), body)
                except (OSError, http.client.HTTPException) as error:
                    self.errors[f"{name}: {type(error).__name__}"] += 1
                    continue
                if status == expected:
                    self.refused[name] += 1
                else:
                    self.errors[f"{name}: {status}"] += 1
            self.stop.wait(0.2)


def ask(connection: http.client.HTTPConnection, body: bytes) -> tuple[int, Any]:
    connection.request("POST", "/predict", body, {"Content-Type": "application/json"})
    reply = connection.getresponse()
    return reply.status, json.loads(reply.read())


def texts_of(run: Path) -> list[Text]:
    """Of the run's own evaluation rows; of a task on pairs, lists of two."""
    info = bayeslora.load(run).info
    if info.task_name is not None:
        task = load_task(info.task_name, info.data_dir)
    else:
        file = info.files["eval_file"]
        task = load_files(file, file, info.text_columns, info.label_column, labels=info.labels)
    columns = [task.eval_split[name][:MOST_TEXTS] for name in task.text_columns]
    rows = [list(row) for row in zip(*columns, strict=True)]
    return [row[0] if len(row) == 1 else row for row in rows if all(text.strip() for text in row)]


def start(run: Path, samples: int, export: Path | None) -> tuple[subprocess.Popen[bytes], int, dict[str, Any]]:
    """The server's process, its port, and what /health says once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--port", str(port), "--calibration-rows", "200"]
    options += ["--samples", str(samples)] if export is None else ["--export", str(export)]
    process = subprocess.Popen([sys.executable, str(SERVER), str(run), *options], stdout=sys.stderr)
    while process.poll() is None:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/health")
            return process, port, json.loads(connection.getresponse().read())
        except OSError:
            time.sleep(0.2)
    raise SystemExit(f"the server ended with status {process.returncode}")


def largest_difference(
    run: Path, samples: int, export: Path | None, texts: list[Text], clients: list[Client]
) -> dict[str, float]:
    """Of what was answered from what `predict` says about each text alone, by quantity."""
    loaded = bayeslora.load(run)
    tokenizer, info = loaded.tokenizer, loaded.info
    predictor = loaded.predictor if export is None else load_export(export, loaded)[1]
    by_text: dict[int, list[dict[str, Any]]] = {}
    for client in clients:
        for index, answer in client.answers:
            by_text.setdefault(index, []).append(answer)
    largest = {"probability": 0.0, "entropy": 0.0, "mutual_information": 0.0, "other_labels": 0.0}
    for index, answers in by_text.items():
        text = texts[index]
        columns = [[text]] if isinstance(text, str) else [[part] for part in text]
        batch = tokenizer(*columns, truncation=True, max_length=info.max_length, return_tensors="pt")
        expected = bayeslora.predict(predictor, dict(batch), samples, 0)
        known = {
            "probability": float(expected.probabilities.max()),
            "entropy": float(expected.entropy[0]),
            "mutual_information": float(expected.mutual_information[0]),
        }
        for name, value in known.items():
            largest[name] = max(largest[name], *(abs(answer[name] - value) for answer in answers))
        label = info.labels[int(expected.labels[0])]
        largest["other_labels"] += sum(answer["label"] != label for answer in answers)
    return largest


def measure(
    run: Path, samples: int, export: Path | None, clients: int, warm_up: float, seconds: float
) -> dict[str, Any]:
    texts = texts_of(run)
    process, port, health = start(run, samples, export)
    try:
        stop, server = threading.Event(), psutil.Process(process.pid)
        crowd = [Client(port, texts, seed, stop) for seed in range(clients)]
        intruder = Intruder(port, stop)
        for thread in (*crowd, intruder):
            thread.start()
        time.sleep(warm_up)
        begin, before = time.monotonic(), server.memory_info().rss
        time.sleep(seconds)
        end, after = time.monotonic(), server.memory_info().rss
        stop.set()
        for thread in (*crowd, intruder):
            thread.join(120)
    finally:
        process.terminate()
        status = process.wait(60)
    timed = np.array([took for client in crowd for begun, took in client.latencies if begin <= begun <= end])
    errors = sum((client.errors for client in crowd), intruder.errors)
    return {
        "clients": clients,
        "seconds": end - begin,
        "samples": samples,
        "format": None if export is None else format_of(export),
        "requests": len(timed),
        "requests_per_second": len(timed) / (end - begin),
        "latency_seconds": {f"p{q}": float(np.percentile(timed, q)) for q in (50, 95)},
        "resident_bytes": {"before": before, "after": after, "growth": after - before},
        "errors": dict(errors),
        "refused": dict(intruder.refused),
        "exit_status": status,
        "largest_difference": largest_difference(run, samples, export, texts, crowd),
        "threshold": health["threshold"],
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output folder of `bayeslora train` on a classification task")
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--export", type=Path, help="serve this export of the run instead")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--warm-up", type=float, default=10.0)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--output", type=Path, help="where to write the figures as JSON")
    options = parser.parse_args(arguments)
    if options.export is not None and options.samples:
        parser.error(f"--samples is {options.samples}, but an export has no draws: give --samples 0")
    found = measure(options.run, options.samples, options.export, options.clients, options.warm_up, options.seconds)
    print_result(found, options.output)
    return found


if __name__ == "__main__":
    main()

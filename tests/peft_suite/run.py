"""Run PEFT's own test-suite on bayeslora's methods.

    python tests/peft_suite/run.py                          all methods, all suites
    python tests/peft_suite/run.py --methods blora-q        one row of the registry
    python tests/peft_suite/run.py -- -k test_merge -x      everything after -- goes to pytest

The first run downloads the source distribution of the installed PEFT into a cache folder; later runs are offline.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from cache import ENVIRONMENT_VARIABLE, cache_folder, check_path, fetch  # noqa: E402

NEEDED = ("pytest", "diffusers", "datasets", "parameterized")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="PEFT's own test-suite on bayeslora's methods")
    parser.add_argument("--methods", default="", help="rows of cases.METHODS, commas between (default: all)")
    parser.add_argument("--workers", type=int, default=2, help="parallel processes (default: 2)")
    parser.add_argument("--cache", type=Path, default=None, help="where to keep PEFT's tests and the small models")
    parser.add_argument("--download-only", action="store_true", help="fill the cache and stop")
    parser.add_argument("pytest_arguments", nargs="*", help="after --: passed on to pytest")
    options = parser.parse_args(arguments)

    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"PEFT's tests import {', '.join(missing)}; install them with: pip install {' '.join(missing)}"
        )
    folder = (options.cache or cache_folder()).resolve()
    check_path(folder)
    fetch(folder)
    if options.download_only:
        return 0

    environment = {**os.environ, ENVIRONMENT_VARIABLE: str(folder), "BAYESLORA_PEFT_METHODS": options.methods}
    environment.setdefault("OMP_NUM_THREADS", "1")  # workers share the cores
    command = [sys.executable, "-m", "pytest", "-c", str(HERE / "pytest.ini"), "-q", "--disable-warnings"]
    command += ["-p", "no:cacheprovider", "--tb=short"]
    if options.workers > 1 and find_spec("xdist") is not None:
        command += ["-n", str(options.workers)]
    targets = [] if any(Path(a.split("::")[0]).exists() for a in options.pytest_arguments) else [str(HERE)]
    return subprocess.run([*command, *options.pytest_arguments, *targets], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())

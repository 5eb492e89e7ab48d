"""Calibrated decisions of a run: `conformal.json` in its folder, sets of labels, and rows that a person should decide.

The file holds the scores of the calibration rows, so that any coverage and any risk can be asked for later. They are
those of one model, one number of samples and one seed, which the file names: other predictions have other scores. It
may also hold a map of the probabilities, such as a temperature; then the scores are those of mapped probabilities.
Of a run that tags words it holds such a map alone: the guarantees of sets and of a risk need independent rows, which
words of one sentence are not.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor, nn

from bayeslora.errors import BayesLoraError
from bayeslora.files import check_readable, save_json, write_atomically
from bayeslora.posterior import POSTERIOR_FILE
from bayeslora.posthoc.conformal import ConformalIntervals, ConformalSets, conformal_quantile
from bayeslora.posthoc.risk import RiskControl, Threshold
from bayeslora.prediction import Predictable, Prediction
from bayeslora.runs.base import add_tensor
from bayeslora.runs.info import RUN_FILE, RunInfo
from bayeslora.runs.predictions import Decisions
from bayeslora.runs.scaling import Scaling

Read = TypeVar("Read")

CALIBRATION_FILE = "conformal.json"
_VERSION = 3
"""Written for a file with a map alone; 2 for one with a map, and 1 for others, which older versions read too."""
_COVERAGES = (0.8, 0.9, 0.95)
_RISKS = (0.01, 0.05, 0.1)
"""Levels of the summary."""
_OF_CLASSES, _OF_NUMBERS = ("lac", "aps"), ("residual", "scaled")


@dataclass(frozen=True)
class Calibration:
    """A run's conformal sets, risk control and probability map, calibrated on labelled rows outside the training data.

    Attributes:
        sets: conformal sets for classes, or conformal intervals for regression; None for a run that tags words.
        risk: decides `ask_a_human`; None for regression and for a run that tags words.
        labels: class names by id; empty for regression and for a run that tags words.
        samples, seed: Monte-Carlo samples and seed of the predictions that were calibrated.
        source: name of the file or split with the calibration rows.
        fingerprint: digest of the calibrated model.
        scaling: map of the probabilities, fitted on other rows than `sets` and `risk`; None without a map.
    """

    sets: ConformalSets | ConformalIntervals | None
    risk: RiskControl | None
    labels: list[str]
    samples: int
    seed: int
    source: str
    fingerprint: str
    scaling: Scaling | None = None

    @property
    def rows(self) -> int:
        """Number of rows that calibrate `sets` and `risk`; for a run that tags words, of words that fit the map."""
        if self.sets is None:
            assert self.scaling is not None
            return self.scaling.rows
        return self.sets.rows

    @property
    def score(self) -> str | None:
        """Conformal score: `lac` or `aps` for classes, `residual` or `scaled` for regression, None for tags."""
        if self.sets is None:
            return None
        if isinstance(self.sets, ConformalSets):
            return self.sets.score
        return _OF_NUMBERS[self.sets.scaled]

    def check(self, folder: Path, samples: int | None, seed: int | None) -> tuple[int, int]:
        """Return the calibration's number of samples and seed; raise `BayesLoraError` if others are given."""
        way_out = ", or give uncalibrated=True" if self.scaling else ""
        for name, given, own in (("samples", samples, self.samples), ("seed", seed, self.seed)):
            if given not in (None, own) and (name == "samples" or self.samples):
                raise BayesLoraError(
                    f"{name} is {given}, but {folder / CALIBRATION_FILE} was made with {own}: leave it out, or "
                    f"calibrate again{way_out}"
                )
        return self.samples, self.seed

    def check_model(self, folder: Path, model: nn.Module) -> None:
        """Raise `BayesLoraError` if `model` is not the one that was calibrated."""
        otherwise = ", or give uncalibrated=True" if self.scaling else ""
        check_calibrated(folder / CALIBRATION_FILE, self.fingerprint, model, otherwise)

    def around(self, model: Predictable) -> Predictable:
        """Return the predictor that was calibrated: `model`, wrapped in the probability map if there is one."""
        return model if self.scaling is None else self.scaling.around(model)

    def threshold(self, risk: float, delta: float | None = None) -> Threshold:
        """Return the confidence threshold above which at most a share `risk` of the answers is wrong.

        Raises:
            BayesLoraError: the run is a regression, or a number is not between 0 and 1.
        """
        return self._controlled(delta).threshold(risk)

    def decide(
        self,
        prediction: Prediction,
        coverage: float | None = None,
        risk: float | None = None,
        delta: float | None = None,
    ) -> Decisions:
        """Return conformal sets or intervals for a coverage, and the rows that need a person for a risk.

        Args:
            prediction: prediction by the calibrated predictor, with the calibration's samples and seed.
            coverage: share of the sets or intervals that contain the right label or value; None for no sets.
            risk: maximum share of wrong answers; None to mark no rows.
            delta: probability that the risk is exceeded, by default 0.05; see `RiskControl`.

        Raises:
            BayesLoraError: a risk for a regression, or numbers that are not between 0 and 1.
        """
        found = Decisions()
        if self.sets is None and (coverage is not None or risk is not None):
            raise BayesLoraError("a coverage or a risk is given, but the calibration is of words: leave it out")
        if coverage is not None and isinstance(self.sets, ConformalSets):
            chosen = self.sets.sets(prediction, coverage).tolist()
            found.sets = [[name for name, inside in zip(self.labels, row, strict=True) if inside] for row in chosen]
        elif coverage is not None:
            bounds = self.sets.intervals(prediction, coverage).tolist()  # type: ignore[union-attr]
            found.intervals = [[end if math.isfinite(end) else None for end in row] for row in bounds]
        if risk is not None:
            found.ask_a_human = self._controlled(delta).ask_a_human(prediction, risk).tolist()
        return found

    def _controlled(self, delta: float | None) -> RiskControl:
        if self.risk is None:
            raise BayesLoraError("a risk is given, but the run predicts numbers: give a coverage for intervals")
        if delta is None:
            return self.risk
        other = RiskControl(delta=delta)
        other.confidence, other.wrong = self.risk.confidence, self.risk.wrong
        return other

    def save(self, folder: Path) -> Path:
        """Write `conformal.json` into `folder` atomically, replacing an earlier one, and return its path."""
        content: dict[str, Any] = {
            "version": _VERSION if self.sets is None else 2 if self.scaling else 1,
            "rows": self.rows,
            "source": self.source,
            "samples": self.samples,
            "seed": self.seed,
            "fingerprint": self.fingerprint,
            "score": self.score,
        }
        if isinstance(self.sets, ConformalSets):
            assert self.risk is not None
            content |= {
                "by_class": self.sets.by_class,
                "labels": self.labels,
                "scores": [of_class.tolist() for of_class in self.sets.scores],
                "confidence": self.risk.confidence.tolist(),
                "wrong": self.risk.wrong.astype(int).tolist(),
            }
        elif self.sets is not None:
            content["scores"] = self.sets.scores.tolist()
        if self.scaling is not None:
            content["scaling"] = dataclasses.asdict(self.scaling)
        path = folder / CALIBRATION_FILE
        with write_atomically(path) as partial:
            save_json(partial, content)
        return path

    def summary(self) -> dict[str, Any]:
        """Return what common levels of coverage and risk mean for the calibration rows."""
        sets = self.sets
        found: dict[str, Any] = {name: getattr(self, name) for name in ("rows", "source", "samples", "seed", "score")}
        if self.scaling is not None:
            found["scaling"] = dataclasses.asdict(self.scaling)
        if isinstance(sets, ConformalSets):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                limits = {coverage: sets.thresholds(coverage) for coverage in _COVERAGES}
            found["coverage"] = [
                {
                    "coverage": coverage,
                    "limit": float(np.max(limit)),
                    "labels": [name for name, always in zip(self.labels, np.isinf(limit), strict=True) if always],
                }
                for coverage, limit in limits.items()
            ]
        elif sets is not None:
            quantiles = {coverage: conformal_quantile(sets.scores, coverage) for coverage in _COVERAGES}
            found["coverage"] = [{"coverage": coverage, "limit": limit} for coverage, limit in quantiles.items()]
        if self.risk is not None:
            found["risk"] = [{"risk": risk, "answered": self.threshold(risk).coverage} for risk in _RISKS]
            found["lowest_risk"] = self.risk.lowest()
        return found

    @classmethod
    def load(cls, folder: Path) -> Calibration:
        """Read `conformal.json`.

        Raises:
            BayesLoraError: the file is missing or damaged, or a newer version wrote it.
        """
        return read_calibration(folder / CALIBRATION_FILE, "a coverage or risk", "calibrate", _VERSION, cls._read)

    @classmethod
    def _read(cls, content: dict[str, Any]) -> Calibration:
        shared = {name: content[name] for name in ("samples", "seed", "source", "fingerprint")}
        if "scaling" in content:
            shared["scaling"] = Scaling(**content["scaling"])
        if content["score"] is None:
            return cls(None, None, [], scaling=shared.pop("scaling"), **shared)
        if content["score"] in _OF_NUMBERS:
            intervals = ConformalIntervals(scaled=content["score"] == "scaled")
            intervals.scores = np.asarray(content["scores"], dtype=np.float64)
            return cls(intervals, None, [], **shared)
        sets = ConformalSets(content["score"], by_class=content["by_class"], seed=content["seed"])
        sets.scores = [np.asarray(scores, dtype=np.float64) for scores in content["scores"]]
        risk = RiskControl()
        risk.confidence = np.asarray(content["confidence"], dtype=np.float64)
        risk.wrong = np.asarray(content["wrong"], dtype=bool)
        if not len(risk.confidence) == len(risk.wrong) == sets.rows or len(sets.scores) != len(content["labels"]):
            raise ValueError("lists of different lengths")
        return cls(sets, risk, content["labels"], **shared)


def read_calibration(
    path: Path, needing: str, maker: str, version: int, read: Callable[[dict[str, Any]], Read]
) -> Read:
    """Return what `read` makes of a file that `bayeslora calibrate` has written into a run's folder.

    What `read` raises for a wrong content counts as damage; `version` is the newest that it knows. A message says what
    is `needing` the file, and names the `maker`, the method of `Run` that writes it where the command cannot.

    Raises:
        BayesLoraError: the file is missing or damaged, or a newer version wrote it.
    """
    if not path.is_file():
        has_info = (path.parent / RUN_FILE).is_file()  # which the command needs
        mend = f"run `bayeslora calibrate {path.parent}`" if has_info else f"call `{maker}` of the loaded model"
        raise BayesLoraError(f"{path.parent} lacks {path.name}, but {needing} needs it: {mend} first")
    check_readable(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] > version:
            raise BayesLoraError(f"{path} is of a newer version of bayeslora, but must be of this one: update it")
        return read(content)
    except BayesLoraError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BayesLoraError(f"{path} is damaged ({type(error).__name__}): run `bayeslora calibrate` again") from error


def check_calibrated(path: Path, fingerprint: str, model: nn.Module, otherwise: str = "") -> None:
    """Raise `BayesLoraError` if `model` is not the one with the digest in the file at `path`."""
    if (found := model_digest(model, path.parent)) != fingerprint:
        raise BayesLoraError(
            f"{path} was made for the model {fingerprint}, but the model is {found}: calibrate again{otherwise}"
        )


def calibrated(
    prediction: Prediction,
    truth: Sequence[float],
    info: RunInfo,
    *,
    score: str | None = None,
    by_class: bool = False,
    **settings: Any,
) -> Calibration:
    """Return the `Calibration` from predictions of labelled rows; `settings` are its other fields.

    Raises:
        BayesLoraError: the score or `by_class` is not for this kind of run.
    """
    numbers = info.kind == "regression"
    known = _OF_NUMBERS if numbers else _OF_CLASSES
    if score is not None and score not in known:
        raise BayesLoraError(f"score is {score}, but must be {' or '.join(known)} for this run: give one of these")
    if numbers:
        if by_class:
            raise BayesLoraError("by_class is given, but the run predicts numbers: leave it out")
        return Calibration(ConformalIntervals(scaled=score == "scaled").fit(prediction, truth), None, [], **settings)
    sets = ConformalSets("aps" if score == "aps" else "lac", by_class=by_class, seed=settings["seed"])
    return Calibration(
        sets.fit(prediction, truth), RiskControl().fit(prediction, truth), list(info.labels), **settings
    )


def calibration_for(
    folder: Path, samples: int | None, seed: int | None, *, decides: bool = False, uncalibrated: bool = False
) -> tuple[Calibration | None, int, int]:
    """Return the calibration that a prediction of the run in `folder` needs, its number of samples and its seed.

    Args:
        folder: of the run.
        samples, seed: as given; by default those of the calibration, otherwise 0.
        decides: whether sets or rows for a person are asked for. If not, only a map of the probabilities is needed.
        uncalibrated: leave such a map out.

    Raises:
        BayesLoraError: the calibration is missing or damaged, has other samples, or is of mapped probabilities that
            are to be left out.
    """
    found = Calibration.load(folder) if decides or (folder / CALIBRATION_FILE).is_file() and not uncalibrated else None
    if found is not None and found.scaling is not None and uncalibrated:
        raise BayesLoraError(
            f"uncalibrated is given, but the sets and the risk of {folder / CALIBRATION_FILE} are for probabilities "
            f"by {found.scaling}: leave it out, or calibrate again without that"
        )
    if found is None or not decides and found.scaling is None:
        return None, samples or 0, seed or 0
    return found, *found.check(folder, samples, seed)


def model_digest(model: nn.Module, folder: Path) -> str:
    """Return a digest of the tensors that a loaded model computes with, and of the posterior in its folder."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        # PEFT keeps the head that a trained one replaces, with new random values each time it is loaded.
        if isinstance(value, Tensor) and ".original_module." not in name:
            add_tensor(digest, name, value)
    if (folder / POSTERIOR_FILE).is_file():
        digest.update((folder / POSTERIOR_FILE).read_bytes())
    return digest.hexdigest()[:16]

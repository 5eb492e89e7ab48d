"""Ask a loaded run about one text at a time, for the page of `bayeslora app`."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from bayeslora.errors import BayesLoraError
from bayeslora.evaluation import FeatureDetector, dataset_features, predict_dataset
from bayeslora.prediction import check_samples
from bayeslora.runs.answers import Answer
from bayeslora.runs.base import quiet_loading
from bayeslora.runs.decisions import CALIBRATION_FILE, calibration_for
from bayeslora.runs.rows import EVALUATION, encode_for, rows_to_predict
from bayeslora.runs.run import Run
from bayeslora.runs.tagging import Tagging, Taggings

DETECTOR_FILE = "detector.safetensors"
"""Where a run's folder may hold what `FeatureDetector.save` wrote."""
FOREIGN_SCORE = "relative_mahalanobis"


@dataclass(frozen=True)
class Reply:
    """Answer of a run to one text.

    Attributes:
        label: the most probable class, or the number.
        probabilities: by class, the most probable first; empty for numbers.
        draws: by draw of the weights, the probability of `label`, or the number; empty without samples.
        mutual_information: in nats; None without samples and for numbers.
        std: standard deviation over the draws, for numbers; None for classes and without samples.
        foreign: share of the training rows that are less foreign to the run; None without a detector in its folder.
        ask_a_human: whether a person should decide; None where the run is not calibrated.
    """

    label: str
    probabilities: dict[str, float] = field(default_factory=dict)
    draws: list[float] = field(default_factory=list)
    mutual_information: float | None = None
    std: float | None = None
    foreign: float | None = None
    ask_a_human: bool | None = None

    @property
    def confidence(self) -> float | None:
        """Probability of the label; None for numbers."""
        return max(self.probabilities.values(), default=None)


@dataclass(frozen=True)
class Playground:
    """A run with the settings to ask it with.

    Args:
        run: from `load`.
        samples: draws of the weights; None takes the calibration's, or 10 if the run has a posterior and else 0.
        risk: for `ask_a_human`, where `calibrate` was run on it.

    Raises:
        BayesLoraError: the run answers multiple choice, has several labels a row, or is deterministic and samples are
            given.
    """

    run: Run
    samples: int | None = None
    risk: float = 0.05

    def __post_init__(self) -> None:
        if self.run.kind in ("multiple_choice", "multi_label"):
            raise BayesLoraError(f"the run is {self.run.kind}, but the page shows one label: use `bayeslora predict`")
        if self.samples:
            check_samples(self.run.predictor, self.samples)

    @property
    def columns(self) -> list[str]:
        """Names of the texts to type, one or two."""
        shown = {"generation": ["prompt"], "token_classification": ["text"]}
        return shown.get(self.run.kind) or self.run.info.text_columns or ["text"]

    @functools.cached_property
    def draws(self) -> int:
        """Number of samples, where none is given that of a run without a calibration."""
        if self.samples is not None:
            return self.samples
        try:
            check_samples(self.run.predictor, 10)
        except BayesLoraError:
            return 0
        return 10

    @quiet_loading()
    def label(self, *texts: str) -> Reply:
        """Predict the label of a text, or of a pair."""
        run = self.run
        decides = (run.folder / CALIBRATION_FILE).is_file() and run.kind == "classification"
        calibration, samples, seed = calibration_for(run.folder, self.samples, None, decides=decides)
        if calibration is None:
            samples = self.draws
        else:
            calibration.check_model(run.folder, run.model)
        task = rows_to_predict([texts if len(texts) > 1 else texts[0]], run.info)
        data = encode_for(task.splits[EVALUATION], task, run.tokenizer, run.info)
        predictor = run.predictor if calibration is None else calibration.around(run.predictor)
        found = predict_dataset(predictor, data, run.tokenizer, 1, samples, seed, per_sample=samples > 0)
        if run.kind == "regression":
            values = [] if found.sample_values is None else found.sample_values[:, 0].tolist()
            std = float(found.std[0]) if samples else None
            return Reply(f"{float(found.labels[0]):.4g}", draws=values, std=std)
        number = int(found.labels[0])
        order = found.probabilities[0].argsort(descending=True).tolist()
        drawn = found.sample_probabilities
        asked = (
            calibration.decide(found, risk=self.risk).ask_a_human if calibration is not None and decides else [None]
        )
        return Reply(
            run.labels[number],
            {run.labels[i]: float(found.probabilities[0, i]) for i in order},
            [] if drawn is None else drawn[:, 0, number].tolist(),
            float(found.mutual_information[0]) if samples else None,
            foreign=self._foreign(data),
            ask_a_human=asked[0],
        )

    def tags(self, text: str) -> Tagging:
        """Tag the words of a text."""
        calibration, samples, _ = calibration_for(self.run.folder, self.samples, None)
        found = self.run.predict([text], samples if calibration else self.draws)
        assert isinstance(found, Taggings)
        tagging: Tagging = found[0]
        return tagging

    def answer(self, prompt: str) -> Answer:
        """Answer a prompt with the uncertainty of each token."""
        return self.run.generate([prompt], samples=self.draws)[0]

    @functools.cached_property
    def _detector(self) -> tuple[FeatureDetector, NDArray[np.float64]] | None:
        """Return the detector of the run's folder, and the scores of the training rows it was fitted to."""
        file = self.run.folder / DETECTOR_FILE
        if not file.is_file():
            return None
        detector = FeatureDetector.load(self.run.model, file)
        assert detector.space is not None
        features = detector.space.features
        return detector, detector.space.scores(features, np.zeros((len(features), 2)))[FOREIGN_SCORE]

    def _foreign(self, data: Dataset) -> float | None:
        if self._detector is None:
            return None
        detector, of_training = self._detector
        assert detector.space is not None
        features, logits = dataset_features(self.run.model, data, self.run.tokenizer, 1)
        return float((of_training < detector.space.scores(features, logits)[FOREIGN_SCORE][0]).mean())

"""Answers that a person should write: `risk.json` in a run's folder, with the losses of answers to known rows.

The file holds the uncertainty and the loss of each calibration row, so that any risk can be asked for later. They are
those of one model and one way to answer, which the file names: other answers have other losses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

from datasets import Dataset
from torch import nn

from bayeslora.data import Task
from bayeslora.errors import BayesLoraError
from bayeslora.evaluation.text_metrics import BY_ROW, check_metrics
from bayeslora.files import save_json, write_atomically
from bayeslora.posthoc.loss import LossControl
from bayeslora.runs.answers import Answer, Sampling, answer_rows
from bayeslora.runs.decisions import check_calibrated, read_calibration
from bayeslora.runs.text_scores import references_of, sampling_of, uncertainty_of
from bayeslora.vocabulary import AnswerLoss, Measure

RISK_FILE = "risk.json"
_VERSION = 1
_RISKS = (0.05, 0.1, 0.2, 0.3, 0.4)
"""Levels of the summary."""


@dataclass(frozen=True)
class AnswerCalibration:
    """Uncertainty and loss of a run's answers to rows with known answers that it was not trained on.

    Attributes:
        control: risk control with the uncertainty and the loss of each answer.
        measure: measure of uncertainty, see `uncertainty_of`.
        loss: name of the score; the loss is 1 minus the score.
        sampling: settings with which the answers were made.
        source: name of the file or split with the rows.
        fingerprint: digest of the calibrated model.
    """

    control: LossControl
    measure: Measure
    loss: AnswerLoss
    sampling: Sampling
    source: str
    fingerprint: str

    @property
    def rows(self) -> int:
        """Number of calibration rows."""
        return len(self.control.losses)

    def settings(self, folder: Path, given: Mapping[str, Any]) -> Sampling:
        """Return the settings of the answers; raise `BayesLoraError` if a value in `given`, except None, differs."""
        for name, value in given.items():
            own = getattr(self.sampling, name)
            if value is not None and value != own:
                raise BayesLoraError(
                    f"{name} is {value}, but {folder / RISK_FILE} was made with {own}: leave it out, or "
                    "calibrate again"
                )
        return self.sampling

    def check_model(self, folder: Path, model: nn.Module) -> None:
        """Raise if the model is not the one that was calibrated."""
        check_calibrated(folder / RISK_FILE, self.fingerprint, model)

    def decide(self, answers: list[Answer], risk: float, delta: float | None = None) -> list[Answer]:
        """Return the answers with `ask_a_human`, so that the mean loss of the others is at most `risk`.

        Args:
            answers: answers by the calibrated model, made with the same settings.
            risk: the level, between 0 and 1.
            delta: probability that the risk is exceeded, by default 0.05; see `LossControl`.
        """
        control = self.control
        if delta is not None:
            control = LossControl(control.uncertainty, control.losses, delta)
        asked = control.ask_a_human(uncertainty_of(answers)[self.measure], risk)
        return [replace(answer, ask_a_human=bool(each)) for answer, each in zip(answers, asked, strict=True)]

    def save(self, folder: Path) -> Path:
        """Write `risk.json` in one step, in place of an earlier one."""
        path = folder / RISK_FILE
        content = {
            "version": _VERSION,
            "rows": self.rows,
            "source": self.source,
            "measure": self.measure,
            "loss": self.loss,
            "sampling": asdict(self.sampling),
            "fingerprint": self.fingerprint,
            "uncertainty": self.control.uncertainty.tolist(),
            "losses": self.control.losses.tolist(),
        }
        with write_atomically(path) as partial:
            save_json(partial, content)
        return path

    def summary(self) -> dict[str, Any]:
        """Return what usual levels of risk mean for the calibration rows."""
        found = {name: getattr(self, name) for name in ("rows", "source", "measure", "loss")}
        return {
            **found,
            **asdict(self.sampling),
            "risk_of_all": float(self.control.losses.mean()),
            "risk": [{"risk": risk, "answered": self.control.threshold(risk).coverage} for risk in _RISKS],
            "lowest_risk": self.control.lowest(),
        }

    @classmethod
    def load(cls, folder: Path) -> AnswerCalibration:
        """Read `risk.json`.

        Raises:
            BayesLoraError: the file is missing or damaged, or a newer version wrote it.
        """
        return read_calibration(folder / RISK_FILE, "a risk", "calibrate_answers", _VERSION, cls._read)

    @classmethod
    def _read(cls, content: dict[str, Any]) -> AnswerCalibration:
        if content["measure"] not in get_args(Measure):
            raise ValueError(content["measure"])
        return cls(
            LossControl(content["uncertainty"], content["losses"]),
            sampling=Sampling(**content["sampling"]),
            **{name: content[name] for name in ("measure", "loss", "source", "fingerprint")},
        )


def calibrated_answers(
    predictor: Any,
    tokenizer: Any,
    task: Task,
    rows: Dataset,
    batch_size: int,
    sampling: Sampling,
    measure: Measure = "probability",
    loss: AnswerLoss | None = None,
    **settings: Any,
) -> AnswerCalibration:
    """Return the `AnswerCalibration` from answers to the rows of a split; `settings` are its other fields.

    The loss is by default that of the task: 1 - ROUGE-L for `e2e`, otherwise 1 - F1.

    Raises:
        BayesLoraError: the measure or the loss is unknown, or needs draws or a package that are missing.
    """
    chosen: AnswerLoss = loss or ("rouge_l" if "rouge_l" in task.metrics else "f1")
    for name, value, known in (("measure", measure, get_args(Measure)), ("loss", chosen, tuple(BY_ROW))):
        if value not in known:
            raise BayesLoraError(f"{name} is {value}, but must be {', '.join(known)}: give one of these")
    if measure != "probability" and not sampling.samples:
        raise BayesLoraError(f"measure is {measure}, but it needs draws: give samples, or measure probability")
    check_metrics([chosen])
    sampling = sampling_of(task, sampling)
    answers = answer_rows(predictor, tokenizer, list(rows), sampling, batch_size)
    measures = uncertainty_of(answers)
    if measure not in measures:
        raise BayesLoraError(
            f"measure is {measure}, but the model is deterministic: give another measure, or train with a posterior"
        )
    losses = 1 - BY_ROW[chosen]([answer.text for answer in answers], references_of(rows))
    return AnswerCalibration(LossControl(measures[measure], losses), measure, chosen, sampling, **settings)

"""Bayesian low-rank adaptation of pretrained transformers, as ordinary PEFT adapters.

Importing this package registers its methods with PEFT; `get_peft_model`, `Trainer`, `save_pretrained` and
`from_pretrained` then work as with LoRA. torch and PEFT are imported when a name of this package is first used.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from bayeslora._lazy import importer
from bayeslora._peft_hook import teach_peft
from bayeslora.errors import BayesLoraError

if TYPE_CHECKING:  # import functions that share a module's name from the module, or mypy takes the module
    from bayeslora.evaluation import FeatureDetector
    from bayeslora.export import export as export
    from bayeslora.export import load_integer, load_packed, shrink
    from bayeslora.methods import (
        METHODS,
        AdaLoraConfig,
        BlobConfig,
        BLoraConfig,
        DyLoraConfig,
        GateDescription,
        LayerDescription,
        MeLoraConfig,
        PosteriorWidth,
        at_rank,
        describe,
        posterior_mean,
        rank_curve,
        register_method,
        sampling,
    )
    from bayeslora.optim import IVON
    from bayeslora.posterior import WeightPosterior, load_posterior, save_posterior
    from bayeslora.posthoc import (
        ActivationCounts,
        ConformalIntervals,
        ConformalSets,
        DeepEnsemble,
        IsotonicCalibration,
        LaplacePredictor,
        LossControl,
        MCDropout,
        RiskControl,
        RoundedModel,
        TemperatureScaling,
        VectorScaling,
        bayesianize,
        round_after_training,
        select_rows,
        truncate_rank,
    )
    from bayeslora.prediction import CoreEnsemble, ModelPredictor
    from bayeslora.prediction.generate import Generation, generate
    from bayeslora.prediction.predict import Prediction, predict
    from bayeslora.runs.run import load
    from bayeslora.runtime import compile_inference
    from bayeslora.training import BayesLoop, parameter_groups
    from bayeslora.training.attach import attach
    from bayeslora.training.swag import SWAG

__version__ = "0.1.0"

__all__ = [
    "IVON",
    "METHODS",
    "SWAG",
    "ActivationCounts",
    "AdaLoraConfig",
    "BLoraConfig",
    "BayesLoop",
    "BayesLoraError",
    "BlobConfig",
    "ConformalIntervals",
    "ConformalSets",
    "CoreEnsemble",
    "DeepEnsemble",
    "DyLoraConfig",
    "FeatureDetector",
    "GateDescription",
    "Generation",
    "IsotonicCalibration",
    "LaplacePredictor",
    "LayerDescription",
    "LossControl",
    "MCDropout",
    "MeLoraConfig",
    "ModelPredictor",
    "PosteriorWidth",
    "Prediction",
    "RiskControl",
    "RoundedModel",
    "TemperatureScaling",
    "VectorScaling",
    "WeightPosterior",
    "at_rank",
    "attach",
    "bayesianize",
    "compile_inference",
    "describe",
    "export",
    "generate",
    "load",
    "load_integer",
    "load_packed",
    "load_posterior",
    "parameter_groups",
    "posterior_mean",
    "predict",
    "rank_curve",
    "register_method",
    "round_after_training",
    "sampling",
    "save_posterior",
    "select_rows",
    "shrink",
    "truncate_rank",
]

# Public names by package; packages without names are attributes too.
_NAMES = {
    "cost": (),
    "data": (),
    "evaluation": ("FeatureDetector",),
    "export": ("export", "load_integer", "load_packed", "shrink"),
    "methods": (
        *("METHODS", "AdaLoraConfig", "BLoraConfig", "BlobConfig", "DyLoraConfig", "MeLoraConfig"),
        *("GateDescription", "LayerDescription", "PosteriorWidth"),
        *("at_rank", "describe", "posterior_mean", "rank_curve", "register_method", "sampling"),
    ),
    "optim": ("IVON",),
    "posterior": ("WeightPosterior", "load_posterior", "save_posterior"),
    "posthoc": (
        *("ActivationCounts", "ConformalIntervals", "ConformalSets", "DeepEnsemble", "IsotonicCalibration"),
        *("LaplacePredictor", "LossControl", "MCDropout", "RiskControl", "RoundedModel", "TemperatureScaling"),
        *("VectorScaling", "bayesianize", "round_after_training", "select_rows", "truncate_rank"),
    ),
    "prediction": ("CoreEnsemble", "Generation", "ModelPredictor", "Prediction", "generate", "predict"),
    "runs": ("load",),
    "runtime": ("compile_inference",),
    "training": ("SWAG", "BayesLoop", "attach", "parameter_groups"),
}
__getattr__ = importer(__name__, _NAMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_NAMES})


class _Package(ModuleType):
    """Leave `bayeslora.export` to be the function, which `__getattr__` finds, when the package is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name == "export" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
teach_peft()

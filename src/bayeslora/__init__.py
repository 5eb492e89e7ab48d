"""Bayesian low-rank adaptation of pretrained transformers, as ordinary PEFT adapters.

Importing this package teaches PEFT the methods; `get_peft_model`, `Trainer`, `save_pretrained` and `from_pretrained`
then work with them as with LoRA.
"""

from bayeslora import _peft as _peft  # first, because it keeps the import quiet
from bayeslora.errors import BayesLoraError
from bayeslora.export import export, load_integer, load_packed, shrink
from bayeslora.methods import (
    METHODS,
    AdaLoraConfig,
    BlobConfig,
    BLoraConfig,
    DyLoraConfig,
    LayerDescription,
    MeLoraConfig,
    at_rank,
    describe,
    posterior_mean,
    rank_curve,
    sampling,
)
from bayeslora.optim import IVON
from bayeslora.posterior import WeightPosterior, load_posterior, save_posterior
from bayeslora.posthoc import DeepEnsemble, LaplacePredictor, MCDropout, TemperatureScaling, bayesianize
from bayeslora.prediction import Generation, ModelPredictor, Prediction, generate, predict
from bayeslora.runtime import compile_inference
from bayeslora.training import BayesLoop, attach, parameter_groups

__version__ = "0.1.0"

__all__ = [
    "IVON",
    "METHODS",
    "AdaLoraConfig",
    "BLoraConfig",
    "BayesLoop",
    "BayesLoraError",
    "BlobConfig",
    "DeepEnsemble",
    "DyLoraConfig",
    "Generation",
    "LaplacePredictor",
    "LayerDescription",
    "MCDropout",
    "MeLoraConfig",
    "ModelPredictor",
    "Prediction",
    "TemperatureScaling",
    "WeightPosterior",
    "at_rank",
    "attach",
    "bayesianize",
    "compile_inference",
    "describe",
    "export",
    "generate",
    "load_integer",
    "load_packed",
    "load_posterior",
    "parameter_groups",
    "posterior_mean",
    "predict",
    "rank_curve",
    "sampling",
    "save_posterior",
    "shrink",
]

"""Gates, quantizers and ranges: tensors in, tensors out."""

from bayeslora.quantization.gates import (
    CLOSED_THRESHOLD,
    OPEN_LOGIT,
    STRETCH,
    TEMPERATURE,
    evaluation_gates,
    hard_concrete,
    nested_probability,
    open_probability,
    rank_gates,
    rank_probability,
)
from bayeslora.quantization.linear import linear
from bayeslora.quantization.quantizer import (
    WIDTHS,
    active_widths,
    codes,
    grid_step,
    mixture,
    mixture_weights,
    quantize,
    quantize_mixture,
)
from bayeslora.quantization.ranges import FLOOR, Calibration, optimal_range

__all__ = [
    "CLOSED_THRESHOLD",
    "FLOOR",
    "OPEN_LOGIT",
    "STRETCH",
    "TEMPERATURE",
    "WIDTHS",
    "Calibration",
    "active_widths",
    "codes",
    "evaluation_gates",
    "grid_step",
    "hard_concrete",
    "linear",
    "mixture",
    "mixture_weights",
    "nested_probability",
    "open_probability",
    "optimal_range",
    "quantize",
    "quantize_mixture",
    "rank_gates",
    "rank_probability",
]

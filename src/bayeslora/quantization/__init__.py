"""Gates, quantizers and ranges: tensors in, tensors out."""

from bayeslora.quantization.gates import (
    CLOSED_THRESHOLD,
    GATED_WIDTHS,
    OPEN_LOGIT,
    STRETCH,
    SURE_LOGIT,
    TEMPERATURE,
    evaluation_width,
    fixed_logits,
    hard_concrete,
    nested_probability,
    open_probability,
    opened,
    rank_gates,
    rank_probability,
)
from bayeslora.quantization.linear import linear
from bayeslora.quantization.quantizer import (
    active_widths,
    codes,
    grid_step,
    mixture_weights,
    quantize,
    quantize_mixture,
)
from bayeslora.quantization.ranges import FLOOR, Calibration, optimal_range
from bayeslora.vocabulary import WIDTHS

__all__ = [
    "CLOSED_THRESHOLD",
    "FLOOR",
    "GATED_WIDTHS",
    "OPEN_LOGIT",
    "STRETCH",
    "SURE_LOGIT",
    "TEMPERATURE",
    "WIDTHS",
    "Calibration",
    "active_widths",
    "codes",
    "evaluation_width",
    "fixed_logits",
    "grid_step",
    "hard_concrete",
    "linear",
    "mixture_weights",
    "nested_probability",
    "open_probability",
    "opened",
    "optimal_range",
    "quantize",
    "quantize_mixture",
    "rank_gates",
    "rank_probability",
]

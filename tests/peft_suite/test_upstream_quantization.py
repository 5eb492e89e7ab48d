"""PEFT's tests of adapters on bases loaded in 8 or 4 bits (bitsandbytes and torchao, on a CPU)."""

from __future__ import annotations

from peft_upstream import test_quantization as quantization

from . import cases
from .cache import cache_folder
from .models import build

MODEL = build(cache_folder() / "models")["tiny-OPT-wide"]
# GPTQ has no on-the-fly path: it needs a model that somebody quantized before, hence a hub.
quantization.QUANTIZATION_BACKENDS[:] = [b for b in quantization.QUANTIZATION_BACKENDS if b.name != "gptq_4bit"]
for backend in quantization.QUANTIZATION_BACKENDS:
    type(backend).model_id = MODEL
    type(backend).expected_layer_count = 4  # q_proj and v_proj of two layers
quantization.TEST_CASES[:] = [
    (row.config, cases.options(row, r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"])) for row in cases.ROWS
]

TestQuantization = quantization.TestQuantization
